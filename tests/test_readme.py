"""The README keeps its word: its commands are there for CI, its flags exist, and its figures are those of the demo."""

import re
from pathlib import Path

from slotfast.config import EvalSettings, TrainSettings
from slotfast.slot import parse_preset

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_two_commands_are_marked():
    assert re.findall(r"<!-- command: (\w+) -->\n```bash\n.+\n```", README) == ["evaluate", "test"]


def test_every_flag_and_preset_exists():
    for module, settings in (("eval", EvalSettings), ("train", TrainSettings)):
        flags = {"--" + name.strip("_").replace("_", "-") for name in settings.model_fields} | {"--help"}
        for command in re.findall(rf"python -m slotfast\.{module} ([^#\n]*)", README):
            assert set(re.findall(r"--[a-z0-9-]+", command)) <= flags, command
    for names in re.findall(r"slotfast\.eval .*?--preset ([^#\n]*)", README):
        for name in names.split(" --")[0].split():
            parse_preset(name)


def test_the_story_adds_up():
    rows = dict(re.findall(r"^\| `([\w-]+)`: .*?\| ([\d.]+) \|", README, re.M))
    gains = dict(re.findall(r"^\| `([\w-]+)`: .*?\*\*([+-][\d.]+)\*\*", README, re.M))
    assert set(gains) == {"pr1350", "pr1350-window", "causal"}
    for name, gain in gains.items():
        assert abs(float(rows["none"]) - float(rows[name]) - float(gain)) < 2e-4
