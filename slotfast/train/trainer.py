"""The training loop: gradients, optimisers, schedule, averages, checkpoints; on one process or on several ranks."""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..command.progress import Progress
from ..compiled import Compiled
from ..data import TokenStream
from ..errors import InputError
from ..loader import Loader
from ..model import GPT
from ..optim import WeightAverage, average_gradients
from ..words import counted
from ..worker import ALONE, Worker
from . import qat
from .optimizers import Optimization, build_optimizers
from .schedule import Moment, Schedule

_CHECK_STEPS_GPU = 10  # reading the loss makes a GPU wait; on a CPU it is read in every step


@dataclass(frozen=True)
class Training:
    """How a model is trained.

    Args:
        schedule, optimization: how large the steps are, and what takes them.
        micro_windows: windows that a rank computes at once; None: all of its share.
        warmup_steps: untimed steps whose effect is undone.
        average: "none", "ema" or "swa", the running mean of the weights that is kept in the end.
        ema_decay: of the exponential mean.
        swa_every, swa_from: steps between two weights of the equal mean, and the share of the rates below which it
            begins.
        qat: "off", "straight" or "soft", how the matrices are rounded to 6 bits late in the training.
        qat_from: share of the rates below which that begins.
        loop_at: share of the training after which the model's loop runs.
        compile: "on" compiles the forward, where it can be; "auto" does on a GPU.
        log_every, val_every: steps between two lines, and between two measurements; 0: none.
        checkpoint_steps, checkpoint_seconds: between two saves, whichever comes first.
    """

    schedule: Schedule
    optimization: Optimization
    micro_windows: int | None
    warmup_steps: int
    average: str
    ema_decay: float
    swa_every: int
    swa_from: float
    qat: str
    qat_from: float
    loop_at: float
    compile: str
    log_every: int
    val_every: int
    checkpoint_steps: int
    checkpoint_seconds: float


class Trainer:
    """Trains a model in place.

    Args:
        model: on the worker's device.
        loader: windows of all ranks.
        training: what to do.
        worker: this process; its dtype is that of Muon's iteration too.
        on_save: called on every rank with `state_dict` and the step whenever the state should be saved.
        on_validate: called on every rank every `val_every` steps; gives named numbers, which `measured` keeps.
        hurry: whether the state should be saved behind this step already; ranks must agree.
        log: prints a line, on rank 0.
    """

    def __init__(
        self,
        model: GPT,
        loader: Loader,
        training: Training,
        worker: Worker = ALONE,
        on_save: Callable[[dict[str, Any], int], None] | None = None,
        on_validate: Callable[[], dict[str, float]] | None = None,
        hurry: Callable[[], bool] = lambda: False,
        log: Callable[[str], None] = print,
    ):
        self.model, self.loader, self.training = model, loader, training
        self.worker, self.device = worker, torch.device(worker.device)
        self.on_save, self.on_validate, self.hurry, self.log = on_save, on_validate, hurry, log
        self.group = dist.group.WORLD if worker.world > 1 else None
        on_gpu = worker.on_gpu
        compiles = training.compile == "on" or (on_gpu and training.compile == "auto")
        # torch's own defaults: the forward takes more than one form
        self.forward = Compiled(model, "on" if compiles else "off", self.device, options={})
        self.muon, self.adam = build_optimizers(model, training.optimization, worker.dtype, self.group)
        self.average = None
        if training.average != "none":
            decay = training.ema_decay if training.average == "ema" else None
            self.average = WeightAverage(model.parameters(), decay)
        self.soft = qat.SoftRound(self.device)
        self.check_steps = _CHECK_STEPS_GPU if on_gpu else 1
        self.step, self.elapsed = 0, 0.0
        self.saved_step, self.saved_at = None, 0.0
        self.qat_step: int | None = None  # at which the rounding began
        self.loss_mean = torch.full((), math.nan, device=self.device)
        self.history: list[dict[str, float]] = []  # one entry for each line that was logged
        self.measured: list[dict[str, float]] = []  # one for each validation

    def run(self) -> None:
        """Train until the steps or the time are up, then put the averaged weights in place.

        Raises:
            InputError: the loss is no longer finite; the last checkpoint stays.
        """
        self._warm_up()
        schedule, self.saved_at = self.training.schedule, self.elapsed
        started = time.perf_counter() - self.elapsed
        # counts steps where their number is given, else seconds; the log prints the lines
        by_steps = schedule.steps is not None
        total = schedule.steps if by_steps else round(schedule.seconds - schedule.reserve)
        unit = "steps" if by_steps else "s"
        done = min(self.step if by_steps else round(self.elapsed), total)
        with Progress(total, done, unit, silent=self.worker.rank > 0, lines=False) as progress:
            while (now := schedule.moment(self.step, self.elapsed)).left:
                self._prepare(now)
                loss = self._update(self._next_batch())
                self.step += 1
                self.elapsed = self._agree(time.perf_counter() - started)
                self.loss_mean = loss if self.step == 1 else self.loss_mean.lerp(loss, 0.03)
                if self.average is not None and self._counts(now):
                    self.average.update()
                if progress.drawn:
                    loss_seen = self.step % self.check_steps == 0
                    note = f"step {self.step}, loss {float(self.loss_mean):.3f}" if loss_seen else ""
                    progress(min(self.step if by_steps else round(self.elapsed), total) - progress.done, note)
                paused = time.perf_counter()
                self._report(now)
                started += time.perf_counter() - paused  # measuring is not training
                self._save_if_due()
        self._check_loss()
        if self.step % self.training.log_every:
            self._log(now)
        if self.on_save and self.saved_step != self.step:
            self._save()
        qat.set_rounding(self.model, None)
        self.model.looping = True
        if self.average is not None:
            self.average.load_into_parameters()

    def _prepare(self, now: Moment) -> None:
        """Set what the schedule says: rates, momentum, repeated layers, rounding."""
        self._set_rates(now)
        self.model.looping = now.progress >= self.training.loop_at
        if self.training.qat == "off" or now.decay >= self.training.qat_from:
            return
        if self.qat_step is None:
            self.qat_step = self.step
            self.log(f"step:{self.step} the matrices are rounded to 6 bits from here on")
        self.soft.set_step(self.step - self.qat_step)
        qat.set_rounding(self.model, self.soft if self.training.qat == "soft" else qat.straight_through)

    def _set_rates(self, now: Moment) -> None:
        for group in (*self.muon.param_groups, *self.adam.param_groups):
            group["lr"] = group["rate"] * now.factor
        for group in self.muon.param_groups:
            group["momentum"] = now.momentum

    def _next_batch(self) -> Tensor:
        batch = self.loader.next_batch(self.worker.rank, self.worker.world)
        vocab_size = self.model.config.vocab_size
        if int(batch.max()) >= vocab_size:
            raise InputError(f"token id {batch.max()} in the training data; the tokenizer has {vocab_size} pieces")
        return batch.to(self.device)

    def _update(self, batch: Tensor) -> Tensor:
        """One step of both optimisers; the mean loss over all ranks."""
        loss = torch.zeros((), device=self.device)
        for part in batch.split(self.training.micro_windows or len(batch)):
            share = self.forward(part[:, :-1], part[:, 1:], self.worker.dtype) * (len(part) / len(batch))
            share.backward()
            loss += share.detach()
        adam_parameters = [p for group in self.adam.param_groups for p in group["params"]]
        optimization = self.training.optimization
        if optimization.clip:  # of this rank's own gradients, as published: their mean is not clipped again
            everything = optimization.clip_scope == "all"
            torch.nn.utils.clip_grad_norm_(
                list(self.model.parameters()) if everything else adam_parameters, optimization.clip
            )
        self.muon.start()
        if self.group is not None:
            average_gradients(adam_parameters, self.group)
            dist.all_reduce(loss, group=self.group)
            loss /= self.worker.world
        self.adam.step()
        self.muon.step()
        self.model.zero_grad(set_to_none=True)
        return loss

    def _counts(self, now: Moment) -> bool:
        """Whether the weights after this step go into the average."""
        if self.training.average == "ema":
            return True
        return now.decay < self.training.swa_from and self.step % self.training.swa_every == 0

    def _warm_up(self) -> None:
        """Run some steps in every form that the forward will take, so that each is compiled, and undo them."""
        steps, training = self.training.warmup_steps, self.training
        if not steps:
            return
        started, before = time.perf_counter(), copy.deepcopy(self.state_dict())
        self._set_rates(training.schedule.moment(0, 0.0))
        forms: list[tuple[bool, Callable | None]] = [(not self.model.config.loops, None)]
        if self.model.config.loops:
            forms.append((True, None))
        if training.qat != "off":
            forms.append((True, self.soft if training.qat == "soft" else qat.straight_through))
        for looping, rounding in forms:
            for _ in range(steps):
                self.model.looping = looping
                qat.set_rounding(self.model, rounding)
                self._update(self._next_batch())
        qat.set_rounding(self.model, None)
        self.load_state_dict(before)
        if self.worker.on_gpu:
            torch.cuda.synchronize()
        self.log(
            f"warm-up: {counted(steps * len(forms), 'step')} in {time.perf_counter() - started:.1f} s, undone and not "
            "timed"
        )

    def _agree(self, seconds: float) -> float:
        """Rank 0's time: ranks that went by clocks of their own would diverge."""
        if self.group is None:
            return seconds
        clock = torch.tensor(seconds, dtype=torch.float64, device=self.device)
        dist.broadcast(clock, 0, group=self.group)
        return float(clock)

    def _check_loss(self) -> None:
        loss = float(self.loss_mean)
        if not math.isfinite(loss) and self.step:
            kept = "" if self.saved_step is None else f"; the checkpoint of step {self.saved_step} is kept"
            raise InputError(f"loss {loss} at step {self.step}: lower --matrix-lr, --embed-lr or --scalar-lr{kept}")

    def _report(self, now: Moment) -> None:
        """After some steps: refuse a broken loss, log it, and measure the model on other text."""
        if self.step % self.check_steps == 0:
            self._check_loss()
        if self.step % self.training.log_every == 0:
            self._log(now)
        if self.on_validate and self.training.val_every and self.step % self.training.val_every == 0:
            found = self.on_validate()
            self.log(f"val step:{self.step} " + " ".join(f"{name}:{value:.4f}" for name, value in found.items()))
            self.measured.append({"step": self.step, **found})

    def _save_if_due(self) -> None:
        waited = self.elapsed - self.saved_at >= self.training.checkpoint_seconds or self.hurry()
        if self.on_save and (waited or self.step % self.training.checkpoint_steps == 0):
            self._save()

    def _save(self) -> None:
        self._check_loss()
        # The loss of the step that ruins the weights is still finite.
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.model.parameters()):
            self.loss_mean.fill_(math.nan)
            self._check_loss()
        self.on_save(self.state_dict(), self.step)
        self.saved_step, self.saved_at = self.step, self.elapsed

    def _log(self, now: Moment) -> None:
        loss, steps = float(self.loss_mean), self.training.schedule.steps
        self.history.append(
            {"step": self.step, "seconds": round(self.elapsed, 3), "loss": loss, "lr_scale": now.factor}
        )
        self.log(
            f"step:{self.step}/{steps or '-'} loss:{loss:.4f} lr_scale:{now.factor:.4f} "
            f"seconds:{self.elapsed:.1f} ms_per_step:{1000 * self.elapsed / self.step:.2f}"
        )

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the run depends on; every rank must call this, and all get the same."""
        return {
            "model": self.model.state_dict(),
            "muon": self.muon.state_dict(),
            "adam": self.adam.state_dict(),
            "average": self.average.state_dict() if self.average is not None else None,
            "loader": self.loader.state_dict(),
            "random": torch.get_rng_state(),
            "step": self.step,
            "elapsed": self.elapsed,
            "qat_step": self.qat_step,
            "loss_mean": self.loss_mean,
            "history": self.history,
            "measured": self.measured,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state."""
        self.model.load_state_dict(state["model"])
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.loader.load_state_dict(state["loader"])
        torch.set_rng_state(state["random"].cpu())
        self.step, self.elapsed, self.qat_step = state["step"], state["elapsed"], state["qat_step"]
        self.loss_mean = state["loss_mean"].to(self.device)
        self.history, self.measured = ([dict(row) for row in state[name]] for name in ("history", "measured"))


@torch.inference_mode()
def evaluate(
    model: GPT,
    stream: TokenStream,
    seq_len: int,
    worker: Worker = ALONE,
) -> float:
    """Nats of a stream in windows that do not overlap, summed over all ranks: a cheap way to follow a training."""
    nats = torch.zeros((), dtype=torch.float64, device=worker.device)
    starts = range(0, len(stream) - 1, seq_len)
    for start in starts[worker.rank :: worker.world]:
        window = torch.from_numpy(stream.read(start, start + seq_len + 1))[None].to(worker.device)
        nats += model(window[:, :-1], window[:, 1:], worker.dtype).double() * (window.size(1) - 1)
    if worker.world > 1:
        dist.all_reduce(nats)
    return float(nats)
