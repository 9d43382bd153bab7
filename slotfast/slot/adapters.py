"""Running a row over consecutive windows of a stream: what it may see, what it keeps, what it scores with."""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..lbfgs import Status
from .batch import Adjusted, WindowBatch
from .fit import Fit
from .presets import parse_preset
from .rates import BigramRates, Calibration, Rates
from .repeats import Repeats
from .rows import Adaptation
from .sorted_repeats import SortedRepeats


def first_position(row: Adaptation, seq_len: int, stride: int) -> int:
    """First position of a window, other than the stream's first, whose logits a row needs."""
    if row.scope == "prefix" or row.positions in ("none", "scored"):
        return seq_len - stride
    return max(0, seq_len - max(row.focal, stride)) if row.positions == "focal" else 0


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
        self._fit = Fit(self.row)
        self._rates: Rates | None = None
        self._bigram: BigramRates | None = None
        self._repeats: Repeats | SortedRepeats | None = None

    def burn_in(self, stride: int) -> int:
        """Windows to replay before the first one that counts, so that what was cut off weighs less than 1e-12."""
        if self.row.scope != "prefix":
            return 0
        if self.row.decay == 1:
            return 1 << 62
        return math.ceil(math.log(1e-12) / (stride * math.log(self.row.decay)))

    def step(self, batch: WindowBatch, all_rows: bool = False) -> Adjusted:
        """Adapt to each window's past: the distributions that its scored tokens are charged by. Advances the state.

        Args:
            batch: the windows.
            all_rows: `logprobs` of the result will be asked for.
        """
        if self.row.optimizer == "none" or not len(batch.logits):
            return Adjusted(batch)
        if self.row.optimizer != "rates":
            return self._fit(batch)
        if self._rates is None:
            self._begin(batch.logits.size(-1), batch.logits.device)
        if self.row.scope == "window":
            return Adjusted(batch, self._rates.windows(batch))
        if self._bigram:
            return self._bigram.adjust(batch)
        bias, followers = self._rates.stream(batch), None
        if self._repeats:
            followers = self._repeats.take(batch.targets[batch.scored], all_rows)
        return Adjusted(batch, bias, followers=followers, gates=self.row.gates)

    def _begin(self, vocab_size: int, device: torch.device | str) -> None:
        self._rates = Rates(self.row, self.calibration.pseudo_counts(self.row, vocab_size).to(device), self.bos_id)
        self._bigram = BigramRates(self._rates) if self.row.parameter == "bigram" else None
        if self.row.parameter == "bias+repeats":
            sorts = torch.device(device).type == "cuda" and SortedRepeats.suits(self.row.decay)
            self._repeats = (SortedRepeats if sorts else Repeats)(self.row.decay, self.row.document_decay, self.bos_id)

    def state_dict(self) -> dict[str, Any]:
        """What is carried from batch to batch, but for repeats, which the tokens give back."""
        parts = {"fit": self._fit, "rates": self._rates, "bigram": self._bigram}
        return {name: part.state_dict() for name, part in parts.items() if part is not None}

    def load_state_dict(self, state: Mapping[str, Any], past: np.ndarray, device: torch.device | str) -> None:
        """Go on from what `state_dict` gave.

        Args:
            past: int [n], all tokens that were taken in.
            device: of the batches to come.
        """
        self._fit.load_state_dict(state["fit"], device)
        if "rates" in state:
            self._begin(len(state["rates"]["counts"]), device)
            self._rates.load_state_dict(state["rates"])
        if self._bigram:
            self._bigram.load_state_dict(state["bigram"])
        if self._repeats:
            self._repeats.take(torch.from_numpy(past.astype(np.int64)).to(device))

    def replay(self, batch: WindowBatch) -> None:
        """Take in windows that another rank scores, where the state depends on them."""
        if self.row.scope == "prefix":
            self.step(batch)

    def work(self) -> dict[str, Counter]:
        """How many problems took how many iterations and evaluations, and why they stopped."""
        if not self._fit.work:
            return {}
        iterations, evaluations, status = torch.cat(self._fit.work, 1).tolist()
        names = [Status(code).name.lower() for code in status]
        return {"iterations": Counter(iterations), "evaluations": Counter(evaluations), "status": Counter(names)}


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
    hidden: Tensor | None = None,
    head: Callable[..., Tensor] | None = None,
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
        frequency: float [V], how often each token comes in training text, counts or shares; improves `causal`.
        bos_id: the token that starts a document, for `causal`.
        hidden: float [W, T, D], the states behind the logits, for presets that shift them or act before the soft cap.
        head: from hidden states [n, D], and a bias [V] before the soft cap for presets that add one there, to logits.
        allow_noncausal: needed for presets whose score has seen its own tokens.

    Raises:
        InputError: unknown preset, a preset that leaks, shapes or tokens that do not fit, a state of another preset.
    """
    if logits.ndim != 3 or targets.shape != logits.shape[:2]:
        raise InputError(f"logits {tuple(logits.shape)}, targets {tuple(targets.shape)}: expected [W, T, V] and [W, T]")
    windows, length, vocabulary = logits.shape
    if targets.is_floating_point() or (bos_id is not None and not 0 <= bos_id < vocabulary):
        raise InputError(f"targets and bos_id: expected integers, bos_id {bos_id} in 0..{vocabulary - 1}")
    if frequency is not None and frequency.shape != (vocabulary,):
        raise InputError(f"frequency {tuple(frequency.shape)}: expected {(vocabulary,)}")
    if frequency is not None:
        if not bool(frequency.isfinite().all() & (frequency >= 0).all() & (frequency.sum() > 0)):
            raise InputError("frequency: expected counts or shares of tokens, >= 0 and not all 0")
        frequency = frequency.double() / frequency.double().sum()
    row = parse_preset(preset)
    if not row.compliance.causal and not allow_noncausal:
        raise InputError(f"preset {preset!r} is not causal: {row.compliance.why}")
    if state is None:
        state = Adapter(row, Calibration(frequency), bos_id)
    elif state.row != state.calibration.resolve(row):
        raise InputError(f"state: it is that of preset {state.row.name!r} or of other options, not of {preset!r}")
    if state._rates is not None and len(state._rates.k) != vocabulary:
        raise InputError(f"state: it is of {len(state._rates.k)} tokens, logits {tuple(logits.shape)} have others")
    ends = [torch.as_tensor(length if end is None else end, device=logits.device) for end in (context, scored)]
    if any(end.is_floating_point() or end.shape not in ((), (windows,)) for end in ends):
        raise InputError(f"context and scored: expected an integer or {windows} of them")
    ends = [end.long().expand(windows) for end in ends]
    if not bool(((ends[0] >= 0) & (ends[0] <= ends[1]) & (ends[1] <= length)).all()):
        raise InputError(f"context and scored: expected 0 <= context <= scored <= {length} in every window")
    position = torch.arange(length, device=logits.device)
    behind = position >= ends[1][:, None]
    if bool((((targets < 0) | (targets >= vocabulary)) & ~behind).any()):
        raise InputError(f"targets: expected 0..{vocabulary - 1} at every position before `scored`")
    if state.row.needs_hidden and (hidden is None or head is None):
        raise InputError(f"preset {preset!r} acts before the logits: it needs hidden and head")
    if hidden is not None and hidden.shape[:2] != logits.shape[:2]:
        raise InputError(f"hidden {tuple(hidden.shape)}: expected {[windows, length]} in front of the width")
    batch = WindowBatch(logits, targets.masked_fill(behind, 0), *ends, hidden=hidden, head=head)

    def full(nll: Tensor) -> Tensor:
        result = torch.full((windows, length), math.nan, dtype=nll.dtype, device=nll.device)
        result[batch.scored] = nll
        return result

    nll, base_nll = state.step(batch).nll(), Adjusted(batch).nll()
    if not bool(nll.isfinite().all() & base_nll.isfinite().all()):
        raise InputError("logits: they give NaN or infinite losses at scored positions")
    return Adapted(full(nll), full(base_nll), state)
