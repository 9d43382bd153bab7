"""slotfast bundle: the kernels to take along, in a script's one file, or as a kernel hub's folder."""

from typing import TYPE_CHECKING

from ..lazy import exports

if TYPE_CHECKING:
    from .hub import write_hub
    from .inline import inline
    from .pack import self_extracting

__all__ = ["inline", "self_extracting", "write_hub"]
__getattr__, __dir__ = exports(__name__, {".hub": ["write_hub"], ".inline": ["inline"], ".pack": ["self_extracting"]})
