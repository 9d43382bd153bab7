"""Rows that learn on two real processes, killed in the middle and started again: the pieces' own losses."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from slotfast.artifact import load_artifact
from slotfast.data import Text, Tokenizer, TokenStream, read_documents
from slotfast.eval.learning import LearningPass
from slotfast.learn import make_loop, parse_row
from slotfast.shipped import TOKENIZER

from .test_learn_eval import _args, small  # noqa: F401

ROWS = (
    "lora-1530:chunk=16,lr=0.01,rank=2,slots=2",
    "learn:chunk=16,lr=0.01,rank=2,keys=recompute",
    "learn:chunk=16,lr=0.01,rank=2,keys=refresh,every=2",
)
# `python -m slotfast.eval`, but that each chunk is saved, and that rank 1 dies in the middle of the second row
DYING = f"""
import os, sys
from slotfast.command import checkpoint
from slotfast.eval import resume
from slotfast.eval.__main__ import main

resume._SECONDS = resume._SHARE = 0
save = checkpoint.save

def dying(path, command, run, state):
    save(path, command, run, state)
    first, second, third = state["learners"]
    if os.environ["RANK"] == "1" and second["charged"] > 32:
        assert first["charged"] > 100 and not third["charged"]
        os.kill(os.getpid(), {signal.SIGKILL})

checkpoint.save = dying
main(sys.argv[1:])
"""


def test_pieces_on_two_processes_that_are_killed_and_go_on(small, tmp_path):  # noqa: F811
    (tmp_path / "dying.py").write_text(DYING)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    args = _args(small, "--preset", *ROWS, "--allow-noncausal", "--dtype", "float64")
    args += ["--resume", "c", "--json", "j", "--per-token", "t.npz"]
    options = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 300}
    options["env"] = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}

    killed = subprocess.run([*launcher, "dying.py", *args], **options)
    assert killed.returncode and "SIGKILL" in killed.stderr, killed.stderr[-4000:]
    assert {path.name for path in tmp_path.iterdir()} >= {"c", "c.rank1"} and not (tmp_path / "j").exists()
    done = subprocess.run([*launcher, "-m", "slotfast.eval", *args], **options)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "c.rank1: going on behind" in done.stderr

    found, losses = json.loads((tmp_path / "j").read_text()), np.load(tmp_path / "t.npz")
    model, tokenizer = load_artifact(small / "m").model().double(), Tokenizer(TOKENIZER)
    ids, _ = tokenizer.encode_documents(read_documents(str(small / "t.jsonl")))
    text = Text(TokenStream([ids]), tokenizer.byte_table, tokenizer.bos_id)
    assert found["ranks"] == 2 and len(found["presets"]) == 1 + len(ROWS)
    for number, name in enumerate(ROWS):
        row, result = parse_row(name), found["presets"][1 + number]
        parts = [
            LearningPass(make_loop(model, row, 64, 0, text.bos_id), [row], text, True, rank, 2).run()
            for rank in range(2)
        ]
        assert min(part.charged for part in parts) > 64
        nll = np.concatenate([part.nll[0] for part in parts])
        key = f"adapted_nll:{name}" if number else "adapted_nll"
        np.testing.assert_allclose(losses[key], nll, rtol=1e-6)  # kept in float32
        assert result["adapted"]["nats"] == pytest.approx(nll.sum(), rel=1e-9)
        nats = sum(part.meter.nats for part in parts)
        assert result["unlearned"]["bpb"] == pytest.approx(nats[0].sum() / np.log(2) / found["bytes"], rel=1e-9)
        work = sum(part.charged * part.forwards for part in parts) / len(nll)
        assert result["cost"]["forwards"] == pytest.approx(work, abs=1e-3)
        assert result["unlearned"]["gain_bpb"] > 0
