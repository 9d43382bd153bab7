"""The command."""

from collections.abc import Sequence

from .. import config
from ..command.run import run_command

_ABOUT = "Train a model and write its int6 artifact."


def main(argv: Sequence[str] | None = None) -> None:
    """Train, quantise, write; raises InputError on bad input."""
    settings, sources = config.load(config.TrainSettings, "slotfast train", _ABOUT, argv)
    config.warn_unread_variables()
    if settings.show_config:
        return print(config.show(settings, sources))
    from .program import train  # imports torch

    return train(settings)


if __name__ == "__main__":
    run_command(main)
