"""Two processes of one program, as torchrun would start them, without it."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
_ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2"}


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return str(taken.getsockname()[1])


def start_two(command, cwd, **more):
    """Python with such arguments, in two ranks; what they say on standard error is kept. `more` is environment."""
    ranks = []
    for rank in ("0", "1"):
        environment = {**_ENV, "RANK": rank, "LOCAL_RANK": rank, **more}
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        ranks.append(subprocess.Popen([sys.executable, *command], env=environment, cwd=cwd, **pipes))
    return ranks
