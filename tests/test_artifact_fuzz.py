"""Spoilt and hostile files in a process of their own, with limited memory; and writing that is killed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from slotfast.artifact import Artifact, write_artifact

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def test_mutants_of_every_form_are_refused_in_one_line():
    """`python -m tests.fuzz_artifacts` does the same with thousands."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("memory is limited by what Linux says of it")
    command = [sys.executable, "-m", "tests.fuzz_artifacts", "--count", "12", "--seed", "3"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert lines[0].startswith("21 bombs and pickles with code refused") and len(lines) == 13
    refused = [int(re.search(r"(\d+) of 12 mutants refused", line)[1]) for line in lines[1:]]
    assert sum(refused) > 100  # formats without a check sum cannot know all


# Children stop when a share of the file is written, or after all of it has its name, and are killed there.
KILLER = """
import os, signal, sys, time
from contextlib import contextmanager
from pathlib import Path
from slotfast.artifact import Artifact, format, read_artifact, write_artifact

class Stopping:
    def __init__(self, file, room):
        self.file, self.room = file, room
    def write(self, data):
        self.file.write(data[: self.room])
        self.file.flush()
        self.room -= len(data)
        if self.room <= 0:
            time.sleep(60)

at_once = format.atomic_write
path = Path(sys.argv[1])
artifact, size, inode = read_artifact(path), path.stat().st_size, path.stat().st_ino
for share in (0.0, 0.1, 0.5, 0.9, 1.0, 2.0):
    @contextmanager
    def stopping(path):
        with at_once(path) as file:
            yield Stopping(file, int(share * size))

    child = os.fork()
    if not child:
        format.atomic_write = stopping
        write_artifact(path, Artifact(artifact.config, artifact.tensors, {"number": 1}))
        time.sleep(60)
    part = path.with_name(f".{path.name}.{child}.part")
    while path.stat().st_ino == inode and (not part.exists() or part.stat().st_size < int(share * size)):
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print(share, part.exists(), read_artifact(path).metadata["number"])
"""


def test_a_killed_write_leaves_the_old_file_or_the_new(tmp_path, tiny_model):
    path = tmp_path / "a.slotfast"
    write_artifact(path, Artifact.from_model(tiny_model, {"number": 0}))
    command = [sys.executable, "-c", KILLER, str(path)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [line.split() for line in done.stdout.splitlines()]
    assert [number for *_, number in found] == ["0"] * 5 + ["1"]
    assert [part for _, part, _ in found] == ["True"] * 5 + ["False"]  # killed while they wrote, and after
