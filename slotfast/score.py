"""Nats, bytes and bits per byte: float64 sums over a stream, in total and by document."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Score:
    """What a meter read.

    Args:
        nats: summed negative log-likelihood.
        bpb: bits per byte; NaN where no byte was scored.
        gain_bpb: bits per byte gained over the base.
        gain_se: standard error of that gain, clustered by document; None with fewer than two documents.
    """

    nats: float
    bpb: float
    gain_bpb: float
    gain_se: float | None


class Meter:
    """Sums per document of bytes and of every row's nats.

    Args:
        rows: names of the scored rows; row 0 is the base that gains are measured against.
        documents: number of documents in the stream.
    """

    def __init__(self, rows: list[str], documents: int):
        self.rows = list(rows)
        self.tokens = np.zeros(documents, np.int64)
        self.bytes = np.zeros(documents, np.int64)
        self.nats = np.zeros((len(rows), documents), np.float64)

    def add(self, document: np.ndarray, n_bytes: np.ndarray, nll: np.ndarray) -> None:
        """Add scored tokens.

        Args:
            document: int [n], which document each token belongs to.
            n_bytes: int [n].
            nll: float [rows, n], nats.
        """
        if not len(document):
            return
        first = int(
            document[0]
        )  # documents come in order: counting from the first keeps the cost apart from their number
        local, span = document - first, int(document[-1]) - first + 1
        part = slice(first, first + span)
        self.tokens[part] += np.bincount(local, minlength=span)
        self.bytes[part] += np.bincount(local, n_bytes, span).astype(np.int64)
        for row, values in enumerate(nll):
            self.nats[row, part] += np.bincount(local, values.astype(np.float64), span)

    def append(self, row: str, nats: np.ndarray) -> None:
        """Add a row that another pass over the same tokens scored; nats float64 [documents]."""
        self.rows.append(row)
        self.nats = np.concatenate([self.nats, nats[None]])

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The sums so far, of this rank."""
        return {name: torch.from_numpy(getattr(self, name)) for name in ("tokens", "bytes", "nats")}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Continue from what `state_dict` returned; raises ValueError where it has other shapes."""
        for name in ("tokens", "bytes", "nats"):
            mine, saved = getattr(self, name), state[name].numpy()
            if saved.shape != mine.shape or saved.dtype != mine.dtype:
                raise ValueError(f"{name}: {saved.dtype} {saved.shape}, expected {mine.dtype} {mine.shape}")
            mine[...] = saved

    def reduce(self) -> None:
        """Sum over all ranks of the default process group, in place; nothing to do without one."""
        if dist.is_available() and dist.is_initialized():
            device = "cuda" if dist.get_backend() == "nccl" else "cpu"
            for array in (self.tokens, self.bytes, self.nats):
                tensor = torch.from_numpy(array).to(device)
                dist.all_reduce(tensor)
                array[...] = tensor.cpu().numpy()

    def score(self, row: int) -> Score:
        """Totals of one row and its paired gain over row 0."""
        total_bytes = int(self.bytes.sum())
        nats = float(self.nats[row].sum())
        if not total_bytes:
            return Score(nats, math.nan, math.nan, None)
        gain_bits = (self.nats[0] - self.nats[row]) / math.log(2)
        gain = float(gain_bits.sum()) / total_bytes
        # Linearised variance of a ratio of sums: documents are the independent units, tokens inside one are not.
        scored = self.tokens > 0
        count = int(scored.sum())
        residual = (gain_bits - gain * self.bytes)[scored]
        error = math.sqrt(count / (count - 1) * float(residual @ residual)) / total_bytes if count > 1 else None
        return Score(nats, nats / math.log(2) / total_bytes, gain, error)
