"""The short table of a GPU campaign, from whatever figures there are."""

import json
import re
from pathlib import Path


def rows_of(path: Path) -> list[dict]:
    """Rows of JSON lines; none of a file that does not exist, and a last line that is cut off does not count."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def summary(folder: Path) -> list[str]:
    """A line a target; then what failed."""
    lines: list[str] = []
    for part in (_checked, _roofs, _solve, _evaluate, _kernels, _matmul, _attention, _compiled, _tests, _sweep):
        try:
            lines += part(folder)
        except (KeyError, ValueError, TypeError, ZeroDivisionError) as error:  # the archive still has every figure
            lines.append(f"{part.__name__[1:]}: no summary, {type(error).__name__}: {error}")
    for path in sorted(folder.glob("*.jsonl")):
        failed = [row for row in rows_of(path) if "failed" in row]
        for row in failed:
            what = ", ".join(str(value) for key, value in row.items() if key not in ("failed", "left_out"))
            lines.append(f"FAILED    {path.stem}: {what}: {row['failed']}".replace("\n", " ")[:200])
    return lines


def _checked(folder: Path) -> list[str]:
    lines = []
    for name, what in (("smoke", "agree with their references"), ("bitwise", "have the same bits again and alone")):
        rows = [row for row in rows_of(folder / f"{name}.jsonl") if "kernel" in row]
        if rows:
            good = [row for row in rows if "failed" not in row]
            lines.append(f"{name:9} {len(good)} of {len(rows)} kernels {what}")
    return lines


def _roofs(folder: Path) -> list[str]:
    rows = {row["roof"]: row for row in rows_of(folder / "roofs.jsonl") if "roof" in row and "failed" not in row}
    rates = [f"{name} {row['tflop_per_s']:.0f} TFLOP/s" for name, row in rows.items() if "tflop_per_s" in row]
    rates += [f"{name} {row['gb_per_s']:.0f} GB/s" for name, row in rows.items() if "gb_per_s" in row]
    return [f"roofs     {', '.join(rates)}"] if rates else []


def _solve(folder: Path) -> list[str]:
    rows = {row["what"]: row for row in rows_of(folder / "solve.jsonl") if "what" in row and "failed" not in row}
    published = rows["shared"]["ms_a_window"]["published"] if "shared" in rows else None
    lines = []
    for what, row in rows.items():
        us = row.get("us_a_window") or 1000 * row["ms_a_window"]["ours"]
        ratio = f", {1000 * published / us:.0f}x the published loop" if published else ""
        lines.append(f"P1        {what}: {us:.2f} us a window{ratio}")
    return lines


def _evaluate(folder: Path) -> list[str]:
    rows = [row for row in rows_of(folder / "evaluate.jsonl") if "tokens_per_second" in row and "warm_up" not in row]
    lines, plain = [], {row["forward"]: row for row in rows if row["preset"] == "none"}
    for row in rows:
        eight = row["projected_seconds_8gpu"]
        line = f"P7        {row['forward']}, {row['preset']}: {row['tokens_per_second']:,.0f} tokens/s"
        line += f", the contest's text in {8 * eight:.0f} s on one GPU, {eight:.0f} s on 8" if eight else ""
        if row["preset"] != "none" and row["forward"] in plain:
            ratio = plain[row["forward"]]["tokens_per_second"] / row["tokens_per_second"]
            line += f"; P9: costs {100 * (ratio - 1):.1f}%"
        lines.append(line)
    return lines


def _compiled(folder: Path) -> list[str]:
    lines = []
    for way in ("windows", "stream"):
        for row in [row for row in rows_of(folder / f"compiled-{way}.jsonl") if "ms_a_forward" in row]:
            eager = row["ms_a_forward"]["off"]["median_ms"]
            modes = [
                f"{row['ratio'][mode]:.2f}x {ran} (first call {row['first_s'][mode]:.0f} s)"
                for mode, ran in row["ran"].items()
                if mode == ran != "off"
            ]
            lines.append(
                f"P7        {way}, {row['blocks']} blocks: {eager:.2f} ms a forward; {', '.join(modes) or 'eager only'}"
            )
    return lines


def _kernels(folder: Path) -> list[str]:
    lines, by_case = [], {}
    for row in rows_of(folder / "cross-entropy.jsonl") + rows_of(folder / "other-kernels.jsonl"):
        if "device_ms" in row:
            case, _, who = row["name"].removeprefix("test_time[").removesuffix("]").rpartition("-")
            by_case.setdefault(case, {})[who] = row
    for case, rows in by_case.items():
        if ours := rows.pop("ours", None):
            ratios = "".join(f", {row['device_ms'] / ours['device_ms']:.2f}x {who}" for who, row in rows.items())
            took = f"{1000 * ours['device_ms']:.1f} us, {ours['percent_of_roof']:.0f}% of the copy roof"
            lines.append(f"P3 P4     {case}: {took}{ratios}")
    return lines


def _matmul(folder: Path) -> list[str]:
    lines, rows = [], [row for row in rows_of(folder / "matmul.jsonl") if "ratio" in row]
    for of, name in (("large", "P5 (1.8x)"), ("model", "P6 (.95x)")):
        chosen = [row for row in rows if row["of"] == of]
        if chosen:
            worst = min(chosen, key=lambda row: max(row["ratio"].values()))
            best, packed = max(worst["ratio"].values()), worst["ratio"]["int6"]
            shape = f"M {worst['m']}, N {worst['n']}, K {worst['k']}"
            lines.append(f"{name} least of {len(chosen)} shapes {best:.2f}x, packed alone {packed:.2f}x, at {shape}")
    return lines


def _attention(folder: Path) -> list[str]:
    rows = {row["who"]: row for row in rows_of(folder / "attention.jsonl") if "ms" in row}
    times = [f"{who} {row['ms']:.3f} ms" for who, row in rows.items()]
    return [f"attention {', '.join(times)}"] if times else []


def _tests(folder: Path) -> list[str]:
    lines = []
    for name in ("tests", "memcheck", "racecheck"):
        log = folder / f"{name}.log"
        text = log.read_text(errors="replace") if log.exists() else ""
        # pytest -v: "NAME OUTCOME [ 12%]"; with workers: "[gw3] [ 12%] OUTCOME NAME"
        found = re.findall(r"^(?:tests/\S.*|\[gw\d+\] \[ *\d+%\]) (PASSED|FAILED|ERROR|SKIPPED)", text, re.M)
        if found:
            counts = [f"{found.count(outcome)} {outcome.lower()}" for outcome in dict.fromkeys(found)]
            lines.append(f"{name:9} {', '.join(counts)}")
    return lines


def _sweep(folder: Path) -> list[str]:
    rows = [row for row in rows_of(folder / "sweep.jsonl") if "kernel" in row]
    timed = [row for row in rows if "gain" in row]
    lines = [
        f"sweep     {row['kernel']}, {row['case']}: {row['gain']:.2f}x by {row['best']} (now {row['current']})"
        for row in timed
        if row["gain"] > 1.03 + row["noise"]
    ]
    return [*lines, f"sweep     {len(timed)} of {len(rows)} cases timed"] if rows else []
