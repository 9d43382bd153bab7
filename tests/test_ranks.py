"""Several processes: they leave nothing behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
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


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads the names of threads from /proc")
def test_a_group_ends_with_its_threads(tmp_path):
    """Threads of gloo that are there when Python ends abort it, now and then, although everything is done."""
    (tmp_path / "program.py").write_text(PROGRAM)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*launcher, str(tmp_path / "program.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
