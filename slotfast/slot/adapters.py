"""Runs a row over consecutive windows of a stream: what it may see, what it keeps, what it scores with."""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..lbfgs import Status
from .adaptation import Adaptation
from .batch import Adjusted, WindowBatch
from .fit import Fit
from .rates import BigramRates, Calibration, Rates
from .repeats import Repeats
from .sorted_repeats import SortedRepeats


def first_position(row: Adaptation, seq_len: int, stride: int) -> int:
    """First position whose logits a row needs, in every window but the stream's first."""
    if row.scope == "prefix" or row.positions in ("none", "scored"):
        return seq_len - stride
    return max(0, seq_len - max(row.focal, stride)) if row.positions == "focal" else 0


class Adapter:
    """Runs one row over the consecutive batches of a stream.

    Args:
        row: the adaptation.
        calibration: training frequencies and scale, for the closed form.
        bos_id: the token that starts a document, or None.

    Attributes:
        past: int64 [n], the last tokens that calls of `adapt` scored; None before the first, and in an evaluation.
        opening: int64 [n], what the first window of those calls scored; None like `past`.
        vocabulary: V of the batches so far; None before the first.
    """

    def __init__(self, row: Adaptation, calibration: Calibration | None = None, bos_id: int | None = None):
        self.calibration = calibration or Calibration()
        self.row = self.calibration.resolve(row)
        self.bos_id = bos_id
        self.past: Tensor | None = None
        self.opening: Tensor | None = None
        self.vocabulary: int | None = None
        self._fit = Fit(self.row)
        self._rates: Rates | None = None
        self._bigram: BigramRates | None = None
        self._repeats: Repeats | SortedRepeats | None = None

    def burn_in(self, stride: int) -> int:
        """How many windows to replay before the first that counts: what came before them weighs less than 1e-12."""
        decay = self.row.decay
        if self.row.scope != "prefix" or decay is None:
            return 0
        return 1 << 62 if decay == 1 else math.ceil(math.log(1e-12) / (stride * math.log(decay)))

    def step(self, batch: WindowBatch, all_rows: bool = False) -> Adjusted:
        """Adapt to each window's past: the distributions that its scored tokens are charged by. Advances the state.

        Args:
            batch: the windows.
            all_rows: `logprobs` of the result will be asked for.
        """
        if self.row.optimizer == "none" or not len(batch.logits):
            return Adjusted(batch)
        self.vocabulary = batch.logits.size(-1)
        if self.row.optimizer != "rates":
            return self._fit(batch)
        rates = self._rates or self._begin(batch.logits.size(-1), batch.logits.device)
        if self.row.scope == "window":
            return Adjusted(batch, rates.windows(batch))
        if self._bigram:
            return self._bigram.adjust(batch)
        bias, followers = rates.stream(batch), None
        if self._repeats:
            followers = self._repeats.take(batch.of_scored(batch.targets), all_rows, batch.backend)
        return Adjusted(batch, bias, followers=followers, gates=self.row.gates)

    def _begin(self, vocab_size: int, device: torch.device | str) -> Rates:
        rates = Rates(self.row, self.calibration.pseudo_counts(self.row, vocab_size).to(device), self.bos_id)
        self._rates = rates
        self._bigram = BigramRates(rates) if self.row.parameter == "bigram" else None
        if self.row.parameter == "bias+repeats":
            sorts = torch.device(device).type == "cuda" and SortedRepeats.suits(rates.decay)
            self._repeats = (SortedRepeats if sorts else Repeats)(rates.decay, self.row.document_decay, self.bos_id)
        return rates

    def state_dict(self) -> dict[str, Any]:
        """What is carried from batch to batch, except repeats, which are counted again from the tokens."""
        parts = {"fit": self._fit, "rates": self._rates, "bigram": self._bigram}
        return {name: part.state_dict() for name, part in parts.items() if part is not None}

    def load_state_dict(self, state: Mapping[str, Any], past: np.ndarray, device: torch.device | str) -> None:
        """Continue from what `state_dict` returned.

        Args:
            past: int [n], all tokens that were taken in.
            device: of the batches to come.
        """
        self._fit.load_state_dict(state["fit"], device)
        if "rates" in state:
            self._begin(len(state["rates"]["counts"]), device).load_state_dict(state["rates"])
        if self._bigram:
            self._bigram.load_state_dict(state["bigram"])
        if self._repeats:
            self._repeats.take(torch.from_numpy(past.astype(np.int64)).to(device))

    def replay(self, batch: WindowBatch) -> None:
        """Take in windows that another rank scores, if the state depends on them."""
        if self.row.scope == "prefix":
            self.step(batch)

    def work(self) -> dict[str, Counter]:
        """How many problems took how many iterations and evaluations, and why each stopped."""
        if not self._fit.work:
            return {}
        iterations, evaluations, status = torch.cat(self._fit.work, 1).tolist()
        names = [Status(code).name.lower() for code in status]
        return {"iterations": Counter(iterations), "evaluations": Counter(evaluations), "status": Counter(names)}
