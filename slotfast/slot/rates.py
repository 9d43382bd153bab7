"""The closed form: how much more often each token comes than the model expects.

The MAP estimate of that ratio under a Gamma prior, for counts C of the targets that came and sums E of the model's own
probabilities at the same positions, both decayed: bias_v = scale * log((C_v + k_v) / (E_v + k_v)).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..lbfgs.rows import BLOCK_ROWS, row_mixture
from .batch import WindowBatch
from .rows import Adaptation


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
