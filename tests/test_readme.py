"""README and docs keep their word: commands for CI, flags that exist, figures of committed results, links."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from bench import picture
from slotfast.config import (
    AuditSettings,
    BundleSettings,
    CalibrateSettings,
    EvalSettings,
    RecordSettings,
    TrainSettings,
)
from slotfast.kernels import specs
from slotfast.learn import parse_row

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
BOOK = "\n".join([README, *DOCS.values()]).replace("\\\n", "")
PAGES = [
    *(ROOT / "docs").glob("*.md"),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "kernels/README.md")),
]
RESULTS = ROOT / "bench" / "results" / "amd-epyc-2-threads"


def _results(name):
    return json.loads((RESULTS / name).read_text())


def test_the_two_commands_are_marked():
    assert re.findall(r"<!-- command: (\w+) -->\n```bash\n.+\n```", README) == ["evaluate", "test"]


def test_the_readme_is_short_and_the_book_has_contents():
    assert len(README.splitlines()) <= 120
    for name in DOCS.keys() - {"README"}:
        assert f"]({name}.md)" in DOCS["README"], name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    """Results that stand beside figures among them; a heading that is linked exists too."""
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http://", "https://")):
            continue
        path, _, heading = link.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), link
        assert found.is_relative_to(ROOT), link
        if heading:
            headings = re.findall(r"^#+ (.+)$", found.read_text(encoding="utf-8"), re.M)
            names = {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings}
            assert heading in names, link
    for name in re.findall(r"bench/results/[\w./-]+\.jsonl?", text):
        assert (ROOT / name).exists(), name


def test_the_small_rest_of_an_install_is_that_of_the_setup():
    """What is to be installed by hand where torch comes from elsewhere and triton not at all."""
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    needed = re.findall(r'^ {8}"([a-z]+)[<>=]', setup.partition("install_requires=[")[2].partition("]")[0], re.M)
    (line,) = re.findall(r"`pip install (numpy [^`]+)`", DOCS["commands"])
    assert set(line.split()) == set(needed) - {"torch", "triton"}


def test_every_kernel_has_a_picture():
    sections = re.findall(r"^## (.+)\n([^#]*)", DOCS["kernels"], re.M)
    for spec in specs():
        assert any(f"`{spec.name}`" in title and "══▶" in body for title, body in sections), spec.name


def test_the_picture_is_drawn_from_the_committed_result():
    found = json.loads(picture.RESULT.read_text())
    drawn = picture.draw(found)
    assert picture.PICTURE.read_text(encoding="utf-8") == drawn
    ElementTree.fromstring(drawn)
    for row in found["ways"].values():
        assert f"{row['bpb']:.4f}" in drawn and f"{row['seconds']:.3g} s" in drawn


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
        for command in re.findall(rf"slotfast[. ]{module} (--[^#\n`]*)", BOOK):
            assert set(re.findall(r"--[a-z0-9-]+", command)) <= flags, command
    for names in re.findall(r"slotfast[. ]eval .*?--preset ([^#\n]*)", BOOK):
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
        assert f"| {row['ratio']:.1f} | {row['ceiling']:.1f} |" in DOCS["stream"]


def test_the_audit_that_is_read_is_the_committed_one():
    found = json.loads((ROOT / "bench" / "results" / "audit-pr1350.json").read_text())
    loop, page = found["loops"][0], DOCS["audit"]
    for test in loop["tests"]:
        assert re.search(rf"^  .{{8}}  {test['name']} +{test['verdict']} ", page, re.M), test["name"]
    for said in (loop["leaks"][0]["text"], found["summary"]):
        assert said in page
    assert loop["leaks"][0]["looks_like"] in " ".join(page.split())


def test_the_story_is_the_committed_one():
    rows = {row["preset"]: row for row in _results("eval-story.json")["presets"]}
    for name, row in rows.items():
        shown = re.search(rf"^\| `{name}`: .*?\| ([\d.]+) \| (?:\*\*([+-][\d.]+)\*\*)? ?\| (.+) \|$", README, re.M)
        assert shown[1] == f"{row['adapted']['bpb']:.4f}"
        assert name == "none" or shown[2] == f"{row['adapted']['gain_bpb']:+.4f}"
        assert shown[3] == ("yes" if row["causal"] else "**no**")


def test_the_ablation_is_the_committed_one():
    docs = DOCS["adaptation"]
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
    assert f"| {found['shared']['published']['median_ms']:,.0f} | 1 |" in DOCS["benchmarks"]
    for name in ("shared", "windows"):
        assert f"| {found[name]['ours']['median_ms']:.1f} | {found[name]['ratio']:.0f} |" in DOCS["benchmarks"]
