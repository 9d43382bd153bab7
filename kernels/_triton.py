"""Triton, or a stand-in where it is not installed: kernel files import either way, and their references work."""

import re

import torch

try:
    import triton
    import triton.language as tl
except ImportError:

    def _refuse(what):
        raise ImportError(f"a kernel launch needs {what}, and triton is not installed: use the `_ref` function")

    class _Kernel:
        """What `jit` makes of a function: it cannot be launched."""

        def __getitem__(self, grid):
            _refuse("triton")

    class _Absent:
        """Has what a kernel file uses while it is imported; anything else says what is missing."""

        @staticmethod
        def jit(function=None, **options):
            return _Kernel() if function is not None else lambda function: _Kernel()

        @staticmethod
        def constexpr(value):
            return value

        def __getattr__(self, name):
            _refuse(f"triton.{name}")

    triton = tl = _Absent()

# Kernels work in base 2: exp2 is what the hardware has.
_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)


def _launch(kernel, grid, public, **arguments):
    """Launches a kernel on the device of its first tensor; `public` is the function to name where that cannot work.

    What Triton says there is translated, not what it can do decided beforehand: tests put other devices in its place.
    """
    first = next(value for value in arguments.values() if isinstance(value, torch.Tensor))
    try:
        with torch.cuda.device_of(first):
            kernel[grid](**arguments)
    except (RuntimeError, ValueError) as error:
        if not first.is_cuda and re.search(r"0 active drivers|cannot be accessed from Triton", str(error)):
            raise ValueError(
                f"{public}: expected CUDA tensors, got tensors on {first.device}; on a CPU call {public}_ref, or set "
                "TRITON_INTERPRET=1 before the first import"
            ) from None
        raise
    except Exception as error:
        if "only 0-dimensional arrays can be converted" in str(error):
            raise RuntimeError(
                f"{public}: the interpreter of Triton {triton.__version__} does not work with numpy 2.4 or newer; "
                "install numpy < 2.4, or Triton 3.7 or newer"
            ) from error
        raise


__all__ = ["_LN2", "_LOG2E", "_launch", "tl", "triton"]
