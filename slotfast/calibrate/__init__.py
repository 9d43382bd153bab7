"""slotfast calibrate: fit the few numbers of `causal` to a model, on text like its training text.

It also finds whether the model may be forwarded as a stream, every token once, and with how many sinks.
"""

from typing import TYPE_CHECKING

from ..lazy import exports

if TYPE_CHECKING:
    from .__main__ import main
    from .fit import CLOSED_GATES, calibrate, calibrated, compare_forwards, summary
    from .learning import calibrate_learning

__all__ = [
    "CLOSED_GATES",
    "calibrate",
    "calibrate_learning",
    "calibrated",
    "compare_forwards",
    "main",
    "summary",
]
__getattr__, __dir__ = exports(
    __name__,
    {
        ".__main__": ["main"],
        ".fit": ["CLOSED_GATES", "calibrate", "calibrated", "compare_forwards", "summary"],
        ".learning": ["calibrate_learning"],
    },
)
