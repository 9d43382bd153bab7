"""python -m slotfast.eval: bits per byte of a model, plain and adapted, out of one pass."""

from .forward import Streaming
from .loop import Scored, SlidingPass

__all__ = ["Scored", "SlidingPass", "Streaming"]
