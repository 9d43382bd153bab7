"""The command."""

import sys
from collections.abc import Sequence

from .. import config
from ..command.run import run_command

_ABOUT = "Bits per byte of a model, plain and adapted, out of one pass."


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate; raises InputError on bad input."""
    argv = sys.argv[1:] if argv is None else list(argv)
    settings = config.start(config.EvalSettings, "slotfast eval", _ABOUT, argv)
    if settings is None:
        return None
    from .program import evaluate  # imports torch

    return evaluate(settings, argv)


if __name__ == "__main__":
    run_command(main, foreign="--model")
