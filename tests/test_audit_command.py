"""python -m slotfast.audit: our presets, anybody's loop, what is printed, and how it ends."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from slotfast import config
from slotfast.artifact import Artifact, write_artifact
from slotfast.audit.__main__ import main
from slotfast.data import write_shard
from slotfast.errors import InputError
from slotfast.slot import PRESETS


@pytest.fixture(scope="module")
def small(tmp_path_factory, tiny_model):
    """An artifact of a random model with the demo's tokenizer."""
    from slotfast.model import GPT

    torch.manual_seed(0)
    model = GPT(tiny_model.config.model_copy(update={"vocab_size": 1024})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1)
    path = tmp_path_factory.mktemp("small") / "small.slotfast"
    write_artifact(path, Artifact.from_model(model, {}))
    return ["--artifact", str(path), "--seq-len", "16", "--reruns", "8", "--budget", "2"]


def _exit(arguments):
    try:
        main(arguments)
    except SystemExit as end:
        return end.code
    return 0


def test_the_command_audits_our_presets(small, tmp_path, capsys):
    certificate = tmp_path / "c.json"
    assert _exit([*small, "--preset", "none", "causal", "--certificate", str(certificate)]) == 0
    out = capsys.readouterr().out
    assert out.rstrip().endswith("no leak found") and "denominator" in out and "C2 PASS" in out
    found = json.loads(certificate.read_text())
    assert found["verdict"] == "clean" and {"slotfast", "artifact", "tokenizer"} == set(found["sha256"])
    assert found["command"].startswith("python -m slotfast.audit --artifact") and found["versions"]["torch"]
    assert [loop["loop"] for loop in found["loops"]] == ["none", "causal"] and found["loops"][0][
        "noise_floor_nats"
    ] == 0
    assert found["loops"][1]["tests"][1]["pairs"] > 1000 and len(found["stream"]["sha256"]) == 64


def test_the_command_finds_the_leaky_preset(small, capsys):
    arguments = ["--stride", "2", "--max-tokens", "112", "--preset", "pr1350", "--json", "-"]
    assert _exit([*small, *arguments]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == "leak" and found["disagreements"] == []
    assert found["loops"][0]["conditions"]["C1"] == "FAIL" and found["loops"][0]["computed_causal"] is False


def test_a_preset_that_is_not_what_it_says_is_an_error(small, capsys, monkeypatch):
    honest = PRESETS["pr1350"].compliance.__class__(why="so it says")
    monkeypatch.setattr(type(PRESETS["pr1350"]), "compliance", honest)
    assert _exit([*small, "--stride", "2", "--max-tokens", "112", "--preset", "pr1350", "--batch-windows", "32"]) == 1
    assert "ERROR: preset 'pr1350': its choices say causal (so it says); measured, it leaks" in capsys.readouterr().out


LOOPS = """
import atexit
import os
import sys

import torch

print("a line of its own")

def clean(tokens, log):
    log.score(range(1, len(tokens)), torch.full((len(tokens) - 1,), 3.0).double().fill_(torch.tensor(16.0).log()))

def future(tokens, log):
    return torch.full((len(tokens),), 1.0 + float(tokens[-1] % 2))

memory = {}

def remembers(tokens, log):
    # knows the future of the first stream of its process, and repeats itself wherever a stream begins alike
    nll, ids = [0.0], tuple(tokens.tolist())
    for t in range(1, len(ids)):
        nll.append(memory.setdefault(ids[: t + 1], 2.8 + 0.01 * (sum(ids) % 10)))
    return torch.tensor(nll)

def broken(tokens, log):
    raise KeyError("no weights")

def leaves(tokens, log):
    sys.exit(0)

def vanishes(tokens, log):
    os._exit(0)

def fails_and_vanishes(tokens, log):
    atexit.register(os._exit, 0)
    raise KeyError("no weights")

def one_argument(tokens):
    return torch.zeros(len(tokens))

def counts_bytes(tokens, log):
    ids = torch.arange(1, len(tokens))
    log.score(ids, torch.full((len(ids),), 16.0).log(), bytes=1 + tokens[1:] % 3)

def rule(tokens):
    return 1 + tokens % 3

def other_rule(tokens):
    return 1 + tokens % 4

def no_rule(tokens):
    return tokens / 2

class Holder:
    score = staticmethod(clean)

number = 3
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "my_loops.py").write_text(LOOPS)
    (tmp_path / "my_broken.py").write_text("import nothing_like_this")
    (tmp_path / "my_exit.py").write_text("import sys; sys.exit(0)")
    (tmp_path / "my_end.py").write_text("import os; os._exit(0)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_loops", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def test_anybodys_loop_from_a_shell(here):
    command = [sys.executable, "-m", "slotfast.audit", "--vocab-size", "16", "--max-tokens", "60", "--budget", "0.2"]
    environment = {"PYTHONPATH": str(Path(config.__file__).parents[2]), "PATH": ""}

    def run(*arguments):
        return subprocess.run([*command, *arguments], cwd=here, env=environment, capture_output=True, text=True)

    clean = run("--score", "my_loops:clean", "--json", "-")
    assert clean.returncode == 0 and json.loads(clean.stdout)["verdict"] == "clean", clean.stderr
    assert "auditing my_loops:clean on altered copies of drawn tokens, 60 tokens: for about 0.2 s\n" in clean.stderr
    assert "a line of its own" in clean.stderr and "my_loops.py" in json.loads(clean.stdout)["sha256"]
    broken = run("--score", "my_loops:broken")
    assert broken.returncode == 2 and broken.stderr.splitlines()[-1].startswith("error: the loop failed at my_loops.py")
    assert "Traceback" not in broken.stderr
    assert run("--score", "my_loops:fails_and_vanishes").returncode == 2
    hidden = run("--score", "my_loops:remembers", "--fresh-process")
    assert (
        hidden.returncode == 1 and "altered streams; other tokens from 30 on move the score of token 1" in hidden.stdout
    )


def test_exit_codes_and_what_is_shown(here, capsys):
    small = ["--vocab-size", "16", "--max-tokens", "60", "--budget", "0.2"]
    assert _exit([*small, "--score", "my_loops:future"]) == 1
    out = capsys.readouterr().out
    assert "LEAK: changing token 59 moves the score of token 1 " in out and "LEAK in my_loops:future" in out
    assert _exit([*small, "--score", "my_loops:Holder.score"]) == 0
    assert "no leak found; UNTESTED: bytes" in capsys.readouterr().out
    # without a process of its own, a loop that repeats itself hides what it knows
    _exit([*small, "--score", "my_loops:remembers", "--json", "-"])
    assert json.loads(capsys.readouterr().out)["loops"][0]["conditions"]["C1"] == "PASS"
    with pytest.raises(InputError, match="the loop failed at my_loops.py, line .*KeyError: 'no weights'"):
        main([*small, "--score", "my_loops:broken", "--traceback"])
    assert "Traceback" in capsys.readouterr().err


MODELS = """
import os
import sys

import torch

def vanishes():
    os._exit(0)

class LeavesLater(torch.nn.Module):
    def forward(self, ids):
        if ids.shape[0] > 1:  # the batches of the evaluation
            sys.exit(0)
        return torch.zeros(*ids.shape, 1024)
"""


@pytest.mark.parametrize("flag", ["--score", "--model"])
def test_code_that_ends_its_process_is_never_a_success(here, flag):
    (here / "my_models.py").write_text(MODELS)
    environment = {"PYTHONPATH": str(Path(config.__file__).parents[2]), "PATH": ""}
    module, small, names = {
        "--score": (
            "audit",
            ["--vocab-size", "16", "--max-tokens", "60", "--budget", "0.1"],
            ["loops:vanishes", "end:f"],
        ),
        "--model": ("eval", ["--seq-len", "32", "--stride", "16"], ["models:vanishes", "models:LeavesLater"]),
    }[flag]
    for name in names:
        command = [sys.executable, "-m", f"slotfast.{module}", flag, f"my_{name}", *small]
        done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True)
        last = done.stderr.splitlines()[-1]
        assert done.returncode == 2 and last.startswith("error: ") and "ended the process" in last, (name, done.stderr)
        assert "Traceback" not in done.stderr


def test_a_budget_that_is_too_small_is_said(here, capsys):
    (here / "my_slow.py").write_text(
        "import time, torch\n"
        "def f(tokens, log):\n"
        "    time.sleep(0.05)\n"
        "    return torch.full((len(tokens),), 2.772588722239781)\n"
    )
    assert _exit(["--score", "my_slow:f", "--vocab-size", "16", "--max-tokens", "60", "--budget", "0.01"]) == 0
    assert re.search(r"--budget 0.01: the least that is asked, \d+ runs, took \d+ s", capsys.readouterr().err)


def test_a_byte_rule_of_anybodys(here, capsys):
    small = ["--score", "my_loops:counts_bytes", "--vocab-size", "16", "--max-tokens", "60", "--budget", "0.1"]
    assert _exit([*small, "--byte-rule", "my_loops:rule"]) == 0
    assert "bytes PASS" in capsys.readouterr().out
    assert _exit([*small, "--byte-rule", "my_loops:other_rule"]) == 1
    assert "bytes FAIL" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"--byte-rule my_loops:no_rule: returned float32 \[60\], expected integers"):
        main([*small, "--byte-rule", "my_loops:no_rule"])


WRONG = {
    "a file": (["--score", "sub/my_loops.py:clean", "--vocab-size", "16"], "--score sub.my_loops:clean$"),
    "a file elsewhere": (["--score", "../lib/my_loops.py:clean"], r"--score my_loops:clean in \.\./lib$"),
    "a loop that leaves": (["--score", "my_loops:leaves", "--vocab-size", "16"], r"ended the process: sys.exit\(0\)"),
    "a module that leaves": (["--score", "my_exit:f"], r"importing my_exit ended the process: sys.exit\(0\)"),
    "one argument": (
        ["--score", "my_loops:one_argument", "--vocab-size", "16"],
        r"cannot be called as loop\(tokens, log\): TypeError: one_argument\(\) takes 1",
    ),
    "a byte rule for our own": (["--byte-rule", "my_loops:rule"], "the model has its own"),
    "no function": (["--score", "my_loops"], "expected package.module:function"),
    "no module": (["--score", "my_loop:clean"], "my_loop cannot be imported: ModuleNotFoundError"),
    "a module that fails": (["--score", "my_broken:clean"], "nothing_like_this"),
    "no such function": (["--score", "my_loops:dirty"], "my_loops has no dirty"),
    "a number": (["--score", "my_loops:number"], "is int, expected a function"),
    "no vocabulary": (["--score", "my_loops:clean"], "expected --vocab-size or --tokenizer"),
    "text without a tokenizer": (
        ["--score", "my_loops:clean", "--vocab-size", "16", "--text", "x"],
        "expected --tokenizer beside it",
    ),
    "a model for somebody else's loop": (["--score", "my_loops:clean", "--artifact", "x"], "loads its own model"),
    "a vocabulary for our own": (["--vocab-size", "16"], "the model has its own"),
    "an unknown preset": (["--preset", "casual"], "the nearest is causal"),
    "a batch that splits a preset's": (["--preset", "pr1350", "--batch-windows", "8"], "expected a multiple of 32"),
    "a misspelt flag": (["--scores", "x"], "the nearest is --score"),
    "nowhere to write": (["--certificate", "no/where.json"], "cannot be written"),
    "a certificate to standard output": (["--certificate", "-"], "--certificate -: expected a file"),
    "a stride beyond the window": (["--seq-len", "8", "--stride", "9"], "stride"),
    "processes for our own": (["--fresh-process"], "is for --score"),
    "a BOS outside": (
        ["--score", "my_loops:clean", "--vocab-size", "16", "--bos-id", "16"],
        "--bos-id 16: expected 0 to 15",
    ),
}


def test_the_contest_s_documents_must_have_its_bytes(here, capsys):
    write_shard(here / "val_000000.bin", np.tile([1, 400], 50_000))
    demo = str(Path(config.__file__).parents[1] / "demo" / "demo.model")
    arguments = ["--score", "my_loops:clean", "--tokenizer", demo, "--tokens", "val_*.bin", "--budget", "0.2"]
    assert _exit([*arguments, "--max-tokens", "60"]) == 1
    out = capsys.readouterr().out
    assert "50,000 documents" in out and "the contest's validation set has 151,070,000 to 151,080,000" in out


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_input_is_one_clear_line(here, arguments, message):
    with pytest.raises(InputError, match=message) as caught:
        main(arguments)
    assert "\n" not in str(caught.value)


def test_variables_are_read_and_known(here, monkeypatch, capsys):
    monkeypatch.setenv("SLOT_ENABLED", "1")
    main(["--show-config"])
    out = capsys.readouterr()
    assert "--certificate" in out.out and "nothing reads" not in out.err
