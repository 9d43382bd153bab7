"""One run of a loop in a process of its own."""

import contextlib
import multiprocessing
import sys
from multiprocessing.connection import Connection

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from .inputs import load_function
from .log import Record, run_loop


def run_in_process(score: str, tokens: Tensor, vocab_size: int) -> Record:
    """What package.module:function reports about a stream, int64 [N], in a new process.

    Raises:
        InputError: the loop failed there, or its process ended.
    """
    # A process forked from this one would remember too; one forked from a server that has imported slotfast, and no
    # loop, remembers nothing and starts at once
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    ours, theirs = context.Pipe()
    process = context.Process(target=_child, args=(theirs, score, tokens.numpy(), vocab_size, torch.get_num_threads()))
    process.start()
    theirs.close()
    try:
        found = ours.recv()
    except EOFError:
        process.join()
        raise InputError(f"--fresh-process: the loop's process ended with code {process.exitcode}") from None
    process.join()
    if isinstance(found, str):
        raise InputError(f"--fresh-process: {found}")
    return found


def _child(answer: Connection, score: str, tokens: np.ndarray, vocab_size: int, threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            answer.send(run_loop(load_function("--score", score), torch.from_numpy(tokens), vocab_size))
    except InputError as error:
        answer.send(str(error))
