"""Inputs and cases of the kernels' specs, a file a kernel, apart from the code that they check."""
