"""Audits of one loop, and of several that share their runs."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from .budget import Budget
from .checks import ByteRule
from .engine import Auditor, Runs
from .first_runs import with_first_runs
from .log import Loop, Record, kept_generators, run_loop
from .places import Hints
from .report import Report, judge
from .streams import Stream

RERUNS = 48  # of a round, where nobody says how many


def audit(
    score: Loop,
    tokens: torch.Tensor,
    vocab_size: int,
    *,
    byte_counts: Callable[[torch.Tensor], Any] | Sequence[int] | np.ndarray | torch.Tensor | None = None,
    bos_id: int | None = None,
    hints: Hints | None = None,
    seeds: Sequence[int] = (0,),
    reruns: int | None = None,
    seconds: float | None = None,
    fresh: Callable[[], Loop] | None = None,
    name: str | None = None,
) -> Report:
    """Audit an evaluation loop.

    Args:
        score: the loop, a function of the stream, int64 [N], and a `Log`.
        tokens: int [N], N >= 3, ids in 0..V-1; long enough for several of the loop's batches.
        vocab_size: V.
        byte_counts: bytes of every token by the rule: a function of a stream, int64 [N] -> int [N], or int [N] for
            this stream alone.
        bos_id: the token that starts a document, or None.
        hints: windows, batches and ranks, for loops whose events do not show them.
        seeds: of the altered streams; each gets a full round.
        reruns: about how many runs of the whole stream a round takes; default: 48, or as many as take 0.3 s if more.
        seconds: about how long all rounds may take, instead.
        fresh: makes the loop anew, without a memory of its runs; finds loops that repeat what they said before.
        name: of the loop in the report.

    Returns:
        The report: `clean`, `failed`, `conditions`, `tests`, `leaks`; printing it gives a table.

    Raises:
        InputError: the loop failed, or reported what cannot be read.
    """
    stream = Stream.checked(tokens, vocab_size, bos_id)
    called = name or str(getattr(score, "__name__", "loop"))
    report = audit_rows(
        lambda tokens, names: {called: run_loop(score, tokens, vocab_size)},
        [called],
        stream,
        byte_rule=_byte_rule(byte_counts),
        hints=hints,
        seeds=seeds,
        reruns=reruns,
        seconds=seconds,
    )[0]
    if fresh is None:
        return report

    def first_run(tokens: torch.Tensor) -> Record:
        return run_loop(fresh(), tokens, vocab_size)

    return with_first_runs(report, "fresh loops", first_run, stream, np.random.default_rng([*seeds, 1]))


def _byte_rule(counts: Any) -> ByteRule | np.ndarray | None:
    if callable(counts):
        return lambda tokens: np.asarray(counts(torch.from_numpy(tokens)))
    return None if counts is None else np.asarray(counts)


def audit_rows(
    run: Runs,
    names: Sequence[str],
    stream: Stream,
    *,
    byte_rule: ByteRule | np.ndarray | None,
    hints: Hints | None,
    seeds: Sequence[int],
    reruns: int | None = None,
    seconds: float | None = None,
    limit: float = math.inf,
) -> list[Report]:
    """Audit several loops that share every run; see `audit`, `Auditor` for `run`, `Budget` for `limit`."""
    begin, rounds = time.perf_counter(), len(seeds)
    if seconds is not None:
        budget = Budget(0, seconds / max(1, rounds))
    else:
        budget = Budget(RERUNS, 0.3, limit) if reruns is None else Budget(reruns, 0.0, limit)
    auditor = Auditor(run, names, stream, hints=hints, byte_rule=byte_rule, budget=budget)
    with kept_generators():
        found = auditor.audit(seeds)
    spent, numbers = time.perf_counter() - begin, list(map(int, seeds))
    return [judge(each, seeds=numbers, runs=auditor.runs, seconds=spent, ranks=auditor.hints.ranks) for each in found]
