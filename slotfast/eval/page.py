"""--report: an evaluation as a page to look at."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..command import page
from ..command.page import INK, MARKERS, PAPER, SERIES, Html
from ..contest import CONDITIONS, LEGEND
from ..data import Tokenizer, TokenStream
from ..score import Meter
from ..words import counted
from .inputs import Inputs
from .loop import PIECES, SlidingPass
from .report import spent, table

_EXTREMES = 5  # documents that are shown at either end
_FEWEST_BYTES = 500  # of a document among them, where enough have as many
_OPENING_TOKENS, _OPENING_LETTERS = 48, 110
_MOST_POINTS = 400  # of a line
_PIECES = PIECES // 4  # of the stream, a step each
_PHASES = {
    "load": "reading model and text",
    "compile": "compiling",
    "forward": "forward",
    "score": "plain loss",
    "save": "saving progress",
    "learn": "rows that learn",
}


def write_page(path: str, found: Mapping[str, Any], inputs: Inputs, result: SlidingPass, command: str) -> None:
    """Write the page.

    Args:
        path: of the HTML file.
        found: the result, as `--json` has it.
        inputs: what was read.
        result: the pass, and the sums of all rows.
        command: that made it.
    """
    meter = result.meter
    opening = Opening(inputs.stream, inputs.tokenizer, meter.tokens)
    rows = found["presets"]
    parts = [
        page.section("Result", page.element("pre", table(found))),
        page.section("Gain by preset", _gains(rows)),
        page.section("Along the stream", _along(result.along)),
        page.section("Gain by document", *_documents(meter, opening)),
        page.section("Gain against seconds", _costs(found)),
        page.section("Where the time went", _seconds(found)),
        page.section("Compliance", _compliance(rows)),
        page.configuration(found["config"], command, found["versions"]),
    ]
    page.write_page(path, headline(found), parts)


def headline(found: Mapping[str, Any]) -> str:
    """The score of the model and, of the rows whose score is honest, of the best."""
    rows = found["presets"]
    best = min((row for row in rows if row["causal"]), key=lambda row: row["adapted"]["bpb"])
    adapted = "" if best is rows[0] else f", {best['adapted']['bpb']:.4f} with {best['preset']}"
    return f"{found['text']['source']}: {rows[0]['adapted']['bpb']:.4f} bits per byte{adapted}"


class Opening:
    """First words of a stream's documents.

    Args:
        stream, tokenizer: of the evaluation.
        tokens: int [documents], scored tokens of each.
    """

    def __init__(self, stream: TokenStream, tokenizer: Tokenizer, tokens: np.ndarray):
        self.stream, self.tokenizer = stream, tokenizer
        self.ends = 1 + np.cumsum(tokens)  # the stream's first token is charged to nobody

    def __call__(self, document: int) -> str:
        """Of document 0, 1, ..., in one line."""
        start = int(self.ends[document - 1]) if document else 0
        tokens = self.stream.read(start, min(start + _OPENING_TOKENS, int(self.ends[document])))
        words = " ".join(self.tokenizer.decode([int(token) for token in tokens]).split())
        return words if len(words) <= _OPENING_LETTERS else words[:_OPENING_LETTERS].rstrip() + " ..."


def _gains(rows: Sequence[Mapping[str, Any]]) -> Html:
    """Dots with bars of two standard errors, a row each."""
    if len(rows) < 2:
        return Html()
    shown = list(enumerate(rows))[1:]

    def draw(axes: Any) -> None:
        axes.axvline(0, color=INK, linewidth=0.8)
        for place, (number, row) in enumerate(shown):
            adapted, colour = row["adapted"], _colour(number)
            axes.errorbar(
                adapted["gain_bpb"],
                place,
                xerr=_two_errors(adapted),
                fmt=_marker(number),
                color=colour,
                ecolor=colour,
                markersize=8,
                markerfacecolor=colour if row["causal"] else "none",
                elinewidth=2,
                capsize=5,
                capthick=2,
            )
            said = f"{adapted['gain_bpb']:+.4f}" + ("" if row["causal"] else "  NOT causal")
            above = {"textcoords": "offset points", "xytext": (0, 9), "ha": "center", "fontsize": 9}
            above["bbox"] = {"facecolor": PAPER, "edgecolor": "none", "pad": 0.5}
            axes.annotate(said, (adapted["gain_bpb"], place), **above)
        axes.set_yticks(range(len(shown)), [_short(row["preset"]) for _, row in shown])
        axes.set_ylim(len(shown) - 0.5, -0.65)
        axes.margins(x=0.15)
        axes.grid(axis="x")
        axes.set_xlabel("bits per byte less than none, the model unadapted")

    says = "Gain over none, token by token. Bars: two standard errors, clustered by document"
    says += "; none where there is a single document." if shown[0][1]["adapted"]["gain_se"] is None else "."
    if not all(row["causal"] for row in rows):
        says += " Hollow: the score has seen its own tokens."
    return page.picture(draw, says, height=1.1 + 0.55 * len(shown))


def _along(along: Meter) -> Html:
    """A step line for each row, of fewer pieces than are kept: many lines are to be told apart."""
    edges = np.arange(_PIECES + 1) * (int(along.tokens.sum()) / _PIECES)
    n_bytes = along.bytes.reshape(_PIECES, -1).sum(-1)
    nats = along.nats.reshape(len(along.rows), _PIECES, -1).sum(-1)
    size = np.where(n_bytes > 0, n_bytes, np.nan)

    def draw(axes: Any) -> None:
        for row, name in enumerate(along.rows):
            bpb = nats[row] / math.log(2) / size
            how = {"color": _colour(row), "label": _short(name), "linestyle": _dash(row)}
            axes.stairs(bpb, edges, baseline=None, linewidth=1.5, **how)
        axes.set_xlim(0, edges[-1])
        axes.set_xlabel("tokens of the stream")
        axes.set_ylabel("bits per byte")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.grid(axis="y")
        _legend(axes, along.rows)

    return page.picture(draw, f"Bits per byte in each of {_PIECES} pieces of equal length.", height=3.8)


def _documents(meter: Meter, opening: Opening) -> list[Html]:
    """Every document's gain in order of size, and the first words of those at both ends."""
    known = np.flatnonzero(meter.bytes > 0)
    if len(meter.rows) < 2 or len(known) < 2:
        return []
    gains = (meter.nats[0] - meter.nats[1:])[:, known] / math.log(2) / meter.bytes[known]
    dots = len(known) <= 60

    def draw(axes: Any) -> None:
        share = np.linspace(0, 100, len(known))
        axes.axhline(0, color=INK, linewidth=0.8)
        for number, values in enumerate(gains, 1):
            ordered = np.sort(values)[::-1]
            kept = np.unique(np.linspace(0, len(known) - 1, _MOST_POINTS).round().astype(int))
            marker = _marker(number) if dots else ""
            how = {"color": _colour(number), "label": _short(meter.rows[number]), "linestyle": _dash(number)}
            axes.plot(share[kept], ordered[kept], marker=marker, markersize=4.5, linewidth=1.4, **how)
        axes.set_xlabel(f"percent of {counted(len(known), 'document')}, those that gain most first")
        axes.set_ylabel("gain, bits per byte")
        axes.set_xlim(-1, 101)
        axes.grid(axis="y")
        _legend(axes, meter.rows[1:])

    drawn = page.picture(draw, "Gain of each document; each line has an order of its own.", height=3.4)
    return [drawn, *(_extremes(meter, row, known, gains[row - 1], opening) for row in range(1, len(meter.rows)))]


def _extremes(meter: Meter, row: int, known: np.ndarray, gains: np.ndarray, opening: Opening) -> Html:
    long = meter.bytes[known] >= _FEWEST_BYTES
    enough = long.sum() >= 2 * _EXTREMES
    among = np.flatnonzero(long) if enough else np.arange(len(known))
    order = among[np.argsort(-gains[among], kind="stable")]
    ends = [*order[:_EXTREMES], *order[max(_EXTREMES, len(order) - _EXTREMES) :]]
    lines = [
        (
            f"{known[at] + 1:,}",
            f"{meter.bytes[known[at]]:,}",
            f"{meter.nats[0, known[at]] / math.log(2) / meter.bytes[known[at]]:.4f}",
            f"{gains[at]:+.4f}",
            page.element("bdi", opening(int(known[at]))),
        )
        for at in ends
    ]
    title = f"{meter.rows[row]}: the documents that gain most and least"
    if enough and len(among) < len(known):
        title += f", of those of {_FEWEST_BYTES} bytes or more"
    heads = ("document", "bytes", "bpb of none", "gain", "first words")
    return page.folded(title, page.table(heads, lines, range(4)), shown=row == 1)


def _costs(found: Mapping[str, Any]) -> Html:
    """What each row gains, and how long an evaluation with it alone takes."""
    rows = found["presets"]
    if len(rows) < 2:
        return Html()
    seconds = [spent(found, row)[1] for row in rows]

    def draw(axes: Any) -> None:
        axes.axhline(0, color=INK, linewidth=0.8)
        for number, (row, x) in enumerate(zip(rows, seconds, strict=True)):
            adapted, colour = row["adapted"], _colour(number)
            axes.errorbar(
                x,
                adapted["gain_bpb"],
                yerr=_two_errors(adapted),
                fmt=_marker(number),
                color=colour,
                markersize=8,
                markerfacecolor=colour if row["causal"] else "none",
                elinewidth=1.5,
                capsize=4,
                label=_short(row["preset"]),
            )
        if max(seconds) > 20 * max(min(seconds), 1e-9):
            axes.set_xscale("log")
        elif max(seconds) > 2 * min(seconds):
            axes.set_xlim(0, 1.1 * max(seconds) or 1.0)
        axes.margins(x=0.15, y=0.15)
        axes.set_xlabel("seconds of an evaluation with that row alone: forward, plain loss, adaptation")
        axes.set_ylabel("gain, bits per byte")
        axes.grid()
        _legend(axes, [row["preset"] for row in rows])

    says = "Up is better, left is quicker. Where rows share work, the first one pays for it."
    return page.picture(draw, says, height=3.6)


def _seconds(found: Mapping[str, Any]) -> Html:
    seconds, rows = dict(found["seconds"]), found["presets"]
    total, adapt = seconds.pop("total"), seconds.pop("adapt", 0.0)
    parts = {_PHASES.get(name, name): value for name, value in seconds.items()}
    own = {f"adaptation: {_short(row['preset'])}": row["seconds"] for row in rows if row.get("seconds")}
    parts |= own if own else {"adaptation": adapt}
    parts["the rest"] = max(0.0, total - sum(parts.values()))
    bars = {name: value for name, value in parts.items() if value >= 0.0005 * total}

    def draw(axes: Any) -> None:
        axes.barh(range(len(bars)), list(bars.values()), color=SERIES[1], height=0.62)
        for place, value in enumerate(bars.values()):
            beside = {"textcoords": "offset points", "xytext": (5, 0), "va": "center"}
            axes.annotate(f"{value:.2f} s, {value / total:.0%}", (value, place), **beside)
        axes.set_yticks(range(len(bars)), list(bars))
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_ylim(len(bars) - 0.5, -0.5)
        axes.set_xlim(0, 1.2 * max(bars.values()))
        axes.set_xlabel("seconds")

    where = f"on {found['device']}" + (f", the first of {found['ranks']} ranks" if found["ranks"] > 1 else "")
    peak = found["peak_memory_bytes"] / 2**20
    says = f"{total:.1f} s in all {where}; at most {peak:,.0f} MiB of memory."
    return page.picture(draw, says, height=0.8 + 0.34 * len(bars))


def _compliance(rows: Sequence[Mapping[str, Any]]) -> Html:
    def mark(holds: bool) -> Html:
        return page.element("span", "yes" if holds else "NO", class_="good" if holds else "bad")

    names = [name for name in CONDITIONS if name.lower() in rows[0]["compliance"]]
    lines = [(row["preset"], *(mark(row["compliance"][name.lower()]) for name in names), row["why"]) for row in rows]
    shown = page.table(("preset", *names, "why"), lines)
    said = "Computed from each preset's choices; slotfast audit measures it. " + LEGEND + "."
    return Html(shown + page.element("p", said, class_="said"))


def _legend(axes: Any, names: Sequence[str]) -> None:
    """Above the axes, where it hides nothing, in as many columns as fit."""
    columns = max(1, min(len(names), 110 // (7 + max(len(_short(name)) for name in names))))
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, fontsize=9, borderaxespad=0.2)


def _colour(row: int) -> str:
    return SERIES[(row - 1) % (len(SERIES) - 1) + 1] if row else SERIES[0]


def _marker(row: int) -> str:
    return MARKERS[row % len(MARKERS)]


def _dash(row: int) -> str:
    """Of a line: colours come again behind the seventh row."""
    return "-" if row < len(SERIES) else "--"


def _two_errors(adapted: Mapping[str, Any]) -> float | None:
    return None if adapted["gain_se"] is None else 2 * adapted["gain_se"]


def _short(name: str) -> str:
    """A preset's name, as far as a picture has room for it."""
    return name if len(name) <= 34 else name[:32] + "..."
