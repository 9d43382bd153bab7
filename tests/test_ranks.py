"""Several processes: they leave nothing behind, and one that ends is not the others' fault."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .two_ranks import ROOT, free_port, start_two

PROGRAM = """
import os
import torch
import torch.distributed as dist
from slotfast.command.ranks import join_ranks

with join_ranks("cpu") as worker:
    total = torch.ones(1)
    dist.all_reduce(total)
    import torch.distributed.nn.functional  # as torch itself does, some time or other
names = [open(f"/proc/self/task/{thread}/comm").read().strip() for thread in os.listdir("/proc/self/task")]
assert total == worker.world == 2 and not [name for name in names if "gloo" in name], names
"""
LEAVING = """
import torch
import torch.distributed as dist
from slotfast.command.ranks import join_ranks
from slotfast.command.run import run_command
from slotfast.errors import InputError

def main():
    with join_ranks("cpu") as worker:
        dist.barrier()
        if worker.rank:
            raise InputError("mine.txt: this one cannot go on")
        dist.all_reduce(torch.ones(1))

run_command(main)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads the names of threads from /proc")
def test_a_group_ends_with_its_threads(tmp_path):
    """Threads of gloo that are there when Python ends abort it, now and then, although everything is done."""
    (tmp_path / "program.py").write_text(PROGRAM)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*launcher, str(tmp_path / "program.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]


def test_a_process_that_waits_for_one_that_ended_says_so_in_a_line(tmp_path):
    """Whose own line is not buried under the traceback of a connection that broke off."""
    ranks = start_two(["-c", LEAVING], tmp_path, MASTER_PORT=free_port())
    waiting, leaving = (rank.communicate(timeout=120)[1] for rank in ranks)
    assert "error: mine.txt: this one cannot go on\n" in leaving
    assert waiting.endswith("error: rank 0: another process, which it waited for, has ended; that one says why\n")
    assert "Traceback" not in waiting and [rank.returncode for rank in ranks] == [2, 2]
