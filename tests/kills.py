"""Killing a command that saves its progress, for tests that start it again."""

import os
import signal
import subprocess
import time

import numpy as np

TIMES = int(os.environ.get("SLOTFAST_KILLS", "1"))


def run_and_kill(command, saved, longest, **options):
    """Start a command TIMES times; kill -9 each up to `longest` seconds after it has saved something new."""
    random, kills = np.random.default_rng(int(time.time())), 0
    for _ in range(TIMES):
        seen = saved.stat().st_mtime_ns if saved.exists() else 0
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command, **quiet, **options)
        while process.poll() is None and not (saved.exists() and saved.stat().st_mtime_ns > seen):
            time.sleep(0.002)
        time.sleep(random.uniform(0, longest))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait(timeout=60)
    assert kills, "it was over before it could be killed"
