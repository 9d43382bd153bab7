"""--report: an audit as a page to look at: what was changed, what moved, and what was not reached."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..command import page
from ..command.page import FAINT, INK, SERIES, Html
from ..words import counted
from .report import LEGEND

_MOST_OPEN = 3  # loops
_VERDICTS = {"PASS": "good", "FAIL": "bad"}
_KINDS = {
    "event border": "border of two events that charge",
    "inside an event": "inside an event",
    "window border": "border of two windows",
    "batch border": "border of two batches",
    "rank border": "border of two ranks",
    "document border": "border of two documents",
    "far end": "end of the stream",
    "cheap charge": "tokens charged little for how rare they are",
    "anywhere": "anywhere",
    "fresh stream": "whole streams of other tokens",
    "stream length": "shorter streams",
}


def write_page(path: str, result: Mapping[str, Any]) -> None:
    """Write the page.

    Args:
        path: of the HTML file.
        result: of the audit, as its certificate has it.
    """
    stream, loops = result["stream"], result["loops"]
    names = ", ".join(loop["loop"] for loop in loops)
    about = (
        f"The stream: {stream['source']}, {counted(stream['tokens'], 'token')}, SHA-256 {stream['sha256'][:12]}. "
        "Tokens of it were changed, the loop was run again, and its scores were compared."
    )
    parts = [
        page.verdict(result["verdict"] == "clean", result["summary"]),
        *(page.verdict(False, line) for line in result["disagreements"]),
        page.element("p", about),
        page.section("Conditions", _conditions(loops)),
        *(page.section(loop["loop"], *_shown(loop, stream["tokens"], len(loops))) for loop in loops),
        page.section("What was read", page.pairs(result["sha256"]) if result["sha256"] else ""),
        page.configuration(result["config"], result["command"], result["versions"]),
    ]
    page.write_page(path, f"Audit of {names}", parts)


def _conditions(loops: Sequence[Mapping[str, Any]]) -> Html:
    names = list(loops[0]["conditions"])
    rows = [
        (
            loop["loop"],
            *(_said(loop["conditions"][name]) for name in names),
            f"{loop['runs']:,}",
            f"{loop['seconds']:.1f}",
        )
        for loop in loops
    ]
    heads = ("loop", *names, "runs", "seconds")
    shown = page.table(heads, rows, (len(names) + 1, len(names) + 2))
    return Html(shown + page.element("p", LEGEND + ". UNTESTED: there was no data to say so.", class_="said"))


def _shown(loop: Mapping[str, Any], tokens: int, loops: int) -> list[Html]:
    """All of a loop; of many, what is clean is folded."""
    parts = _loop(loop, tokens)
    return [page.folded("clean", *parts)] if loops > _MOST_OPEN and loop["verdict"] == "clean" else parts


def _loop(loop: Mapping[str, Any], tokens: int) -> list[Html]:
    tests = [
        (", ".join(test["conditions"]), test["name"], _said(test["verdict"]), test["covered"], test["detail"])
        for test in loop["tests"]
    ]
    noise = loop["noise_floor_nats"]
    floor = "reruns of one stream differ without bound" if noise is None else f"noise floor {noise:.1e} nats"
    seeds = ", ".join(map(str, loop["seeds"]))
    return [
        page.table(("condition", "test", "verdict", "covered", "what was seen"), tests),
        page.element("h3", "What was changed"),
        _changed(loop["places"]),
        page.element("p", f"{counted(loop['runs'], 'run')}, seed {seeds}; {floor}.", class_="said"),
        page.element("h3", "What moved"),
        *(_moved(leak, tokens) for leak in loop["leaks"]),
        Html() if loop["leaks"] else page.element("p", "Nothing that must not." if loop["verdict"] == "clean" else ""),
        page.element("h3", "What was not reached"),
        page.bullets(loop["unreached"]),
    ]


def _changed(places: Mapping[str, int]) -> Html:
    """How many altered streams there were, by the kind of place that was altered."""
    ordered = sorted(places.items(), key=lambda item: -item[1])
    bars = {_KINDS.get(kind, kind): count for kind, count in ordered if count}
    if not bars:
        return Html()

    def draw(axes: Any) -> None:
        axes.barh(range(len(bars)), list(bars.values()), color=SERIES[1], height=0.62)
        for at, count in enumerate(bars.values()):
            axes.annotate(f"{count:,}", (count, at), textcoords="offset points", xytext=(5, 0), va="center")
        axes.set_yticks(range(len(bars)), list(bars))
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(bars) - 0.5, -0.5)
        axes.set_xlim(0, 1.1 * max(bars.values()))
        axes.set_xlabel("altered streams")

    return page.picture(draw, "Where tokens were changed.", height=0.8 + 0.3 * len(bars))


def _moved(leak: Mapping[str, Any], tokens: int) -> Html:
    """A leak in words and, where it was traced to one token, where that is and which score it moved."""
    words = page.element("p", leak["text"], class_="bad") + page.element("p", "Looks like: ", leak["looks_like"])
    moved = leak.get("moved")
    if not moved:
        return Html(words)
    token, score = leak["token"], moved["score"]

    def draw(axes: Any) -> None:
        axes.axhline(0, color=FAINT, linewidth=2)
        axes.plot([token], [0], "v", color=SERIES[2], markersize=10)
        axes.plot([score], [0], "o", color=SERIES[1], markersize=9)
        if token != score:
            angle = np.linspace(0, np.pi, 60)
            axes.plot((token + score) / 2 + (token - score) / 2 * np.cos(angle), 0.8 * np.sin(angle), color=INK)
        for at, said, below, colour in (
            (token, f"token {token} was changed", -20, SERIES[2]),
            (score, f"the score of token {score} moved", -34, SERIES[1]),
        ):
            side = "right" if at > tokens / 2 else "left"
            axes.annotate(said, (at, 0), textcoords="offset points", xytext=(0, below), ha=side, color=colour)
        axes.set_xlim(-0.02 * tokens, 1.02 * tokens)
        axes.set_ylim(-1.2, 1.0)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("tokens of the stream")

    drawn = page.picture(
        draw, f"First seen by: {leak['change']}, {_KINDS.get(leak['place'], leak['place'])}.", height=2
    )
    return Html(words + drawn)


def _said(verdict: str) -> Html:
    return page.element("span", verdict, class_=_VERDICTS.get(verdict, ""))
