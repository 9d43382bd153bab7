"""The closed form: how much more often each token comes than the model expects.

The MAP estimate of that ratio under a Gamma prior, for counts C of the targets that came and sums E of the model's own
probabilities at the same positions, both decayed: bias_v = scale * log((C_v + k_v) / (E_v + k_v)). For the bigram form
the same counts are kept for each preceding token u, with the first ratio r as the prior's mean:
bias_uv = scale * log((C_uv + h r_v) / (E_uv + h)).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..errors import InputError
from ..kernels import rate_scan, rate_scan_ref
from .adaptation import Adaptation
from .batch import Adjusted, Packed, WindowBatch
from .repeats import CAUTIOUS_GATES

_LARGEST_TABLES = 1 << 30  # bytes
_SMALLEST_UNIT = 1e-6  # below it, float32 sums kept in shrinking units are brought back to units of 1


@dataclass(frozen=True)
class Calibration:
    """What the closed forms take from the model's training data.

    Args:
        frequency: float [V], how often each token came, or None where unknown.
        scale: strength of the bias; 0 is off.
        decay: weight of a count one token later.
        gates: (a, b) of each context length of `repeats`.
    """

    frequency: Tensor | None = None
    scale: float | None = None
    decay: float | None = None
    gates: tuple[tuple[float, float], ...] | None = None

    @classmethod
    def stored(cls, frequency: Tensor | None, metadata: Mapping[str, Any]) -> "Calibration":
        """What a model's file holds of it."""
        numbers = metadata.get("calibration") or {}
        return cls(frequency, *(numbers.get(name) for name in ("scale", "decay", "gates")))

    def resolve(self, row: Adaptation) -> Adaptation:
        """The row with the numbers that it will use."""
        if row.optimizer != "rates":
            return row
        found: dict[str, Any] = {}
        if row.scale is None:
            # 0.7 is what strong models, which gain less, were found to want
            default = 0.7 if self.frequency is None else 1.0
            found["scale"] = default if self.scale is None else self.scale
        if row.decay is None:
            found["decay"] = 0.97 ** (1 / 64) if self.decay is None else self.decay
        if row.parameter == "bias+repeats" and row.gates is None:
            found["gates"] = self.gates or CAUTIOUS_GATES
        return row.model_copy(update=found)

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
        if row.scale is None or row.decay is None:
            raise ValueError(f"row: expected one that `Calibration.resolve` gave, with scale and decay, got {row}")
        self.row, self.k, self.bos_id = row, pseudo_counts, bos_id
        self.scale, self.decay = row.scale, row.decay
        self.counts, self.expected = torch.zeros_like(pseudo_counts), torch.zeros_like(pseudo_counts)

    def state_dict(self) -> dict[str, Any]:
        """What has been counted."""
        return {"counts": self.counts, "expected": self.expected}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self.counts, self.expected = (state[name].to(self.k.device) for name in ("counts", "expected"))

    def stream(self, batch: WindowBatch) -> Tensor:
        """Biases [W, V] from all that came before each window; takes the windows' scored tokens in."""
        left, *new = self._sums(batch.charges)
        scan = ops.choose(batch.backend, left.device, rate_scan, rate_scan_ref)
        ratio, self.counts, self.expected = scan(left, *new, self.k, self.counts, self.expected)
        return self._bias(ratio)

    def windows(self, batch: WindowBatch) -> Tensor:
        """Biases [W, V] from each window's own context."""
        _, counts, expected = self._sums(batch.contexts)
        windows = zip(counts, expected, strict=True)  # one by one: a vector's last elements may round differently
        return self._bias(torch.stack([((c + self.k) / (e + self.k)).log() for c, e in windows]))

    def _bias(self, ratio: Tensor) -> Tensor:
        bound = self.row.clamp or math.inf
        return (self.scale * ratio).clamp(-bound, bound)

    def weights(self, targets: Tensor, taken: Tensor) -> tuple[Tensor, Tensor]:
        """How much tokens [W, n], where taken, leave of an earlier state, [W], and what each then weighs, [W, n]."""
        keep = torch.ones(targets.shape, dtype=torch.float64, device=targets.device).masked_fill(taken, self.decay)
        if self.bos_id is not None:
            keep = torch.where(taken & (targets == self.bos_id), keep * self.row.document_decay, keep)
        after = keep.flip(1).cumprod(1).flip(1)  # how much of the state is left after a token and all that follow it
        weight = torch.where(taken, torch.cat([after[:, 1:], torch.ones_like(after[:, :1])], 1), 0.0)
        return after[:, 0], weight

    def _sums(self, packed: Packed) -> tuple[Tensor, Tensor, Tensor]:
        """How much positions leave of an earlier state, [W], and what they add to counts and expectations, [W, V]."""
        left, weight = self.weights(packed.targets, packed.taken)
        window = torch.arange(len(left), device=left.device)[:, None]
        counts = weight.new_zeros(len(left), len(self.k))
        # adds in order, which scatter_add_ need not do
        counts.index_put_((window, packed.targets), weight, accumulate=True)
        return left, counts, packed.mixture(weight)


class BigramRates:
    """Rates of each token after each other, smoothed towards `Rates`: two tables [V, V] in float32 for the stream.

    Args:
        rates: the unigram form.

    Raises:
        InputError: a vocabulary whose tables would take more than 1 GiB.
    """

    def __init__(self, rates: Rates):
        vocabulary = len(rates.k)
        if 8 * vocabulary**2 > _LARGEST_TABLES:
            raise InputError(
                f"a vocabulary of {vocabulary} needs {8 * vocabulary**2:,} bytes of bigram tables, "
                f"more than {_LARGEST_TABLES:,}"
            )
        self.rates = rates
        self.previous: Tensor | None = None
        self.counts, self.expected = (torch.zeros(vocabulary, vocabulary, device=rates.k.device) for _ in range(2))
        self.unit = 1.0  # that the tables' entries are counted in, so that a decay touches no entry

    def state_dict(self) -> dict[str, Any]:
        """The tables, and the token that the next one follows."""
        return {name: getattr(self, name) for name in ("counts", "expected", "unit", "previous")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        device, self.unit = self.counts.device, state["unit"]
        self.counts, self.expected, self.previous = (state[x].to(device) for x in ("counts", "expected", "previous"))

    def adjust(self, batch: WindowBatch) -> Adjusted:
        """Score each window with what came before it; takes the windows' scored tokens in."""
        row, scale, adjusted = self.rates.row, self.rates.scale, []
        unigram = self.rates.stream(batch)
        wide = torch.promote_types(batch.logits.dtype, torch.float32)
        for window in batch.charges.taken.any(1).nonzero()[:, 0].tolist():
            logits, targets = batch.charges.of(window)
            ratio = (unigram[window] / scale).exp() if scale else torch.ones_like(self.rates.k)
            # the stream's very first token has no predecessor that was charged: it stands for itself
            before = targets[:1] if self.previous is None else self.previous
            previous = torch.cat([before, targets[:-1]])
            counts, expected = self.unit * self.counts[previous], self.unit * self.expected[previous]
            bias = ((counts + row.k2 * ratio.float()) / (expected + row.k2)).log()
            bound = row.clamp or math.inf
            adjusted.append(logits.to(wide) + (scale * bias).clamp(-bound, bound).to(wide))
            self._take(logits, targets, previous)
        empty = batch.logits.new_zeros(0, batch.logits.size(-1), dtype=wide)
        return Adjusted(batch, logits=torch.cat(adjusted) if adjusted else empty)

    def _take(self, logits: Tensor, targets: Tensor, previous: Tensor) -> None:
        left, weight = (
            x[0] for x in self.rates.weights(targets[None], torch.ones_like(targets[None], dtype=torch.bool))
        )
        self.unit *= float(left)
        if self.unit < _SMALLEST_UNIT:
            self.counts *= self.unit
            self.expected *= self.unit
            self.unit = 1.0
        weight = (weight / self.unit).float()
        self.counts.index_put_((previous, targets), weight, accumulate=True)
        rows = weight[:, None] * torch.softmax(logits.float(), -1)
        self.expected.index_put_((previous,), rows, accumulate=True)  # adds in order, which index_add_ need not do
        self.previous = targets[-1:]
