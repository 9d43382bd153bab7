"""slotfast: test-time logit adaptation of small language models, fast and provably honest."""

from .slot import Adapted, adapt

__version__ = "0.1.0"
__all__ = ["Adapted", "adapt"]
