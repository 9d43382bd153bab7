"""The training loop: gradients, optimisers, schedule, averages, checkpoints; on one process or on several ranks."""

import copy
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from ..config import TrainSettings
from ..data import TokenStream
from ..errors import InputError
from ..flash import flash_attention
from ..loader import Loader
from ..model import GPT
from ..optim import Muon, WeightAverage, average_gradients
from ..words import counted
from ..worker import ALONE, Worker
from . import qat
from .schedule import Moment, moment

_CHECK_STEPS_GPU = 10  # looking at the loss makes a GPU wait; a CPU's is looked at in every step


class Trainer:
    """Trains a model in place.

    Args:
        model: on the worker's device.
        loader: windows of all ranks.
        settings: of the command.
        worker: this process; its dtype is that of Muon's iteration too.
        on_save: called on every rank with `state_dict` and the step whenever the state should be saved.
        on_validate: called on every rank every `val_every` steps; gives named numbers, which `measured` keeps.
        log: prints a line, on rank 0.
    """

    def __init__(
        self,
        model: GPT,
        loader: Loader,
        settings: TrainSettings,
        worker: Worker = ALONE,
        on_save: Callable[[dict[str, Any], int], None] | None = None,
        on_validate: Callable[[], dict[str, float]] | None = None,
        log: Callable[[str], None] = print,
    ):
        check_length(settings, worker.world)
        self.model, self.loader, self.settings = model, loader, settings
        self.worker, self.device = worker, torch.device(worker.device)
        self.on_save, self.on_validate, self.log = on_save, on_validate, log
        self.group = dist.group.WORLD if worker.world > 1 else None
        on_gpu = worker.on_gpu
        flash_attention(self.device)  # found before anything is compiled
        self.forward: nn.Module = torch.compile(model) if on_gpu and settings.compile == "auto" else model
        self.muon, self.adam = build_optimizers(model, settings, worker.dtype, self.group)
        self.average = None
        if settings.average != "none":
            decay = settings.ema_decay if settings.average == "ema" else None
            self.average = WeightAverage(model.parameters(), decay)
        self.soft = qat.SoftRound(self.device)
        self.check_steps = _CHECK_STEPS_GPU if on_gpu else 1
        self.step, self.elapsed = 0, 0.0
        self.saved_step, self.saved_at = None, 0.0
        self.qat_step: int | None = None  # at which the rounding began
        self.loss_mean = torch.full((), math.nan, device=self.device)
        self.history: list[dict[str, float]] = []  # a row for each line that was logged
        self.measured: list[dict[str, float]] = []  # and for each validation

    def run(self) -> None:
        """Train until the steps or the time are up, then put the averaged weights in place.

        Raises:
            InputError: the loss is no longer finite; the last checkpoint stays.
        """
        self._warm_up()
        settings, self.saved_at = self.settings, self.elapsed
        started = time.perf_counter() - self.elapsed
        with _progress(settings, silent=self.worker.rank > 0) as bar:
            while (now := moment(settings, self.step, self.elapsed)).left:
                self._prepare(now)
                loss = self._update(self._next_batch())
                self.step += 1
                self.elapsed = self._agree(time.perf_counter() - started)
                self.loss_mean = loss if self.step == 1 else self.loss_mean.lerp(loss, 0.03)
                if self.average is not None and self._counts(now):
                    self.average.update()
                bar(self)
                paused = time.perf_counter()
                self._report(now)
                started += time.perf_counter() - paused  # measuring is not training
                self._save_if_due()
        self._check_loss()
        if self.step % settings.log_every:
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
        self.model.looping = now.progress >= self.settings.loop_at
        if self.settings.qat == "off" or now.decay >= self.settings.qat_from:
            return
        if self.qat_step is None:
            self.qat_step = self.step
            self.log(f"step:{self.step} the matrices are rounded to 6 bits from here on")
        self.soft.set_step(self.step - self.qat_step)
        qat.set_rounding(self.model, self.soft if self.settings.qat == "soft" else qat.straight_through)

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
        for part in batch.split(self.settings.micro_windows or len(batch)):
            share = self.forward(part[:, :-1], part[:, 1:], self.worker.dtype) * (len(part) / len(batch))
            share.backward()
            loss += share.detach()
        adam_parameters = [p for group in self.adam.param_groups for p in group["params"]]
        if self.settings.clip:  # of this rank's own gradients, as published: their mean is not clipped again
            everything = self.settings.clip_scope == "all"
            torch.nn.utils.clip_grad_norm_(
                list(self.model.parameters()) if everything else adam_parameters, self.settings.clip
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
        """Whether the weights of this step go into the average."""
        if self.settings.average == "ema":
            return True
        return now.decay < self.settings.swa_from and self.step % self.settings.swa_every == 0

    def _warm_up(self) -> None:
        """Run some steps of every form that the forward will take, so that it is compiled, and undo what they did."""
        steps, settings = self.settings.warmup_steps, self.settings
        if not steps:
            return
        started, before = time.perf_counter(), copy.deepcopy(self.state_dict())
        self._set_rates(moment(settings, 0, 0.0))
        forms: list[tuple[bool, Callable | None]] = [(not settings.loops, None)]
        if settings.loops:
            forms.append((True, None))
        if settings.qat != "off":
            forms.append((True, self.soft if settings.qat == "soft" else qat.straight_through))
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
        """Rank 0's clock: ranks that go by their own would part."""
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
        """What is said after some steps: that the loss is broken, how it is, how good the model is on other text."""
        if self.step % self.check_steps == 0:
            self._check_loss()
        if self.step % self.settings.log_every == 0:
            self._log(now)
        if self.on_validate and self.settings.val_every and self.step % self.settings.val_every == 0:
            found = self.on_validate()
            self.log(f"val step:{self.step} " + " ".join(f"{name}:{value:.4f}" for name, value in found.items()))
            self.measured.append({"step": self.step, **found})

    def _save_if_due(self) -> None:
        settings = self.settings
        waited = self.elapsed - self.saved_at >= settings.checkpoint_seconds
        if self.on_save and (waited or self.step % settings.checkpoint_steps == 0):
            self._save()

    def _save(self) -> None:
        self._check_loss()
        # A loss is finite once more after the step that ruins the weights.
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.model.parameters()):
            self.loss_mean.fill_(math.nan)
            self._check_loss()
        self.on_save(self.state_dict(), self.step)
        self.saved_step, self.saved_at = self.step, self.elapsed

    def _log(self, now: Moment) -> None:
        loss, settings = float(self.loss_mean), self.settings
        self.history.append(
            {"step": self.step, "seconds": round(self.elapsed, 3), "loss": loss, "lr_scale": now.factor}
        )
        self.log(
            f"step:{self.step}/{settings.steps or '-'} loss:{loss:.4f} lr_scale:{now.factor:.4f} "
            f"seconds:{self.elapsed:.1f} ms_per_step:{1000 * self.elapsed / self.step:.2f}"
        )

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the run depends on; every rank must call it, and all get the same."""
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
        """Go on from a state."""
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


def check_length(settings: TrainSettings, world: int) -> None:
    """Raise InputError for a training that would not end, would not begin, or cannot be shared among ranks."""
    if settings.steps is None and not settings.seconds:
        raise InputError("--seconds 0 without --steps: the training would not end")
    if settings.seconds and settings.reserve >= settings.seconds:
        raise InputError(f"--reserve {settings.reserve:g}: leaves nothing of --seconds {settings.seconds:g}")
    if settings.batch_windows % world:
        raise InputError(f"--batch-windows {settings.batch_windows}: expected a multiple of the {world} ranks")


def build_optimizers(
    model: GPT, settings: TrainSettings, dtype: torch.dtype, group: dist.ProcessGroup | None
) -> tuple[Muon, torch.optim.AdamW]:
    """Muon on the blocks' matrices, AdamW on embeddings and on scales with small projections.

    Every parameter group has its own `rate`, by which the schedule's factor is multiplied.
    """
    early, late, embeddings, scalars = [], [], [], []
    for name, parameter in model.named_parameters():
        if name.startswith("blocks.") and name.endswith(".weight"):
            first_half = int(name.split(".")[1]) < model.config.layers // 2
            (early if first_half or settings.matrix_lr_late is None else late).append(parameter)
        else:
            table = name.endswith(("tok_emb.weight", "embed.weight"))
            (embeddings if table else scalars).append(parameter)
    matrix_rates = ((early, settings.matrix_lr), (late, settings.matrix_lr_late))
    muon = Muon(
        [{"params": parameters, "lr": rate, "rate": rate} for parameters, rate in matrix_rates if parameters],
        weight_decay=settings.muon_decay,
        steps=settings.muon_steps,
        coefficients=settings.newton_schulz,
        equalize_rows=settings.muon == "muoneq-r",
        dtype=dtype,
        process_group=group,
    )
    adam = torch.optim.AdamW(
        [
            {"params": embeddings, "lr": settings.embed_lr, "rate": settings.embed_lr},
            {"params": scalars, "lr": settings.scalar_lr, "rate": settings.scalar_lr},
        ],
        betas=(0.9, 0.95),
        weight_decay=settings.adam_decay,
    )
    return muon, adam


@torch.inference_mode()
def evaluate(
    model: GPT,
    stream: TokenStream,
    seq_len: int,
    worker: Worker = ALONE,
) -> float:
    """Summed nats of a stream cut into windows that do not overlap: cheap, to follow a training run; of all ranks."""
    nats = torch.zeros((), dtype=torch.float64, device=worker.device)
    starts = range(0, len(stream) - 1, seq_len)
    for start in starts[worker.rank :: worker.world]:
        window = torch.from_numpy(stream.read(start, start + seq_len + 1))[None].to(worker.device)
        nats += model(window[:, :-1], window[:, 1:], worker.dtype).double() * (window.size(1) - 1)
    if worker.world > 1:
        dist.all_reduce(nats)
    return float(nats)


class _progress:
    """A bar on a terminal, of steps where their number is given, else of seconds; nothing elsewhere."""

    def __init__(self, settings: TrainSettings, silent: bool):
        self.by_steps = settings.steps is not None
        total = settings.steps if self.by_steps else round(settings.seconds - settings.reserve)
        unit, hidden = " steps" if self.by_steps else " s", True if silent else None
        self.bar = tqdm(total=total, desc="training", unit=unit, disable=hidden, file=sys.stderr, leave=False)

    def __enter__(self) -> "_progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def __call__(self, trainer: Trainer) -> None:
        if self.bar.disable:
            return
        self.bar.n = min(trainer.step if self.by_steps else round(trainer.elapsed), self.bar.total)
        if trainer.step % trainer.check_steps == 0:
            self.bar.set_postfix_str(f"step {trainer.step}, loss {float(trainer.loss_mean):.3f}")
