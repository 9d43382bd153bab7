"""python -m slotfast.bundle: the kernels to take along, in a script's one file, or as a kernel hub's folder."""

from .hub import write_hub
from .inline import inline
from .pack import self_extracting

__all__ = ["inline", "self_extracting", "write_hub"]
