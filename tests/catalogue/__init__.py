"""The catalogue: every known way to cheat a prequential score that fits in a small loop, each with an honest twin.

An auditor has to report each leaky loop of `PATTERNS` for a condition that it breaks, and no honest one, here or among
`DISPUTED`. Some leaky loops remember earlier runs as a module's globals would: `leaky(seed)` makes one without memory.
"""

from . import bytecounts, disputed, fits, hidden, learning, mixtures, network, passes
from .toy import Pattern


def _patterns(*modules) -> tuple[Pattern, ...]:
    return tuple(value for module in modules for value in vars(module).values() if isinstance(value, Pattern))


PATTERNS = _patterns(fits, network, mixtures, passes, learning, bytecounts, hidden)
DISPUTED = _patterns(disputed)

__all__ = ["DISPUTED", "PATTERNS", "Pattern"]
