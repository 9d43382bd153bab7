"""Score-first training: what it trains on was scored before, and ranks train as one."""

import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from slotfast.data import ByteTable, Text, TokenStream
from slotfast.eval import SlidingPass
from slotfast.slot import Adapter, parse_preset
from slotfast.ttt import ScoreFirst
from slotfast.windows import Plan

V, L, STRIDE, BOS = 64, 32, 8, 1
BYTES = ByteTable(np.ones(V, np.int64), np.zeros(V, bool), np.zeros(V, bool))


def _tokens(n=300, seed=0):
    tokens = np.random.default_rng(seed).integers(4, V, n)
    tokens[[0, 90, 200]] = BOS
    return tokens


def _run(model, tokens, training, presets=()):
    adapters, scored = [Adapter(parse_preset(name), bos_id=BOS) for name in presets], []
    SlidingPass(
        copy.deepcopy(model),
        Text(TokenStream([np.asarray(tokens)]), BYTES, BOS),
        Plan(len(tokens) - 1, L, STRIDE),
        adapters,
        batch_windows=4,
        training=training,
    ).run(on_scored=scored.append)
    assert np.array_equal(np.concatenate([s.position for s in scored]), np.arange(1, len(tokens)))
    return np.concatenate([s.nll for s in scored], 1)


def _training(**changes):
    return ScoreFirst(**{"chunk": 64, "lr": 0.02, "epochs": 2, "batch": 2} | changes)


def test_no_score_moves_when_a_later_token_changes(tiny_model):
    tokens = _tokens()
    before = _run(tiny_model, tokens, _training(), ["causal", "causal-lbfgs"])
    for flipped in (40, 63, 64, 65, 71, 72, 128, 129, 200, 298):
        other = tokens.copy()
        other[flipped] = 4 + (other[flipped] + 1) % (V - 4)
        after = _run(tiny_model, other, _training(), ["causal", "causal-lbfgs"])
        assert np.array_equal(before[:, : flipped - 1], after[:, : flipped - 1])
        # a later chunk's scores have been trained on it
        assert flipped > 220 or not np.array_equal(before[0, 239:], after[0, 239:])


def test_the_first_chunk_is_scored_untrained_and_the_last_trains_nobody(tiny_model):
    tokens = _tokens()
    plain, trained = _run(tiny_model, tokens, None), _run(tiny_model, tokens, _training())
    windows = _training().chunks(Plan(299, L, STRIDE))
    assert [w for chunk in windows for w in chunk] == list(range(len(Plan(299, L, STRIDE))))
    second = Plan(299, L, STRIDE)[windows[1].start]
    border = second.start + second.context_end
    np.testing.assert_allclose(plain[0, :border], trained[0, :border], atol=1e-5)
    assert np.abs(plain[0, border:] - trained[0, border:]).max() > 1e-3
    whole = _training(chunk=1000)
    np.testing.assert_allclose(plain, _run(tiny_model, tokens, whole), atol=1e-5)
    assert whole._optimizer is None


def test_it_is_plain_sgd(tiny_model):
    """One chunk trained by hand, from the description: momentum, clip, cosine over chunks, sequences in order."""
    tokens, plan, training = _tokens(), Plan(299, L, STRIDE), _training()
    model, expected = copy.deepcopy(tiny_model), copy.deepcopy(tiny_model)
    expected.requires_grad_(True)
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.02, momentum=0.9)
    chunks = training.chunks(plan)
    for chunk in range(2):
        training.train(model, TokenStream([tokens]), plan, chunk)
        optimizer.param_groups[0]["lr"] = 0.02 * (1 + np.cos(np.pi * chunk / (len(chunks) - 1))) / 2
        scored = [plan[w] for w in chunks[chunk]]
        begin, stop = scored[0].start + scored[0].context_end, scored[-1].start + scored[-1].scored_end
        for _ in range(2):
            starts = list(range(begin, stop, L))
            for pair in (starts[i : i + 2] for i in range(0, len(starts), 2)):
                losses = []
                for start in pair:
                    ids = torch.from_numpy(tokens[start : min(start + L, stop) + 1])[None]
                    logits = expected.head(expected.hidden(ids[:, :-1]))
                    losses.append(torch.nn.functional.cross_entropy(logits[0], ids[0, 1:], reduction="none"))
                optimizer.zero_grad()
                torch.cat(losses).mean().backward()
                torch.nn.utils.clip_grad_norm_(expected.parameters(), 1.0)
                optimizer.step()
    for mine, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert (mine - other).abs().max() < 1e-5 * max(1.0, float(other.detach().abs().max()))


def test_it_learns_what_repeats(tiny_model):
    tokens = np.tile(_tokens()[:60], 6)
    plain, trained = _run(tiny_model, tokens, None), _run(tiny_model, tokens, _training(lr=0.05, epochs=4))
    assert trained[0, 120:].mean() < plain[0, 120:].mean() - 0.5


def test_ranks_train_as_one(tmp_path):
    """Two processes with one sequence each step what one process does with two."""
    code = """
import sys, torch, torch.distributed as dist, numpy as np
import torch.distributed.nn.functional  # before there is a group: see slotfast.command.ranks
sys.path.insert(0, {root!r})
from slotfast.data import TokenStream
from slotfast.model import GPT, GPTConfig
from slotfast.ttt import ScoreFirst
from slotfast.windows import Plan
from slotfast.worker import Worker
rank, world = int(sys.argv[1]), int(sys.argv[2])
if world > 1:
    dist.init_process_group("gloo", init_method="file://" + sys.argv[3], rank=rank, world_size=world)
torch.manual_seed(0)
model = GPT(GPTConfig(vocab_size=64, seq_len=32, layers=2, width=16, heads=2, kv_heads=1, mlp_width=24, rope_dims=4,
    bigram_buckets=32, bigram_width=8, value_width=0))
tokens, plan = np.random.default_rng(0).integers(4, 64, 300), Plan(299, 32, 8)
training = ScoreFirst(chunk=64, lr=0.05, epochs=2, batch=2 // world)
for chunk in range(3):
    training.train(model, TokenStream([tokens]), plan, chunk, Worker(rank=rank, world=world))
torch.save([p.detach() for p in model.parameters()], sys.argv[4])
"""
    code = code.format(root=str(Path(__file__).resolve().parents[1]))

    def start(rank, world):
        command = [sys.executable, "-c", code, str(rank), str(world), str(tmp_path / "meet")]
        return subprocess.Popen([*command, str(tmp_path / f"{world}.{rank}.pt")])

    processes = [start(0, 1), start(0, 2), start(1, 2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]
    one, *two = (torch.load(tmp_path / name, weights_only=True) for name in ("1.0.pt", "2.0.pt", "2.1.pt"))
    for a, b, c in zip(one, *two, strict=True):
        assert torch.equal(b, c) and (a - b).abs().max() < 1e-6


@pytest.mark.parametrize("chunk", [1, 7, 64, 100_000])
def test_chunks_split_the_windows(chunk):
    for predictions in (1, 31, 32, 33, 299, 1000):
        plan = Plan(predictions, L, STRIDE)
        chunks = ScoreFirst(chunk=chunk).chunks(plan)
        assert [w for part in chunks for w in part] == list(range(len(plan))) and all(chunks)
