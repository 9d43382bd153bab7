"""Loaders: the coprime one against the published description, and that each gives what it promises after a resume."""

from math import gcd

import numpy as np
import pytest
import torch

from slotfast.errors import InputError
from slotfast.loader import CoprimeLoader, SequentialLoader, ShuffleLoader, open_loader

NAMES = [f"data/fineweb_train_{i:06d}.bin" for i in range(40)]
LENGTHS = [700, 33, 2000, 64, 65, 1234, 511, 90, 333, 4000] * 4
SHARDS = [np.arange(n, dtype=np.uint16) + 7 * i for i, n in enumerate(LENGTHS)]


def _described(names, lengths, seq, batch, world, batches):
    """(shard, offset) of every window, batch by batch, as the algorithm is written down; generators, no classes."""
    seed = 0
    for name in names:
        for byte in name.encode():
            seed = (seed ^ byte) * 1099511628211 & (2**64 - 1)
    rng = np.random.Generator(np.random.PCG64(seed))

    def draw(n):
        phase = rng.integers(0, min(seq, n - seq))
        bc = (n - 1 - phase) // seq
        start = rng.integers(0, bc)
        stride = 1
        if bc > 1:
            while True:
                stride = rng.integers(1, bc)
                if gcd(int(stride), int(bc)) == 1:
                    break
        return [(phase + ((start + j * stride) % bc) * seq).item() for j in range(bc)]

    plans = [draw(n) for n in lengths]  # offsets still to come, in order
    for k in range(batches):
        p = min(k / 1800, 1)
        weights = np.array([len(plan) for plan in plans], float) ** (0.9 - 0.4 * p)
        lo, hi = max(8, world), max(32, 8 * world)
        m = min(round(lo + p * (hi - lo)), len(lengths), batch)
        drawn = rng.choice(len(lengths), size=m, replace=False, p=weights / weights.sum())
        extra = rng.multinomial(batch - m, weights[drawn] / weights[drawn].sum())
        piles = []
        for i in rng.permutation(m):
            shard, pile = drawn[i].item(), []
            for _ in range(1 + extra[i]):
                pile.append((shard, plans[shard].pop(0)))
                if not plans[shard]:
                    plans[shard] = draw(lengths[shard])
            piles.append([pile[j] for j in rng.permutation(len(pile))])
        windows = []
        while any(piles):
            piles = [pile for pile in piles if pile]
            windows.extend(piles[i].pop() for i in rng.permutation(len(piles)))
        yield windows


@pytest.mark.parametrize(("world", "batch", "shards"), [(1, 64, 40), (8, 48, 40), (1, 5, 3), (2, 6, 1)])
def test_the_coprime_windows_are_those_of_the_description(world, batch, shards):
    loader = CoprimeLoader(NAMES[:shards], SHARDS[:shards], 32, batch, world)
    for expected in _described(NAMES[:shards], LENGTHS[:shards], 32, batch, world, 30):
        assert loader.next_starts() == expected


def test_more_shards_are_mixed_as_training_goes_on():
    loader = CoprimeLoader(NAMES, SHARDS, 32, 64)
    early = len({shard for shard, _ in loader.next_starts()})
    loader.batches = 1800
    assert early == 8 and len({shard for shard, _ in loader.next_starts()}) == 32


def test_a_shards_blocks_all_come_once_before_any_comes_again():
    loader = CoprimeLoader(NAMES[:1], SHARDS[2:3], 32, 1)
    blocks = loader.cursors[0]["blocks"]
    offsets = [loader.next_starts()[0][1] for _ in range(blocks)]
    assert len(set(offsets)) == blocks and len({offset % 32 for offset in offsets}) == 1
    assert sorted(offsets) == list(range(min(offsets), min(offsets) + 32 * blocks, 32))


def test_the_shuffled_windows_all_come_once_an_epoch():
    loader = ShuffleLoader(NAMES[:3], SHARDS[:3], 32, 1, seed=3)
    epoch = len(loader._epoch())
    loader = ShuffleLoader(NAMES[:3], SHARDS[:3], 32, 1, seed=3)
    seen = [loader.next_starts()[0] for _ in range(epoch)]
    assert len(set(seen)) == epoch and seen != sorted(seen)
    assert {shard for shard, _ in seen} == {0, 1, 2}


def test_sequential_windows_follow_one_another():
    loader = SequentialLoader(NAMES[:3], SHARDS[:3], 300, 4)
    assert loader.next_starts() == [(0, 0), (0, 300), (2, 0), (2, 300)]
    assert loader.next_starts() == [(2, 600), (2, 900), (2, 1200), (2, 1500)]
    assert loader.next_starts()[0] == (0, 0)


@pytest.mark.parametrize("order", ["coprime", "shuffle", "sequential"])
class TestEveryOrder:
    def test_ranks_share_the_batch(self, order):
        whole = open_loader(order, NAMES, SHARDS, 32, 12).next_batch()
        parts = [open_loader(order, NAMES, SHARDS, 32, 12).next_batch(rank, 3) for rank in range(3)]
        assert whole.shape == (12, 33) and whole.dtype == torch.int64
        assert torch.equal(torch.stack(parts, 1).flatten(0, 1), whole)
        assert bool((whole[:, 1:] - whole[:, :-1] == 1).all())

    def test_a_resumed_loader_goes_on_where_it_was(self, order, tmp_path):
        straight = open_loader(order, NAMES, SHARDS, 32, 7)
        for _ in range(60):
            straight.next_starts()
        torch.save(straight.state_dict(), tmp_path / "state")
        resumed = open_loader(order, NAMES, SHARDS, 32, 7)
        resumed.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
        for _ in range(60):
            assert straight.next_starts() == resumed.next_starts()

    def test_a_state_is_a_copy(self, order):
        loader = open_loader(order, NAMES, SHARDS, 32, 7)
        loader.next_starts()
        state = loader.state_dict()
        expected = loader.next_starts()
        loader.next_starts()
        loader.load_state_dict(state)
        assert loader.next_starts() == expected

    def test_a_text_of_few_windows_is_learned_from_again_and_again(self, order):
        loader = open_loader(order, NAMES[:1], [np.arange(30)], 10, 8)
        for _ in range(3):
            batch = loader.next_batch()
            assert batch.shape == (8, 11) and bool((batch[:, 1:] - batch[:, :-1] == 1).all())

    def test_too_little_text_is_refused(self, order):
        with pytest.raises(InputError, match="30 tokens in the longest shard; one training window needs 31"):
            open_loader(order, NAMES[:2], [np.arange(30), np.arange(3)], 30, 2)
