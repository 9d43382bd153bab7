"""The command."""

from collections.abc import Sequence

from .. import config
from ..command.run import run_command

_ABOUT = (
    "Fit the few numbers of `causal` to a model, ours or another project's, on text like its training text, and find "
    "whether the model may be forwarded as a stream, every token once, and with how many sinks."
)


def main(argv: Sequence[str] | None = None) -> None:
    """Calibrate a stored model; raises InputError on bad input."""
    settings = config.start(config.CalibrateSettings, "slotfast calibrate", _ABOUT, argv)
    if settings is None:
        return None
    from .program import run  # imports torch

    return run(settings)


if __name__ == "__main__":
    run_command(main, "--model")
