"""python -m slotfast.eval: bits per byte of a model, plain and adapted, out of one sliding-window pass."""

from .loop import Scored, SlidingPass

__all__ = ["Scored", "SlidingPass"]
