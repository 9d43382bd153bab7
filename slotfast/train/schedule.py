"""What changes over a training: step sizes, momentum, and when the late parts begin."""

import math
from dataclasses import dataclass

from ..errors import InputError


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


@dataclass(frozen=True)
class Schedule:
    """When a training ends, and how its step sizes and Muon's momentum change on the way.

    Args:
        steps: to take at most; None: what the time allows.
        seconds, reserve: time of the training, and what of it is kept for later; 0 seconds: no limit.
        rise_steps: over which the rates rise.
        warmdown: last steps over which they fall; below 1, their share of all.
        min_lr: share of the rates that is left at the end.
        muon_momentum, muon_momentum_start, muon_momentum_steps: in the end, at first, and the steps in between.

    Raises:
        InputError: the training would not end, or not begin.
    """

    steps: int | None
    seconds: float
    reserve: float
    rise_steps: int
    warmdown: float
    min_lr: float
    muon_momentum: float
    muon_momentum_start: float
    muon_momentum_steps: int

    def __post_init__(self) -> None:
        if self.steps is None and not self.seconds:
            raise InputError("--seconds 0 without --steps: the training would not end")
        if self.seconds and self.reserve >= self.seconds:
            raise InputError(f"--reserve {self.reserve:g}: leaves nothing of --seconds {self.seconds:g}")

    def moment(self, step: int, elapsed: float) -> Moment:
        """Where the training is before step `step` (from 0), `elapsed` seconds after the start.

        Without a time limit nothing depends on `elapsed`: the run can be repeated bit by bit.
        """
        left = math.inf if self.steps is None else float(self.steps - step)
        if self.seconds and step:
            left = min(left, (self.seconds - self.reserve - elapsed) / (elapsed / step))
        left = max(left, 0.0)
        total = step + left
        progress = step / total if total else 1.0
        warmdown = self.warmdown * (total if self.warmdown < 1 else 1.0)
        decay = 1.0
        if warmdown and left < warmdown:
            decay = max(left / warmdown, self.min_lr)
        rise = min((step + 1) / self.rise_steps, 1.0) if self.rise_steps else 1.0
        way = min(step / self.muon_momentum_steps, 1.0) if self.muon_momentum_steps else 1.0
        momentum = self.muon_momentum_start + way * (self.muon_momentum - self.muon_momentum_start)
        return Moment(left, progress, decay, min(rise, decay), momentum)
