"""--plot: bits per byte along the stream, and what each document gained."""

import math
from collections.abc import Collection, Mapping

import numpy as np

from ..command.plots import pyplot, write_png
from ..score import Meter

_LEGEND_COLUMNS = 3
_MOST_MARKERS = 2000  # above it a share of the documents is drawn fainter
_COLOURS = [f"C{number}" for number in range(10) if number != 7]  # C7 is a grey: the unadapted row's
_OUTSIDE = 0.5  # percent of the documents, above and below, that may lie outside where there are many


def draw(
    path: str,
    title: str,
    meter: Meter,
    along: Meter,
    spent: Mapping[str, tuple[np.ndarray, float]] | None = None,
    leaking: Collection[str] = (),
) -> None:
    """Write the picture as PNG.

    Args:
        meter: sums by document.
        along: sums by piece of the stream, all of equal length.
        spent: of rows that learn, by name: seconds by piece of the stream, and forwards a token; drawn below the rest.
        leaking: rows that are not causal, by name.
    """
    plot = pyplot("--plot")
    lines = math.ceil(len(along.rows) / _LEGEND_COLUMNS)
    heights = (3, 2, 1.5) if spent else (3, 2)
    size_inches = (9, 4 + sum(heights) / 2 + 0.2 * lines)
    figure, axes = plot.subplots(len(heights), 1, sharex=True, figsize=size_inches, height_ratios=heights)
    above, below, last = axes[0], axes[1], axes[-1]
    tokens = int(along.tokens.sum())
    pieces = len(along.bytes)
    edges = np.arange(pieces + 1) * (tokens / pieces)
    size = np.where(along.bytes > 0, along.bytes, np.nan)
    for row, name in enumerate(along.rows):
        bpb = along.nats[row] / math.log(2) / size
        label = f"{name}: {meter.score(row).bpb:.4f}"
        if spent and name in spent:
            label += f", {spent[name][1]:.1f} forwards"
        label += ", NOT causal" * (name in leaking)
        above.stairs(bpb, edges, color=_colour(row), label=label, baseline=None)
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
    below.set_ylabel("gain in bits per byte:\ndots documents, dashed all")
    for name, (seconds, _) in (spent or {}).items():
        row = meter.rows.index(name)
        last.stairs(np.cumsum(seconds), edges, color=_colour(row), baseline=None)
    if spent:
        last.set_ylabel("seconds of\nlearning so far")
        last.set_ylim(bottom=0)
    last.set_xlabel("tokens of the stream")
    last.xaxis.set_major_formatter("{x:,.0f}")
    below.set_xlim(0, tokens)
    names = above.get_legend_handles_labels()
    beneath = {
        "loc": "upper center",
        "bbox_to_anchor": (0.5, -0.3 if spent else -0.2),
    }  # inside, many presets hide what they scored
    last.legend(*names, **beneath, fontsize="small", ncols=_LEGEND_COLUMNS, frameon=False)
    write_png(path, figure)


def _colour(row: int) -> str:
    return _COLOURS[(row - 1) % len(_COLOURS)] if row else "0.55"
