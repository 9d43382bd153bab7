"""--report of slotfast record: several runs and what they are held against, as a page to look at."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from .command import page
from .command.page import INK, SERIES, Html
from .contest import LARGEST_P, LEGEND, THRESHOLD_NATS
from .words import counted


def write_page(path: str, found: Mapping[str, Any], why: str, config: Mapping[str, Any], argv: Sequence[str]) -> None:
    """Write the page.

    Args:
        path: of the HTML file.
        found: the contents of submission.json.
        why: it is no record; empty where it is one, or where nothing was compared.
        config: every setting.
        argv: the arguments that gave them.
    """
    comparison = found["comparison"]
    title = f"{found['name'] or found['preset']}: {found['val_bpb']:.4f} bits per byte"
    parts = [
        page.verdict(not why, f"No record: {why}." if why else "A record.") if comparison else "",
        page.section("Runs", _runs(found), _drawn(found)),
        page.section("Against the baseline", *_compared(comparison)) if comparison else "",
        page.section("Compliance", *_compliance(found)),
        page.section("What the runs say of themselves", page.bullets(found["notes"])),
        page.section("What they have in common", page.pairs(_common(found))),
        page.configuration(config, shlex.join(["slotfast", "record", *argv]), found["versions"]),
    ]
    page.write_page(path, title, parts)


def _runs(found: Mapping[str, Any]) -> Html:
    def line(name: object, loss: float, bpb: float, size: int | None = None, seconds: float | None = None) -> tuple:
        sized = "" if size is None else f"{size:,}"
        return name, f"{loss:.6f}", f"{bpb:.6f}", sized, "" if seconds is None else f"{seconds:.1f}"

    rows = [line("" if run["seed"] is None else run["seed"], *list(run.values())[1:]) for run in found["seed_results"]]
    rows.append(line(f"mean of {len(rows)}", found["val_loss"], found["val_bpb"]))
    if found["val_loss_std"] is not None:
        rows.append(line("standard deviation", found["val_loss_std"], found["val_bpb_std"]))
    return page.table(("seed", "nats a token", "bpb", "model bytes", "seconds"), rows, range(1, 5))


def _drawn(found: Mapping[str, Any]) -> Html:
    """Every run as a dot, the mean as a line, and what is to be beaten."""
    losses, comparison = [run["val_loss"] for run in found["seed_results"]], found["comparison"]

    def draw(axes: Any) -> None:
        axes.plot(losses, [0] * len(losses), "o", color=SERIES[1], markersize=8, alpha=0.75, label="a run")
        error = {"xerr": found["val_loss_std"] or 0.0, "capsize": 6, "elinewidth": 2, "capthick": 2}
        axes.errorbar(found["val_loss"], 0.55, fmt="D", color=SERIES[1], label="mean and standard deviation", **error)
        if comparison:
            base = comparison["baseline"]
            error["xerr"] = base["std"]
            axes.errorbar(base["mean"], 0.55, fmt="s", color=SERIES[2], label="baseline", **error)
            limit = base["mean"] - THRESHOLD_NATS
            axes.axvline(limit, color=INK, linestyle="--", linewidth=1, label=f"baseline less {THRESHOLD_NATS}")
        axes.set_ylim(-0.6, 1.1)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.margins(x=0.1)
        axes.grid(axis="x")
        axes.ticklabel_format(axis="x", useOffset=False)
        axes.set_xlabel("nats a token: left is better")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, fontsize=9)

    says = f"{counted(len(losses), 'run')} that differ in their seed alone."
    return page.picture(draw, says, height=2.1)


def _compared(comparison: Mapping[str, Any]) -> list[Html]:
    base = comparison["baseline"]
    values = {
        "baseline, nats a token": f"{base['mean']:.6f} ± {base['std']:.6f}, {counted(base['n'], 'run')}",
        "gain, nats a token": f"{comparison['gain_nats']:+.6f}",
        f"gain of more than {THRESHOLD_NATS}": f"t = {comparison['t']:.2f}, df = {comparison['df']:.1f}, "
        f"p = {comparison['p']:.2g}",
        "gain of more than 0": f"p = {comparison['p_any']:.2g}",
    }
    said = f"Welch's test, one-sided. A record is at least {THRESHOLD_NATS} nats a token better at p < {LARGEST_P}."
    return [page.pairs(values), page.element("p", said, class_="said")]


def _compliance(found: Mapping[str, Any]) -> list[Html]:
    told = "causal" if found["causal"] else f"NOT causal: {found['why']}"
    conditions = {name.upper(): "yes" if holds else "NO" for name, holds in found["compliance"].items()}
    return [
        page.verdict(found["causal"], f"{found['preset']}: {told}"),
        page.pairs(conditions),
        page.element("p", LEGEND + ".", class_="said"),
    ]


def _common(found: Mapping[str, Any]) -> dict[str, object]:
    names = (
        "preset",
        "text_sha256",
        "config_sha256",
        "bytes_code",
        "bytes_total",
        "date",
        "author",
        "github_id",
        "blurb",
    )
    row = ", ".join(f"{key} {value}" for key, value in found["resolved_preset"].items())
    return {name: found[name] for name in names if found[name] is not None} | {"row": row}
