"""The catalogue: every known way to cheat a prequential score that fits in a small loop, each with an honest twin.

An auditor has to report each leaky loop for a condition that it breaks, and none of the honest ones.
"""

from . import bytecounts, fits, hidden, mixtures, network, passes
from .toy import Pattern

PATTERNS: tuple[Pattern, ...] = tuple(
    value
    for module in (fits, network, mixtures, passes, bytecounts, hidden)
    for value in vars(module).values()
    if isinstance(value, Pattern)
)

__all__ = ["PATTERNS", "Pattern"]
