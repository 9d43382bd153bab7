"""slotfast eval: bits per byte of a model, plain and adapted, out of one pass."""

from typing import TYPE_CHECKING

from ..lazy import exports

if TYPE_CHECKING:
    from .chunked import WindowsLoop
    from .forward import Streaming
    from .loop import Scored, SlidingPass

__all__ = ["Scored", "SlidingPass", "Streaming", "WindowsLoop"]
__getattr__, __dir__ = exports(
    __name__, {".chunked": ["WindowsLoop"], ".forward": ["Streaming"], ".loop": ["Scored", "SlidingPass"]}
)
