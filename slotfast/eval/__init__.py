"""python -m slotfast.eval: bits per byte of a model, plain and adapted, out of one sliding-window pass."""

from .loop import Pass, Scored, sliding_pass

__all__ = ["Pass", "Scored", "sliding_pass"]
