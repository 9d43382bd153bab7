"""Training windows: which parts of the shards make up each batch, the same on every rank, and resumable.

A batch is that of all ranks together; a rank takes every world-th window of it. The state is plain numbers and strings,
so that reading it from a checkpoint executes nothing.
"""

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .errors import InputError

Order = Literal["coprime", "shuffle", "sequential"]


class Loader:
    """Batches of windows without end.

    Args:
        names: of the shards; the order of `coprime` depends on them.
        shards: 1-D integer arrays; memory maps stay on disk.
        seq_len: predictions of a window.
        batch: windows of a step, all ranks together.

    Raises:
        InputError: no shard holds a window.
    """

    def __init__(self, names: Sequence[str], shards: Sequence[np.ndarray], seq_len: int, batch: int):
        self.shards, self.seq_len, self.batch = shards, seq_len, batch
        longest = max(map(len, shards))
        if longest <= seq_len:
            raise InputError(f"{longest} tokens in the longest shard; one training window needs {seq_len + 1}")

    def next_starts(self) -> list[tuple[int, int]]:
        """Shard and offset of the next batch's windows."""
        raise NotImplementedError

    def next_batch(self, rank: int = 0, world: int = 1) -> Tensor:
        """Tokens int64 [batch / world, seq_len + 1] of this rank's windows of the next batch."""
        starts = self.next_starts()[rank::world]
        return torch.from_numpy(
            np.stack([self.shards[shard][start : start + self.seq_len + 1] for shard, start in starts]).astype(np.int64)
        )

    def state_dict(self) -> dict[str, Any]:
        raise NotImplementedError

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise NotImplementedError


class CoprimeLoader(Loader):
    """Mixes many shards in each batch and walks through each with a stride that visits every block once.

    Each shard's cursor has a random phase, start and stride, the stride coprime to the number of blocks; all are drawn
    anew once every block has been visited. A batch mixes shards, drawn by how much they have left: few at first, then
    more, and more evenly, over the first 1,800 batches.

    Args:
        world: ranks; more of them mix more shards.

    Source: PR #726, #1060 and #1179 of openai/parameter-golf.
    """

    def __init__(
        self, names: Sequence[str], shards: Sequence[np.ndarray], seq_len: int, batch: int, world: int = 1
    ) -> None:
        # Shards too short for a window take no part, not even in the hash.
        kept = [i for i, shard in enumerate(shards) if len(shard) > seq_len]
        super().__init__(names, [shards[i] for i in kept] or shards, seq_len, batch)
        self.fewest, self.most = max(8, world), max(32, 8 * world)
        self.generator = np.random.Generator(np.random.PCG64(_fnv(names[i] for i in kept)))
        self.batches = 0
        self.cursors = [self._new_cursor(shard) for shard in range(len(self.shards))]

    def next_starts(self) -> list[tuple[int, int]]:
        progress = min(self.batches / 1800, 1.0)
        self.batches += 1
        left = np.array([cursor["blocks"] - cursor["visited"] for cursor in self.cursors], np.float64)
        weights = left ** (0.9 - 0.4 * progress)
        wanted = round(self.fewest + progress * (self.most - self.fewest))
        chosen = self.generator.choice(
            len(self.shards),
            min(wanted, len(self.shards), self.batch),
            replace=False,
            p=weights / weights.sum(),
        )
        shares = weights[chosen] / weights[chosen].sum()
        counts = 1 + self.generator.multinomial(self.batch - len(chosen), shares)
        queues = []
        for place in self.generator.permutation(len(chosen)):
            shard = int(chosen[place])
            offsets = [self._visit(shard) for _ in range(counts[place])]
            queues.append([(shard, offsets[i]) for i in self.generator.permutation(len(offsets))])
        starts = []
        while queues:
            starts += [queues[i].pop() for i in self.generator.permutation(len(queues))]
            queues = [queue for queue in queues if queue]
        return starts

    def _visit(self, shard: int) -> int:
        cursor = self.cursors[shard]
        block = (cursor["start"] + cursor["visited"] * cursor["stride"]) % cursor["blocks"]
        offset = cursor["phase"] + block * self.seq_len
        cursor["visited"] += 1
        if cursor["visited"] == cursor["blocks"]:
            self.cursors[shard] = self._new_cursor(shard)
        return offset

    def _new_cursor(self, shard: int) -> dict[str, int]:
        tokens = len(self.shards[shard])
        phase = int(self.generator.integers(min(self.seq_len, tokens - self.seq_len)))
        blocks = (tokens - 1 - phase) // self.seq_len
        start = int(self.generator.integers(blocks))
        stride = 1
        if blocks > 1:
            stride = int(self.generator.integers(1, blocks))
            while math.gcd(stride, blocks) != 1:
                stride = int(self.generator.integers(1, blocks))
        return {"phase": phase, "blocks": blocks, "start": start, "stride": stride, "visited": 0}

    def state_dict(self) -> dict[str, Any]:
        # JSON, because the generator's numbers have 128 bits
        return {
            "generator": json.dumps(self.generator.bit_generator.state),
            "batches": self.batches,
            "cursors": [dict(cursor) for cursor in self.cursors],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.bit_generator.state = json.loads(state["generator"])
        self.batches = state["batches"]
        self.cursors = [dict(cursor) for cursor in state["cursors"]]


class ShuffleLoader(Loader):
    """Every window of all shards in random order; each epoch cuts the shards at a new phase.

    Args:
        seed: of the order.
    """

    def __init__(
        self, names: Sequence[str], shards: Sequence[np.ndarray], seq_len: int, batch: int, seed: int = 0
    ) -> None:
        super().__init__(names, shards, seq_len, batch)
        self.generator = np.random.Generator(np.random.PCG64(seed))
        self.left = np.empty((0, 2), np.int64)

    def next_starts(self) -> list[tuple[int, int]]:
        while len(self.left) < self.batch:
            self.left = np.concatenate([self.left, self._epoch()])
        chosen, self.left = self.left[: self.batch], self.left[self.batch :]
        return [(int(shard), int(start)) for shard, start in chosen]

    def _epoch(self) -> np.ndarray:
        rows = []
        for shard, tokens in enumerate(self.shards):
            if len(tokens) > self.seq_len:
                phase = int(self.generator.integers(min(self.seq_len, len(tokens) - self.seq_len)))
                starts = np.arange(phase, len(tokens) - self.seq_len, self.seq_len)
                rows.append(np.stack([np.full_like(starts, shard), starts], axis=1))
        return self.generator.permutation(np.concatenate(rows))

    def state_dict(self) -> dict[str, Any]:
        return {"generator": json.dumps(self.generator.bit_generator.state), "left": torch.from_numpy(self.left)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.bit_generator.state = json.loads(state["generator"])
        self.left = state["left"].numpy()


class SequentialLoader(Loader):
    """One window after the other, shard by shard, then from the start again: what the first entries did."""

    def __init__(self, names: Sequence[str], shards: Sequence[np.ndarray], seq_len: int, batch: int) -> None:
        super().__init__(names, shards, seq_len, batch)
        self.shard, self.start = 0, 0

    def next_starts(self) -> list[tuple[int, int]]:
        starts: list[tuple[int, int]] = []
        while len(starts) < self.batch:
            if self.start + self.seq_len < len(self.shards[self.shard]):
                starts.append((self.shard, self.start))
                self.start += self.seq_len
            else:
                self.shard, self.start = (self.shard + 1) % len(self.shards), 0
        return starts

    def state_dict(self) -> dict[str, Any]:
        return {"shard": self.shard, "start": self.start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shard, self.start = state["shard"], state["start"]


def open_loader(
    order: Order,
    names: Sequence[str],
    shards: Sequence[np.ndarray],
    seq_len: int,
    batch: int,
    seed: int = 0,
    world: int = 1,
) -> Loader:
    """A loader by the name of its order; see the classes."""
    if order == "coprime":
        return CoprimeLoader(names, shards, seq_len, batch, world)
    if order == "shuffle":
        return ShuffleLoader(names, shards, seq_len, batch, seed)
    return SequentialLoader(names, shards, seq_len, batch)


def _fnv(names: Iterable[str]) -> int:
    """64-bit hash of the bytes of all names: xor, then multiply."""
    value = 0
    for byte in b"".join(name.encode() for name in names):
        value = ((value ^ byte) * 1099511628211) % (1 << 64)
    return value
