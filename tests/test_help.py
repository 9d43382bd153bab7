"""What is said before any work: commands, help, versions; and how soon."""

import subprocess
import sys

import pytest

from slotfast import __main__, __version__

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
        (["artifact", "shw"], "error: command 'shw': expected show or convert; see --help\n"),
    ],
)
def test_what_is_not_there_is_one_line_and_exit_code_2(arguments, message):
    done = _slotfast(*arguments)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)


def test_names_are_imported_when_they_are_used():
    code = "import sys, slotfast; assert 'torch' not in sys.modules and 'adapt' in dir(slotfast); slotfast.adapt"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="module 'slotfast' has no attribute 'adopt'"):
        __import__("slotfast").adopt  # noqa: B018
