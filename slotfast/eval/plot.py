"""--plot: bits per byte along the stream, and what each document gained."""

import math

import numpy as np

from ..command.plots import pyplot, write_png
from ..score import Meter

_LEGEND_COLUMNS = 3
_MOST_MARKERS = 2000  # above it a share of the documents is drawn fainter
_COLOURS = [f"C{number}" for number in range(10) if number != 7]  # C7 is a grey: the unadapted row's
_OUTSIDE = 0.5  # percent of the documents, above and below, that may lie outside where there are many


def draw(path: str, title: str, meter: Meter, along: Meter) -> None:
    """Write the picture as PNG.

    Args:
        meter: sums by document.
        along: sums by piece of the stream, all of equal length.
    """
    plot = pyplot("--plot")
    lines = math.ceil(len(along.rows) / _LEGEND_COLUMNS)
    figure, (above, below) = plot.subplots(2, 1, sharex=True, figsize=(9, 6.5 + 0.2 * lines), height_ratios=(3, 2))
    tokens = int(along.tokens.sum())
    pieces = len(along.bytes)
    edges = np.arange(pieces + 1) * (tokens / pieces)
    size = np.where(along.bytes > 0, along.bytes, np.nan)
    for row, name in enumerate(along.rows):
        bpb = along.nats[row] / math.log(2) / size
        above.stairs(bpb, edges, color=_colour(row), label=f"{name}: {meter.score(row).bpb:.4f}", baseline=None)
    above.set_ylabel("bits per byte")
    above.set_title(title, fontsize="medium")

    known = meter.bytes > 0
    middle = (np.cumsum(meter.tokens) - meter.tokens / 2)[known]
    n_bytes = meter.bytes[known]
    faint = 0.8 if known.sum() <= _MOST_MARKERS else 0.25
    area = np.clip(60 * n_bytes / n_bytes.max(initial=1), 3, None)
    shown = []
    for row in range(1, len(meter.rows)):
        gain = (meter.nats[0] - meter.nats[row])[known] / math.log(2) / n_bytes
        colour = _colour(row)
        below.scatter(middle, gain, area, color=colour, alpha=faint, linewidths=0)
        below.axhline(meter.score(row).gain_bpb, color=colour, linewidth=1, linestyle="--")
        shown.append(gain)
    below.axhline(0, color="0.55", linewidth=1)
    if shown and known.sum() > _MOST_MARKERS:
        low, high = np.percentile(np.concatenate(shown), (_OUTSIDE, 100 - _OUTSIDE))
        below.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))
    below.set_ylabel("gain of each document\n(bits per byte)")
    below.set_xlabel("tokens of the stream")
    below.set_xlim(0, tokens)
    names = above.get_legend_handles_labels()
    beneath = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2)}  # inside, many presets hide what they scored
    below.legend(*names, **beneath, fontsize="small", ncols=_LEGEND_COLUMNS, frameon=False)
    write_png(path, figure)


def _colour(row: int) -> str:
    return _COLOURS[(row - 1) % len(_COLOURS)] if row else "0.55"
