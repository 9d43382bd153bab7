"""Welch's one-sided test of whether one sample of runs has a lower loss than another, and by how much."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .contest import LARGEST_P, THRESHOLD_NATS
from .errors import InputError
from .words import counted


@dataclass(frozen=True)
class Sample:
    """Losses of several runs in nats a token: mean, standard deviation (None for one run), number of runs."""

    mean: float
    std: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Sample":
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


@dataclass(frozen=True)
class Comparison:
    """Welch's test against a baseline.

    Args:
        gain_nats: baseline's mean less ours, nats a token.
        t, df: statistic of the gain over the threshold, and its degrees of freedom.
        p: of the hypothesis that the gain is at most the threshold.
        p_any: of the hypothesis that there is none.
    """

    baseline: Sample
    gain_nats: float
    t: float
    df: float
    p: float
    p_any: float

    @property
    def is_record(self) -> bool:
        return self.gain_nats >= THRESHOLD_NATS and self.p < LARGEST_P


def upper_tail(t: float, df: float) -> float:
    """Probability that Student's t with `df` >= 1 degrees of freedom exceeds t.

    The integral of the density, which x = sqrt(df) / tan(angle) turns into that of sin(angle)^(df - 1), by
    Gauss-Legendre quadrature: relative error below 1e-6, and below 1e-10 from df = 2.
    """
    nodes, weights = np.polynomial.legendre.leggauss(200)
    half = math.atan2(math.sqrt(df), t) / 2
    integral = half * float(weights @ np.sin(half * (nodes + 1)) ** (df - 1))
    return math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(math.pi) * integral


def compare(ours: Sample, baseline: Sample) -> Comparison:
    """Welch's one-sided test of whether ours has a lower loss.

    Raises:
        InputError: a sample of one run, or no spread at all.
    """
    if ours.std is None or baseline.std is None:
        raise InputError(f"{counted(ours.n, 'run')} against {baseline.n}: a test needs at least 2 on both sides")
    parts = ours.std**2 / ours.n, baseline.std**2 / baseline.n
    variance = sum(parts)
    if not variance:
        raise InputError("no spread between the runs of either side: nothing to test with")
    df = variance**2 / (parts[0] ** 2 / (ours.n - 1) + parts[1] ** 2 / (baseline.n - 1))
    gain, error = baseline.mean - ours.mean, math.sqrt(variance)
    t = (gain - THRESHOLD_NATS) / error
    return Comparison(baseline, gain, t, df, upper_tail(t, df), upper_tail(gain / error, df))
