"""python -m slotfast.bundle: the kernels to take along, in a script's one file, or as a kernel hub's folder."""

from .hub import write_hub
from .inline import inline
from .pack import CAP_BYTES, self_extracting

__all__ = ["CAP_BYTES", "inline", "self_extracting", "write_hub"]
