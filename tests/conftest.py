"""Chooses, before any test imports a kernel, how kernels run: compiled where there is a GPU, else interpreted."""

import os
import signal
import subprocess
import sys
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores: threads of each would wait for one another. Read when torch is imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from .audit_seeds import STATED

if not torch.cuda.is_available():
    # Triton reads this when a kernel is decorated, that is at import of a kernel module.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def compiling():
    """Runs Python in the checkout, in a process that compiles kernels where this one interprets; gives its output."""
    pytest.importorskip("triton", minversion="3.3", reason="ahead-of-time compilation with alignments")
    root = Path(__file__).resolve().parents[1]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(root)

    def run(*arguments):
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        return done.stdout

    return run


@pytest.fixture
def interruptible():
    """Ctrl-C raises KeyboardInterrupt, whatever started the tests: shells have it ignored in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def tiny_model():
    """A random model with every part, in evaluation mode: V = 64, length 32."""
    from tests.models import randomised

    config = dict(
        vocab_size=64,
        seq_len=32,
        layers=3,
        width=16,
        heads=2,
        kv_heads=1,
        mlp_width=24,
        rope_dims=4,
        bigram_buckets=32,
        bigram_width=8,
        value_width=8,
        value_layers=(2,),
    )
    return randomised(config, spread=0.5)


# Files whose tests take most of the time: processes, compilers, the interpreter, or many reruns of a loop
SLOW = set(
    "artifact_fuzz artifact_sizes audit_catalogue audit_command audit_mechanisms audit_own banded_attention "
    "bias_cross_entropy bundle catalogue compiled eval eval_loop examples fit_launched forward help int6_matmul "
    "kernel_lbfgs kernels kernels_folder lbfgs learn optim packaging ptx public quantize ranks resume slot_solve "
    "static_report systems train trainer ttt".split()
)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.stem.removeprefix("test_") in SLOW:
            item.add_marker(pytest.mark.slow)


def pytest_report_header():
    return STATED


def pytest_terminal_summary(terminalreporter):
    """What the auditor says about published mechanisms, as a table."""
    lines = [
        text
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, [])
        for name, text in report.user_properties
        if name == "mechanism"
    ]
    if lines:
        terminalreporter.section("published mechanisms under the auditor")
        terminalreporter.write_line(STATED)
        for line in lines:
            terminalreporter.write_line(line)
