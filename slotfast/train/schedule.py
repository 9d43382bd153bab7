"""What changes over a training: step sizes, momentum, and when the late parts begin."""

import math
from dataclasses import dataclass

from ..config import TrainSettings


@dataclass(frozen=True)
class Moment:
    """Where a training is.

    Args:
        left: steps until the end, by count or by the clock at the mean pace so far, whichever comes first.
        progress: 0..1.
        decay: share of the rates that the warm-down leaves, 1 before it begins.
        factor: of the rates, the rise at the start included.
        momentum: Muon's.
    """

    left: float
    progress: float
    decay: float
    factor: float
    momentum: float


def moment(settings: TrainSettings, step: int, elapsed: float) -> Moment:
    """The schedule before step `step` (from 0), `elapsed` seconds after the start.

    Without a time limit nothing depends on `elapsed`: the run can be repeated bit by bit.
    """
    left = math.inf if settings.steps is None else float(settings.steps - step)
    if settings.seconds and step:
        left = min(left, (settings.seconds - settings.reserve - elapsed) / (elapsed / step))
    left = max(left, 0.0)
    total = step + left
    progress = step / total if total else 1.0
    warmdown = settings.warmdown * (total if settings.warmdown < 1 else 1.0)
    decay = 1.0
    if warmdown and left < warmdown:
        decay = max(left / warmdown, settings.min_lr)
    rise = min((step + 1) / settings.rise_steps, 1.0) if settings.rise_steps else 1.0
    way = min(step / settings.muon_momentum_steps, 1.0) if settings.muon_momentum_steps else 1.0
    momentum = settings.muon_momentum_start + way * (settings.muon_momentum - settings.muon_momentum_start)
    return Moment(left, progress, decay, min(rise, decay), momentum)
