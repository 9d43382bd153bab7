"""Running a row over consecutive windows of a stream: what it may see, what it keeps, what it adds to the logits."""

import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .. import ops
from ..errors import InputError
from ..kernels import slot_solve
from ..lbfgs import BiasObjective, Status, minimize
from ..lbfgs.rows import BLOCK_ROWS, row_mixture
from .rows import Adaptation, parse_preset


@dataclass(frozen=True)
class WindowBatch:
    """Consecutive windows, cut to the positions that anything needs.

    Args:
        logits: float [W, T, V], soft-capped; the last position is the window's last.
        targets: int64 [W, T].
        context_end: int64 [W]; positions before it were scored by earlier windows.
        scored_end: int64 [W]; positions from context_end up to it are scored here; both 0 for padding.
        backend: triton, torch or auto.
    """

    logits: Tensor
    targets: Tensor
    context_end: Tensor
    scored_end: Tensor
    backend: ops.Backend = "auto"

    @cached_property
    def first_scored(self) -> int:
        """First position that any window scores."""
        real = self.scored_end > 0
        return int(self.context_end[real].min()) if bool(real.any()) else self.logits.size(1)

    def nll(self, bias: Tensor | None = None) -> Tensor:
        """Negative log-likelihoods in nats of positions [first_scored, T) under logits + bias.

        Args:
            bias: [W, V], or None.

        Returns:
            float32 (float64 for float64) [W, T - first_scored]; meaningless outside a window's scored positions.
        """
        scored = slice(self.first_scored, None)
        return ops.cross_entropy(self.logits[:, scored], self.targets[:, scored], bias, backend=self.backend)

    def visible(self, row: Adaptation) -> tuple[Tensor, Tensor, Tensor]:
        """All that a row may fit to: logits [W, N, V], targets [W, N] and weights [W, N] of its positions.

        Other positions have weight 0 and target 0, so that a fit cannot depend on them.
        """
        length = self.logits.size(1)
        position = torch.arange(length, device=self.logits.device)
        if row.positions == "scored":
            begin, end = self.context_end, self.scored_end
        else:
            begin = max(0, length - row.focal) if row.positions == "focal" else 0
            end = self.context_end
        seen = (position >= torch.as_tensor(begin, device=position.device).view(-1, 1)) & (position < end[:, None])
        used = seen.any(0).nonzero()
        cut = slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(0, 0)
        targets = torch.where(seen, self.targets, 0)
        return self.logits[:, cut], targets[:, cut], seen[:, cut].to(torch.float32)


@dataclass(frozen=True)
class Calibration:
    """What the closed form takes from the model's training data.

    Args:
        frequency: float [V], how often each token came, or None where unknown.
        scale: strength of the bias.
    """

    frequency: Tensor | None = None
    scale: float | None = None

    @property
    def known(self) -> bool:
        return self.frequency is not None

    def resolve(self, row: Adaptation) -> Adaptation:
        """The row with the scale that it will use."""
        if row.optimizer != "rates" or row.scale is not None:
            return row
        # 0.7 is what strong models, which gain less, were found to want
        default = 1.0 if self.known else 0.7
        return row.model_copy(update={"scale": default if self.scale is None else self.scale})

    def pseudo_counts(self, row: Adaptation, vocab_size: int) -> Tensor:
        """k of each token, float64 [V]: rare tokens need less evidence than frequent ones."""
        if row.k is not None or self.frequency is None:
            return torch.full((vocab_size,), row.k or 2.0, dtype=torch.float64)
        return (2 * (1024 * self.frequency.double()).sqrt()).clamp(min=0.2)


class Rates:
    """Decayed counts of what came and of what the model expected, and the bias that follows; all in float64.

    Args:
        row: the adaptation, resolved.
        pseudo_counts: [V].
        bos_id: the token that starts a document, or None.
    """

    def __init__(self, row: Adaptation, pseudo_counts: Tensor, bos_id: int | None):
        self.row, self.k, self.bos_id = row, pseudo_counts, bos_id

    def bias(self, counts: Tensor, expected: Tensor) -> Tensor:
        """scale * log((C + k) / (E + k)), clamped; [V] each."""
        ratio = ((counts + self.k) / (expected + self.k)).log()
        return (self.row.scale * ratio).clamp(-self.row.clamp, self.row.clamp)

    def sums(self, batch: WindowBatch, begin: Tensor, end: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Take in positions [begin, end) of each window, int64 [W] each.

        Returns:
            What they leave of an earlier state, [W], and what they add to its counts and expectations, [W, V].
        """
        longest = max(1, int((end - begin).max()))
        offset = torch.arange(-(-longest // BLOCK_ROWS) * BLOCK_ROWS, device=begin.device)
        # Packed to the front, so that a window's sums round alike whatever else is in the batch
        index = (begin[:, None] + offset).clamp(max=batch.targets.size(1) - 1)
        taken = offset < (end - begin)[:, None]
        targets = batch.targets.gather(1, index)
        keep = torch.ones(index.shape, dtype=torch.float64, device=index.device).masked_fill(taken, self.row.decay)
        if self.bos_id is not None:
            keep = torch.where(taken & (targets == self.bos_id), keep * self.row.document_decay, keep)
        after = keep.flip(1).cumprod(1).flip(1)  # what each token, with all that follow it, leaves of the state
        weight = torch.where(taken, torch.cat([after[:, 1:], torch.ones_like(after[:, :1])], 1), 0.0)
        counts = weight.new_zeros(len(begin), len(self.k)).scatter_add_(1, targets, weight)
        logits = batch.logits[torch.arange(len(begin), device=begin.device)[:, None], index]
        rows = torch.softmax(logits, -1, torch.promote_types(logits.dtype, torch.float32))
        return after[:, 0], counts, row_mixture(weight.to(rows.dtype), rows).double()


class Adapter:
    """Runs one row over the consecutive batches of a stream.

    Args:
        row: the adaptation.
        calibration: training frequencies and scale, for the closed form.
        bos_id: the token that starts a document, or None.
    """

    def __init__(self, row: Adaptation, calibration: Calibration | None = None, bos_id: int | None = None):
        self.calibration = calibration or Calibration()
        self.row = self.calibration.resolve(row)
        self.bos_id = bos_id
        self._work: list[Tensor] = []  # of every batch of problems: iterations, evaluations, status
        self._state: tuple[Tensor, Tensor] | None = None  # scope prefix: decayed counts and expectations [V]
        self._last: Tensor | None = None  # scope batch: bias [V] of the batch before

    def first_position(self, seq_len: int, stride: int) -> int:
        """First position of a window, other than the stream's first, whose logits this row needs."""
        if self.row.scope == "prefix" or self.row.positions in ("none", "scored"):
            return seq_len - stride
        return max(0, seq_len - max(self.row.focal, stride)) if self.row.positions == "focal" else 0

    def burn_in(self, stride: int) -> int:
        """Windows to replay before the first one that counts, so that what was cut off weighs less than 1e-12."""
        if self.row.scope != "prefix":
            return 0
        if self.row.decay == 1:
            return 1 << 62
        return math.ceil(math.log(1e-12) / (stride * math.log(self.row.decay)))

    def step(self, batch: WindowBatch) -> Tensor:
        """Adapt to each window's past and score it; returns what `batch.nll` returns."""
        return batch.nll(self.bias(batch))

    def work(self) -> dict[str, Counter]:
        """How many problems took how many iterations and evaluations, and why they stopped."""
        if not self._work:
            return {}
        iterations, evaluations, status = torch.cat(self._work, 1).tolist()
        names = [Status(code).name.lower() for code in status]
        return {"iterations": Counter(iterations), "evaluations": Counter(evaluations), "status": Counter(names)}

    def replay(self, batch: WindowBatch) -> None:
        """Take in windows that another rank scores, where the state depends on them."""
        if self.row.scope == "prefix":
            self.bias(batch)

    def bias(self, batch: WindowBatch) -> Tensor | None:
        """The bias [W, V] each window is scored with; None for no bias. Advances the state."""
        if self.row.optimizer == "none":
            return None
        if self.row.optimizer == "lbfgs":
            if self.row.scope == "batch":
                return self._fit_shared(batch)
            return self._fit(batch.backend, *batch.visible(self.row))
        return self._stream_rates(batch) if self.row.scope == "prefix" else self._window_rates(batch)

    def _rates(self, batch: WindowBatch) -> Rates:
        k = self.calibration.pseudo_counts(self.row, batch.logits.size(-1)).to(batch.logits.device)
        return Rates(self.row, k, self.bos_id)

    def _stream_rates(self, batch: WindowBatch) -> Tensor:
        rates, biases = self._rates(batch), []
        counts, expected = self._state if self._state is not None else (torch.zeros_like(rates.k),) * 2
        left, new_counts, new_expected = rates.sums(batch, batch.context_end, batch.scored_end)
        for window in range(len(left)):
            biases.append(rates.bias(counts, expected))  # before the window's own tokens go in
            counts = left[window] * counts + new_counts[window]
            expected = left[window] * expected + new_expected[window]
        self._state = counts, expected
        return torch.stack(biases)

    def _window_rates(self, batch: WindowBatch) -> Tensor:
        rates = self._rates(batch)
        _, counts, expected = rates.sums(batch, torch.zeros_like(batch.context_end), batch.context_end)
        return torch.stack([rates.bias(*window) for window in zip(counts, expected, strict=True)])

    def _fit(
        self, backend: ops.Backend, logits: Tensor, targets: Tensor, weights: Tensor, start: Tensor | None = None
    ) -> Tensor:
        """One bias [V] for each problem of [P, N] positions, clamped."""
        if start is None:
            dtype = torch.promote_types(logits.dtype, torch.float32)
            start = torch.zeros(logits.size(0), logits.size(-1), dtype=dtype, device=logits.device)
        if ops.uses_triton(backend, logits.device):
            options = {"ridge": self.row.ridge, "clamp": self.row.clamp, "phases": self.row.phases}
            bias, _, *work = slot_solve(logits, targets, weights, start, **options)
        else:
            solution = minimize(
                BiasObjective(logits, targets, weights, ridge=self.row.ridge), start, phases=self.row.phases
            )
            bias = solution.x.clamp(-self.row.clamp, self.row.clamp)
            work = solution.iterations, solution.evaluations, solution.status
        self._work.append(torch.stack([values.long() for values in work])[:, weights.bool().any(1)])
        return bias

    def _fit_shared(self, batch: WindowBatch) -> Tensor:
        logits, targets, weights = batch.visible(self.row)
        biases = []
        for first in range(0, logits.size(0), self.row.batch):
            group = slice(first, first + self.row.batch)
            start = self._last[None] if self._last is not None and self.row.warm_start else None
            rows = logits[group].reshape(1, -1, logits.size(-1))
            # one problem of many rows: a single program would leave a GPU idle, so torch solves it everywhere
            bias = self._fit("torch", rows, targets[group].reshape(1, -1), weights[group].reshape(1, -1), start)[0]
            if bool(weights[group].any()):
                self._last = bias
            biases.append(bias.expand(logits[group].size(0), -1))
        return torch.cat(biases)


@dataclass(frozen=True)
class Adapted:
    """Scores of a batch of windows.

    Args:
        nll: float32 [W, T], adapted; NaN at positions that are not scored.
        base_nll: the same without adaptation.
        state: pass it to the next call of `adapt`.
    """

    nll: Tensor
    base_nll: Tensor
    state: Adapter


@torch.no_grad()
def adapt(
    logits: Tensor,
    targets: Tensor,
    context: int | Tensor,
    scored: int | Tensor | None = None,
    *,
    preset: str = "causal",
    state: Adapter | None = None,
    frequency: Tensor | None = None,
    bos_id: int | None = None,
    allow_noncausal: bool = False,
) -> Adapted:
    """Score consecutive windows of any model with a test-time adaptation.

    Args:
        logits: float [W, T, V], of consecutive windows, as the model gives them.
        targets: int64 [W, T], the token after each position, in 0..V-1 up to `scored`.
        context: positions of each window that earlier windows scored, one number or int64 [W].
        scored: end of the positions to score, one number or int64 [W]; T by default.
        preset: NAME or NAME:key=value,...
        state: of the call before with the same preset, for presets that carry something from batch to batch.
        frequency: float [V], how often each token comes in training text; improves `causal`.
        bos_id: the token that starts a document, for `causal`.
        allow_noncausal: needed for presets whose score has seen its own tokens.

    Raises:
        InputError: unknown preset, a preset that leaks, shapes or tokens that do not fit, a state of another preset.
    """
    if logits.ndim != 3 or targets.shape != logits.shape[:2]:
        raise InputError(f"logits {tuple(logits.shape)}, targets {tuple(targets.shape)}: expected [W, T, V] and [W, T]")
    windows, length, vocabulary = logits.shape
    if frequency is not None and frequency.shape != (vocabulary,):
        raise InputError(f"frequency {tuple(frequency.shape)}: expected {(vocabulary,)}")
    row = parse_preset(preset)
    if not row.compliance.causal and not allow_noncausal:
        raise InputError(f"preset {preset!r} is not causal: {row.compliance.why}")
    if state is None:
        state = Adapter(row, Calibration(frequency), bos_id)
    elif state.row != state.calibration.resolve(row):
        raise InputError(f"state: it is that of preset {state.row.name!r} or of other options, not of {preset!r}")
    ends = [torch.as_tensor(length if end is None else end, device=logits.device) for end in (context, scored)]
    if any(end.is_floating_point() or end.shape not in ((), (windows,)) for end in ends):
        raise InputError(f"context and scored: expected an integer or {windows} of them")
    ends = [end.long().expand(windows) for end in ends]
    if not bool(((ends[0] >= 0) & (ends[0] <= ends[1]) & (ends[1] <= length)).all()):
        raise InputError(f"context and scored: expected 0 <= context <= scored <= {length} in every window")
    position = torch.arange(length, device=logits.device)
    outside = (position < ends[0][:, None]) | (position >= ends[1][:, None])
    behind = position >= ends[1][:, None]
    if bool((((targets < 0) | (targets >= vocabulary)) & ~behind).any()):
        raise InputError(f"targets: expected 0..{vocabulary - 1} at every position before `scored`")
    batch = WindowBatch(logits, targets.masked_fill(behind, 0), *ends)

    def full(nll: Tensor) -> Tensor:
        result = torch.full((windows, length), math.nan, dtype=nll.dtype, device=nll.device)
        result[:, batch.first_scored :] = nll
        return result.masked_fill(outside, math.nan)

    return Adapted(full(state.step(batch)), full(batch.nll()), state)
