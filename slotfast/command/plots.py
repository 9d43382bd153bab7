"""Drawing without a display; matplotlib is an extra that a picture alone needs."""

import os
from typing import Any

from ..errors import InputError
from .files import atomic_write


def pyplot(flag: str) -> Any:
    """matplotlib's pyplot, for what a flag asks for; raises InputError where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise InputError(f"{flag}: needs matplotlib: pip install 'slotfast[plot]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def write_png(path: str | os.PathLike, figure: Any) -> None:
    """Write a figure, whole or not at all, and let go of it."""
    figure.tight_layout()
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)
    pyplot("--plot").close(figure)
