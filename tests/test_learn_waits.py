"""A learning step never makes the host wait for the device: no number is read back, no size hangs on values."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from slotfast import ops
from slotfast.learn import DocumentLoop, LearningLoop, make_loop, parse_row

from .models import random_model

BOS, WINDOW = 5, 12
_WAIT = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim"}


class _NoWait(TorchDispatchMode):
    """Fails where the host would wait; counts the operators that went through."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += 1
        assert func._schema.name.removeprefix("aten::") not in _WAIT, f"{func} makes the host wait"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("kind", "parts", "row"),
    [
        (DocumentLoop, ("_losses", "_learn"), "lora-doc:chunk=4,rank=2,slots=3"),
        (DocumentLoop, ("_losses", "_learn"), "lora-doc:chunk=4,rank=2,slots=3,steps=2,clip=0.5,keys=stale"),
        (DocumentLoop, ("_losses", "_learn"), "lora-1530:chunk=4,rank=2,slots=3,optimizer=sgd,momentum=0.9"),
        (LearningLoop, ("_forward", "_learn"), "learn:chunk=8,rank=2,steps=2,clip=1"),
        (LearningLoop, ("_forward", "_learn"), "learn:chunk=8,what=all,optimizer=sgd,momentum=0.9,scope=document"),
        (LearningLoop, ("_forward", "_learn"), "learn:chunk=8,what=norms"),
    ],
)
def test_no_step_waits_for_the_device(monkeypatch, kind, parts, row):
    """What is charged is fetched between steps: that is where a loop may wait."""
    seen = dict.fromkeys(parts, 0)

    def watched(name):
        plain = getattr(kind, name)

        def run(*args, **kwargs):
            with _NoWait() as mode:
                found = plain(*args, **kwargs)
            seen[name] += mode.seen
            return found

        return run

    on_cpu = ops._banded_on_cpu

    def banded_on_cpu(*args):
        with _disable_current_modes():  # a CPU's own check of its arguments; a GPU has a kernel in its place
            return on_cpu(*args)

    monkeypatch.setattr(ops, "_banded_on_cpu", banded_on_cpu)
    for name in parts:
        monkeypatch.setattr(kind, name, watched(name))
    tokens = torch.randint(6, 37, (40,), generator=torch.Generator().manual_seed(0))
    tokens[[0, 19]] = BOS
    stream = tokens.numpy()
    loop = make_loop(random_model(layers=2, value_layers=(1,), bos_id=BOS), parse_row(row), WINDOW, 0, BOS)
    assert isinstance(loop, kind)
    loop.run(lambda start, stop: stream[start:stop], len(tokens) - 1, lambda charged: None)
    assert min(seen.values()) > 20
