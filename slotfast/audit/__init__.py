"""python -m slotfast.audit: runs an evaluation loop on altered tokens and finds out whether it looks where it must not.

Four conditions make a score honest. C1: the distribution p_t of token t depends on the model and on tokens before t
only. C2: p_t is a distribution over the whole vocabulary, fixed before token t is looked at, and the charge is
-log p_t(token t). C3: a charge is fixed before any state uses its token. C4: one pass from left to right that charges
every token with a predecessor once. Besides, bits per byte need the right number of bytes.

Nothing that a loop says about itself is believed. It is run on a stream, and again on copies in which one token, or all
from some position on, are others; scores before the change must not move by more than reruns of one stream differ. What
moved is traced to one token. Copies differ at the borders of the loop's own events, at documents, windows, batches and
ranks, at the far end, and anywhere. Distributions, where the loop gives them, must sum to 1, hold the charge and stay
as they are when their own token changes; where it does not, tokens of the vocabulary are put in one position and what
they are charged must sum to 1, and on tokens that were drawn with known chances no bet against totals of at most 1 may
win. What there is no data for is UNTESTED, as C2 is where no complete total lies late in the stream: what takes most of
a stream to fill has no part in earlier ones.

A loop is a function of the stream, an int64 tensor [N], and a log. It keeps nothing between calls, and gives the same
scores for the same stream:

    from slotfast.audit import audit

    def score(tokens, log):
        state = new_state()
        for begin in range(1, len(tokens), 64):
            positions = torch.arange(begin, min(begin + 64, len(tokens)))
            logprobs = predict(state, tokens[: positions[-1]], positions)     # [n, V], for tokens at `positions`
            nll = -logprobs[torch.arange(len(positions)), tokens[positions]]
            log.score(positions, nll, logprobs=logprobs)                      # one event
            state = learn(state, tokens[positions])
            log.update(positions)

    report = audit(score, tokens, vocab_size=1024, bos_id=1)
    print(report)
    assert report.clean, report.failed

A loop that remembers can say again what it once said, wherever a stream begins alike, and so hide what it knew. It
is found out by `fresh=`, a function that makes the loop without a memory: `audit(make(), tokens, ..., fresh=make)`.

An audit can show a leak, not that there is none: it says how many pairs of a changed token and a watched score it has
covered, and what it could not reach. More seeds cover more. Text of the loop's own kind shows more than drawn tokens,
on which every choice between two fits falls the same way. What weights and files were made from cannot be seen by
running a loop: one that holds a table of the stream is causal. Nor can a leak that waits for a longer stream than this
one, or that knows an audit when it sees one.

`bytes=` in `log.score` gives what the loop counts each token as. A function that never calls the log and returns its
losses [N - 1] is fine too; then nothing can be said about order. From a shell, for a function in a module that can be
imported from here: `python -m slotfast.audit --score package.module:score --vocab-size 1024`.
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from .budget import Budget
from .checks import ByteRule, Test
from .engine import Auditor, Runs
from .first_runs import with_first_runs
from .log import Log, Loop, Record, kept_generators, run_loop
from .places import Hints
from .report import Report, judge
from .streams import Stream

__all__ = ["Hints", "Log", "Report", "Test", "audit"]


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
        seeds: of the altered streams; a round of everything for each.
        reruns: runs of the whole stream a round, about; default: 48, or for 0.3 s where a loop is quick.
        seconds: time for all rounds instead, about.
        fresh: makes the loop anew, without a memory of its runs: those that repeat what they said are found so.
        name: of the loop in the report.

    Returns:
        The report: `clean`, `failed`, `conditions`, `tests`, `leaks`; printing it gives a table.

    Raises:
        InputError: the loop failed, or reported what cannot be read.
    """
    stream = Stream.checked(tokens, vocab_size, bos_id)
    name = name or getattr(score, "__name__", "loop")
    report = audit_rows(
        lambda tokens, names: {name: run_loop(score, tokens, vocab_size)},
        [name],
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
        budget = Budget(48, 0.3, limit) if reruns is None else Budget(reruns, 0.0, limit)
    auditor = Auditor(run, names, stream, hints=hints, byte_rule=byte_rule, budget=budget)
    with kept_generators():
        found = auditor.audit(seeds)
    facts = {
        "seeds": list(map(int, seeds)),
        "runs": auditor.runs,
        "seconds": time.perf_counter() - begin,
        "ranks": auditor.hints.ranks,
    }
    return [judge(each, **facts) for each in found]
