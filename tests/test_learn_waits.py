"""A learning step never makes the host wait for the device: no number is read back, no size hangs on values."""

import contextlib
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from slotfast import ops
from slotfast.errors import InputError
from slotfast.learn import DocumentLoop, FrozenLoop, OnTop, make_loop, parse_row
from slotfast.slot import batch
from slotfast.slot.repeats import Repeats

from .models import random_model

BOS, WINDOW = 5, 12
_WAIT = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim", "bincount"}
_READ = ("cpu", "numpy", "tolist")  # of a tensor: they wait, and no dispatcher sees them on a CPU
TOKENS = torch.randint(6, 37, (40,), generator=torch.Generator().manual_seed(0)).numpy()
TOKENS[[0, 19]] = BOS
# What a CPU does in its own way, where a GPU has a kernel: a check of arguments, and looks at values
_OF_A_CPU = ((ops, "_banded_on_cpu"), (batch, "probabilities"), (batch.Packed, "nll"), (Repeats, "take"))


class _NoWait(TorchDispatchMode):
    """Fails where the host would wait; counts the operators that went through."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += 1
        name = func._schema.name.removeprefix("aten::")
        assert name not in _WAIT, f"{func} makes the host wait"
        if name in ("index", "index_put_", "index_put"):
            masks = [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
            assert not masks, f"{func} makes the host wait for how many of a mask are set"
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _reading_fails(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the host reads a tensor")

    with monkeypatch.context() as patch:
        for name in _READ:
            patch.setattr(torch.Tensor, name, refuse)
        yield


def _unwatched(monkeypatch, owner, name):
    """What is called there may wait; counts the calls."""
    plain, reads, calls = getattr(owner, name), {name: getattr(torch.Tensor, name) for name in _READ}, []

    def run(*args, **kwargs):
        calls.append(name)
        with _disable_current_modes(), monkeypatch.context() as patch:
            for read, found in reads.items():
                patch.setattr(torch.Tensor, read, found)
            return plain(*args, **kwargs)

    monkeypatch.setattr(owner, name, run)
    return calls


def _loop(row, **how):
    parsed, model = parse_row(row), random_model(layers=2, value_layers=(1,), bos_id=BOS)
    return make_loop(model, parsed, WINDOW, 0, BOS, on_top=OnTop.of([parsed], WINDOW, bos_id=BOS), **how)


def _run(loop, on_charged, on_chunk=None):
    loop.run(lambda start, stop: TOKENS[start:stop], len(TOKENS) - 1, on_charged, on_chunk)


@pytest.mark.parametrize(
    "row",
    [
        "lora-doc:chunk=4,rank=2,slots=3",
        "lora-doc:chunk=4,rank=2,slots=3,steps=2,clip=0.5,keys=stale",
        "lora-1530:chunk=4,rank=2,slots=3,optimizer=sgd,momentum=0.9",
    ],
)
def test_no_step_of_documents_waits_for_the_device(monkeypatch, row):
    """What is charged is fetched between steps: that is where a loop may wait."""
    seen = {"_losses": 0, "_learn": 0}

    def watched(name):
        plain = getattr(DocumentLoop, name)

        def run(*args, **kwargs):
            with _NoWait() as mode:
                found = plain(*args, **kwargs)
            seen[name] += mode.seen
            return found

        return run

    _unwatched(monkeypatch, ops, "_banded_on_cpu")
    for name in seen:
        monkeypatch.setattr(DocumentLoop, name, watched(name))
    loop = _loop(row)
    assert isinstance(loop, DocumentLoop)
    _run(loop, lambda charged: None)
    assert min(seen.values()) > 20


STREAM = (
    "learn:chunk=8,rank=2,clip=1",
    "learn:chunk=8,rank=2,steps=2,projections=q/v/head",
    "learn:chunk=8,what=all,optimizer=sgd,momentum=0.9,scope=document",
    "learn:chunk=8,rank=2,scope=document,steps=2",
    "learn:chunk=8,what=norms",
    "learn:chunk=8,what=all,forget=0.5",
    "learn:chunk=8,rank=2+causal",
    "learn:chunk=8,what=norms,scope=document+causal",
)


@pytest.mark.parametrize("row", [*STREAM, None])
def test_a_stream_is_learned_from_without_waiting(monkeypatch, row):
    """But for where charges are handed out; here, in less than a second, that is behind the last chunk alone."""
    monkeypatch.setattr("slotfast.learn.charged._SECONDS", math.inf)
    for owner, name in _OF_A_CPU:
        _unwatched(monkeypatch, owner, name)
    if row is None:
        loop = FrozenLoop(random_model(layers=2, value_layers=(1,), bos_id=BOS), WINDOW, block=8)
    else:
        loop = _loop(row)
    handed_out = _unwatched(monkeypatch, type(loop), "_hand_out")
    order = []
    with _reading_fails(monkeypatch), _NoWait() as mode:
        _run(loop, lambda charged: order.append(charged.start), lambda: order.append("chunk"))
    chunks = order.count("chunk")
    assert len(handed_out) == 1 and order[:chunks] == ["chunk"] * chunks and chunks == len(order) / 2 >= 5
    assert mode.seen > 100 and order[chunks:] == sorted(order[chunks:])


@pytest.mark.parametrize("row", ["learn:chunk=8+causal-bigram", "learn:chunk=8+causal-lbfgs"])
def test_what_waits_is_found(monkeypatch, row):
    """Rows on top that look at values: the test above would fail."""
    with pytest.raises(AssertionError, match="the host"), _reading_fails(monkeypatch), _NoWait():
        _run(_loop(row), lambda charged: None)


@pytest.mark.parametrize("row", [STREAM[1], STREAM[3], STREAM[6]])
def test_charges_are_the_same_however_often_they_are_handed_out(monkeypatch, row):
    def charged(seconds, on_chunk=None, **how):
        monkeypatch.setattr("slotfast.learn.charged._SECONDS", seconds)
        found, loop = [], _loop(row, **how)
        _run(loop, found.append, on_chunk and (lambda: on_chunk(loop, found)))
        return found

    def saved(loop, found):
        loop.state_dict()
        seen.append(found[-1].start + len(found[-1].nll) == loop._done)

    seen = []
    expected = charged(math.inf)
    for found in (charged(0), charged(math.inf, saved), charged(math.inf, keep_logprobs=True)):
        for mine, other in zip(found, expected, strict=True):
            assert mine.start == other.start and torch.equal(mine.nll, other.nll)
            assert (mine.on_top is None and other.on_top is None) or torch.equal(mine.on_top, other.on_top)
    assert len(seen) >= 5 and all(seen)  # a state that is saved has no charges of its own


def test_distributions_are_handed_out_behind_each_chunk():
    order = []
    _run(_loop(STREAM[0], keep_logprobs=True), lambda charged: order.append(0), lambda: order.append(1))
    assert order == [0, 1] * 5


@pytest.mark.parametrize("ends", [KeyboardInterrupt, ValueError])
def test_what_is_charged_is_handed_out_however_a_run_ends(monkeypatch, ends):
    monkeypatch.setattr("slotfast.learn.charged._SECONDS", math.inf)
    found, chunks = [], iter(range(2))

    def stop():
        if next(chunks, None) is None:
            raise ends

    with pytest.raises(ends):
        _run(_loop(STREAM[0]), found.append, stop)
    assert [part.start for part in found] == [0, 8, 16]


@pytest.mark.parametrize("seconds", [0, math.inf])
def test_a_broken_loss_is_named_whenever_it_is_found(monkeypatch, seconds):
    """What was charged before it is handed out, and nothing behind it."""
    monkeypatch.setattr("slotfast.learn.charged._SECONDS", seconds)
    loop, found = _loop(STREAM[0]), []
    forward = loop._forward

    def broken(tokens):
        losses, logits = forward(tokens)
        here = tokens[0] == TOKENS[16]
        return torch.where(here & (torch.arange(len(losses)) >= 4), math.nan, losses), logits

    monkeypatch.setattr(loop, "_forward", broken)
    with pytest.raises(InputError, match="a loss of nan for the token at position 21: broken weights, or lr=0.0005"):
        _run(loop, found.append)
    assert [part.start for part in found] == [0, 8]
