"""What is said before any work: commands, help, versions; and how soon."""

import importlib
import re
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import slotfast
from slotfast import __main__, __version__, config
from slotfast.command.run import EXIT_CODES
from slotfast.errors import InputError
from slotfast.slot import parse_preset

_SAY = """
import contextlib, io, runpy, sys
for name in sys.argv[2:]:
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
        sys.argv = ["slotfast", name, sys.argv[1]]
        runpy.run_module("slotfast", run_name="__main__", alter_sys=True)
    print(f"{name}: {said.getvalue().splitlines()[0]}")
print([name for name in ("torch", "triton") if name in sys.modules])
"""


def _slotfast(*arguments):
    return subprocess.run([sys.executable, "-m", "slotfast", *arguments], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("flag", "first"), [("--help", "usage: slotfast {}"), ("--version", f"slotfast {__version__}")]
)
def test_every_command_answers_without_torch(flag, first):
    names = ["eval", "audit", "train", "calibrate", "bundle", "record"]
    done = subprocess.run([sys.executable, "-c", _SAY, flag, *names], capture_output=True, text=True, check=True)
    *lines, loaded = done.stdout.splitlines()
    assert [line.startswith(f"{name}: {first.format(name)}") for line, name in zip(lines, names, strict=True)] == [
        True
    ] * 6
    assert loaded == "[]"


@pytest.mark.parametrize("name", ["eval", "train", "record"])
def test_help_is_there_at_once(name):
    """In time of the processor, which other work on the machine takes no part of; the better of two."""
    spent = []
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert not _slotfast(name, "--help").returncode
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(spent) < 1.5


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_without_a_command_there_is_a_list_of_them(arguments):
    done = _slotfast(*arguments)
    lines = [line.split(maxsplit=1) for line in done.stdout.splitlines() if line.startswith("  ")]
    assert done.returncode == 0 and [name for name, about in lines] == list(__main__.COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evl"], "error: evl: no such command; the nearest is eval\n"),
        (["zzz"], "error: zzz: no such command; see --help\n"),
        (["eval", "--strid", "3"], "error: --strid: no such flag; the nearest is --stride\n"),
        (["eval", "mine.txt"], "error: mine.txt: a value without a flag in front of it; see --help\n"),
        (["artifact", "shw"], "error: command 'shw': expected show or convert; see --help\n"),
    ],
)
def test_what_is_not_there_is_one_line_and_exit_code_2(arguments, message):
    done = _slotfast(*arguments)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)


def test_names_are_imported_when_they_are_used():
    code = (
        "import sys, slotfast; assert 'adapt' in dir(slotfast); slotfast.InputError; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert callable(slotfast.adapt) and "adapt" in vars(slotfast)
    with pytest.raises(AttributeError, match="module 'slotfast' has no attribute 'adopt'"):
        slotfast.adopt  # noqa: B018


CLASSES = [*config.Settings.__subclasses__(), config.ConvertSettings]


def _help(cls, capsys):
    with pytest.raises(SystemExit) as ended:
        config.load(cls, "slotfast", "about", ["--help"])
    assert not ended.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_help_shows_every_flag_once_in_groups_of_few(cls, capsys):
    text = _help(cls, capsys)
    assert max(map(len, text.splitlines())) <= 120
    shown = re.findall(r"^  (--[a-z0-9-]+)", text, re.M)
    fields = {name: field for name, field in cls.model_fields.items() if not field.json_schema_extra["positional"]}
    flags = ["--" + name.strip("_").replace("_", "-") for name in fields]
    assert sorted(shown) == sorted([*flags, "--version"])
    groups = re.split(r"^\S.*:$", text.split("\nexamples:")[0], flags=re.M)[1:]
    assert cls.GROUPS.keys() <= cls.model_fields.keys() and len(groups) == max(len(cls.GROUPS), 1) + 1
    assert all(len(re.findall(r"^  (?=\S)", group, re.M)) <= 23 for group in groups)
    for field in fields.values():
        if variable := field.json_schema_extra["env"]:
            assert re.search(rf"\[[^\]]*{variable}\]", text), variable
    for code, meaning in EXIT_CODES.items():
        assert f"  {code:<4} {meaning}\n" in text


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_help_fits_a_narrow_terminal(cls, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    groups = _help(cls, capsys).split("\nexamples:")[0].splitlines()[1:]  # the usage and examples are to be copied
    assert max(map(len, groups)) <= 60


def test_help_says_what_a_value_is(capsys):
    shown = {cls: _help(cls, capsys) for cls in (config.EvalSettings, config.AuditSettings, config.TrainSettings)}
    for cls, line in (
        (config.EvalSettings, "--text FILE"),
        (config.EvalSettings, "--data-path FOLDER"),
        (config.EvalSettings, "--tokens GLOB"),
        (config.EvalSettings, "--preset NAME [NAME ...]"),
        (config.EvalSettings, "--forward auto/windows/stream"),
        (config.EvalSettings, "--stride N"),
        (config.EvalSettings, "--budget X"),
        (config.EvalSettings, "--report FILE"),
        (config.AuditSettings, "--score FUNCTION"),
        (config.AuditSettings, "--seed N [N ...]"),
        (config.AuditSettings, "--device DEVICE"),
        (config.TrainSettings, "--out FILE"),
    ):
        assert f"\n  {line}" in shown[cls], line


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_the_examples_of_a_help_can_be_given(cls):
    assert len(cls.EXAMPLES) == 3
    for example in cls.EXAMPLES:
        config.load(cls, "", "", shlex.split(example, comments=True))


def test_the_docs_have_the_same_exit_codes():
    docs = (Path(__file__).parents[1] / "docs" / "commands.md").read_text(encoding="utf-8").replace("`", "")
    for code, meaning in EXIT_CODES.items():
        assert f"| {code} | {meaning} |\n" in docs


def test_only_what_is_near_is_suggested():
    for wrong, near in (
        ("--strid", "--stride"),
        ("--versio", "--version"),
        ("--jsn", "--json"),
        ("--batch", "--batch-windows"),
    ):
        with pytest.raises(InputError, match=f"^{wrong}: no such flag; the nearest is {near}$"):
            config.load(config.EvalSettings, "", "", [wrong])
    for wrong in ("--verbosity", "--quiet", "--output", "-x", "--tttx-x"):
        with pytest.raises(InputError, match=f"^{wrong}: no such flag; see --help$"):
            config.load(config.EvalSettings, "", "", [wrong])


def test_a_key_that_a_preset_lacks_is_answered_with_those_that_it_has():
    with pytest.raises(InputError, match="'foo' does nothing here; keys that do: .*") as error:
        parse_preset("causal:foo=1")
    keys = str(error.value).partition("keys that do: ")[2].split(", ")
    assert len(keys) == len(set(keys)) and {"scale", "decay", "clamp"} <= set(keys)


def test_a_harness_that_is_not_installed_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval._cli", None)
    with pytest.raises(
        InputError, match=r"slotfast.harness needs lm_eval 0.4.10 or newer: pip install 'slotfast\[harn"
    ):
        importlib.import_module("slotfast.harness.__main__").main(["ls"])
