"""The command."""

import sys
from collections.abc import Sequence

from .. import config
from ..command.run import run_command

_ABOUT = "Run an evaluation loop on altered tokens and find out whether its scores look at what they must not."


def main(argv: Sequence[str] | None = None) -> None:
    """Audit; raises InputError on bad input, exits with 1 where something leaks."""
    argv = sys.argv[1:] if argv is None else list(argv)
    settings = config.start(config.AuditSettings, "slotfast audit", _ABOUT, argv)
    if settings is None:
        return None
    from .program import run  # imports torch

    return run(settings, argv)


if __name__ == "__main__":
    run_command(main, foreign="--score")
