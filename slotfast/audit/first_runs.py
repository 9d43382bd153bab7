"""First runs of loops made anew, where what a loop remembers from other runs cannot help it."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from torch import Tensor

from .checks import Test
from .checks.base import verdict_of
from .log import Record, kept_generators
from .moves import Noise, moved_before
from .report import MEMORY, Report
from .streams import Source, Stream, alter

_PLACES = (1 / 2, 7 / 8)  # of the stream, where its copies begin to differ


def with_first_runs(
    report: Report,
    name: str,
    run: Callable[[Tensor], Record],
    stream: Stream,
    rng: np.random.Generator,
) -> Report:
    """A report with one more test, which compares first runs on the stream and on copies with another future.

    Args:
        report: of the loop's other runs.
        name: of the test.
        run: gives a record of a stream by a loop that has run nothing before.
        stream: the given one.
    """
    source, tokens = Source(stream, rng), stream.tokens
    probes = [alter(source, tokens, "", "resample", max(2, int(share * len(tokens)))) for share in _PLACES]
    with kept_generators():
        reference, *records = (run(each) for each in (tokens, *(probe.tokens for probe in probes)))
    noise, detail = report.noise if np.isfinite(report.noise) else 0.0, ""
    for probe, record in zip(probes, records, strict=True):
        moved = moved_before(reference, record, probe.at, Noise(noise, noise), probe.same_shape)
        if moved and not detail:
            detail = f"other tokens from {probe.at} on move the score of token {moved.score} by {moved.by:.3g} nats"
    test = Test(name, verdict_of(detail), ("C1",), f"{len(probes)} altered streams", detail)
    looks_like = "a memory of what was said before each token, which repeats itself wherever a stream begins alike"
    if report.conditions["C1"] == "FAIL":
        looks_like = (
            "the leak above, seen again by loops that have run nothing before: it needs no memory of other runs"
        )
    leak = {"relation": name, "text": f"{name}: {detail}", "looks_like": looks_like}
    return replace(
        report,
        tests=[*report.tests, test],
        leaks=[*report.leaks, *([leak] if detail else [])],
        unreached=[kind for kind in report.unreached if kind != MEMORY],
    )
