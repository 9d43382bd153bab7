"""The README keeps its word: its commands are there for CI, its flags exist, its figures are committed results."""

import json
import re
from pathlib import Path

from slotfast.config import (
    AuditSettings,
    BundleSettings,
    CalibrateSettings,
    EvalSettings,
    RecordSettings,
    TrainSettings,
)
from slotfast.learn import parse_row

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "bench" / "results" / "amd-epyc-2-threads"


def _results(name):
    return json.loads((RESULTS / name).read_text())


def test_the_two_commands_are_marked():
    assert re.findall(r"<!-- command: (\w+) -->\n```bash\n.+\n```", README) == ["evaluate", "test"]


def test_every_flag_and_preset_exists():
    commands = {
        "eval": EvalSettings,
        "train": TrainSettings,
        "audit": AuditSettings,
        "calibrate": CalibrateSettings,
        "bundle": BundleSettings,
        "record": RecordSettings,
    }
    for module, settings in commands.items():
        flags = {"--" + name.strip("_").replace("_", "-") for name in settings.model_fields} | {"--help"}
        for command in re.findall(rf"slotfast[. ]{module} (--[^#\n]*)", README):
            assert set(re.findall(r"--[a-z0-9-]+", command)) <= flags, command
    for names in re.findall(r"slotfast[. ]eval .*?--preset ([^#\n]*)", README):
        for name in names.split(" --")[0].split():
            parse_row(name)


def test_the_shown_run_is_the_committed_one():
    found = _results("eval.json")
    assert found["text"]["sha256"][:12] in README and f"{found['artifact_bytes']:,} bytes" in README
    assert f"{found['windows']} windows, {found['windows_per_second']:.1f} a second" in README
    for row in found["presets"]:
        shown = re.search(rf"^{row['preset']} +([\d.]+)(?: +([+-][\d.]+) +([\d.]+))? +yes$", README, re.M)
        adapted = row["adapted"]
        assert shown[1] == f"{adapted['bpb']:.4f}"
        if row["preset"] != "none":
            assert shown[2] == f"{adapted['gain_bpb']:+.4f}" and shown[3] == f"{adapted['gain_se']:.4f}"


def test_the_forward_is_the_committed_one():
    for row in _results("forward.json")["cases"].values():
        assert f"| {row['ratio']:.1f} | {row['ceiling']:.1f} |" in README


def test_the_story_is_the_committed_one():
    rows = {row["preset"]: row for row in _results("eval-story.json")["presets"]}
    for name, row in rows.items():
        shown = re.search(rf"^\| `{name}`: .*?\| ([\d.]+) \| (?:\*\*([+-][\d.]+)\*\*)? ?\| (.+) \|$", README, re.M)
        assert shown[1] == f"{row['adapted']['bpb']:.4f}"
        assert name == "none" or shown[2] == f"{row['adapted']['gain_bpb']:+.4f}"
        assert shown[3] == ("yes" if row["causal"] else "**no**")


def test_the_ablation_is_the_committed_one():
    docs = (ROOT / "docs" / "adaptation.md").read_text(encoding="utf-8")
    found = _results("eval-ablation.json")
    assert " ".join(found["config"]["preset"]) in docs.replace("\\\n  ", "")
    for row in found["presets"]:
        adapted = row["adapted"]
        shown = re.search(
            rf"^\| `{re.escape(row['preset'])}`: .*?\| ([\d.]+) \| ([+-][\d.]+)? \| ([\d.]+)? \|$", docs, re.M
        )
        assert shown[1] == f"{adapted['bpb']:.4f}" and row["causal"]
        assert row["preset"] == "none" or shown[2] == f"{adapted['gain_bpb']:+.4f}"
        assert row["preset"] == "none" or shown[3] == f"{adapted['gain_se']:.4f}"


def test_the_fits_times_are_the_committed_ones():
    found = _results("solve.json")
    assert f"| {found['shared']['published']['median_ms']:,.0f} | 1 |" in README
    for name in ("shared", "windows"):
        assert f"| {found[name]['ours']['median_ms']:.1f} | {found[name]['ratio']:.0f} |" in README
