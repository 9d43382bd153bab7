"""The command."""

from collections.abc import Sequence

from .. import config
from ..command.run import run_command

_ABOUT = "Train a model and write its int6 artifact."


def main(argv: Sequence[str] | None = None) -> None:
    """Train, quantise, write; raises InputError on bad input."""
    settings = config.start(config.TrainSettings, "slotfast train", _ABOUT, argv)
    if settings is None:
        return None
    from .program import train  # imports torch

    return train(settings)


if __name__ == "__main__":
    run_command(main)
