"""One run of a loop in a process of its own: what it remembers from other runs cannot help it there."""

import contextlib
import multiprocessing
import sys
from multiprocessing.connection import Connection

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from . import checks
from .checks import Noise
from .inputs import Subject, load_score
from .record import Record, run_loop
from .report import Test
from .streams import Source, alter

_PLACES = (1 / 2, 7 / 8)  # of the stream, where its copies begin to differ


def fresh_process_test(score: str, subject: Subject, noise: float, rng: np.random.Generator) -> Test:
    """Compare first runs, each in a new process: of the stream, and of copies with another future.

    Args:
        score: package.module:function.
        noise: of the loop, nats.
    """
    tokens, vocab_size = subject.tokens, subject.vocab_size
    source = Source(tokens, vocab_size, subject.bos_id, rng)
    probes = [alter(source, tokens, "", "resample", max(2, int(share * len(tokens)))) for share in _PLACES]
    reference, *records = (_record(score, stream, vocab_size) for stream in (tokens, *(p.tokens for p in probes)))
    for probe, record in zip(probes, records, strict=True):
        moved = checks.moved_before(reference, record, probe.at, Noise(noise, noise), probe.same_shape)
        if moved:
            detail = f"other tokens from {probe.at} on move the score of token {moved.score} by {moved.by:.3g} nats"
            return Test("fresh processes", "FAIL", ("C1",), f"{len(probes)} altered streams", detail)
    return Test("fresh processes", "PASS", ("C1",), f"{len(probes)} altered streams")


def _record(score: str, tokens: Tensor, vocab_size: int) -> Record:
    context = multiprocessing.get_context("spawn")  # a forked process would remember too
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
            answer.send(run_loop(load_score(score), torch.from_numpy(tokens), vocab_size))
    except InputError as error:
        answer.send(str(error))
