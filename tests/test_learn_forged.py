"""A saved state that was made to deceive ends with the one line, or does no harm."""

import copy
import random

import pytest
import torch

from slotfast.errors import InputError

from .models import random_model
from .test_learn_resume import _Killed, _pass

ROWS = (
    "learn:chunk=8,lr=0.02,rank=2,steps=2",
    "learn:chunk=8,lr=0.02,what=all,optimizer=sgd,momentum=0.9",
    "learn:chunk=7,lr=0.02,what=norms,scope=document",
)
REFUSED = (LookupError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError)  # by `Saver`


def _paths(state, path=()):
    yield path
    pairs = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, (list, tuple)) else ()
    for key, value in pairs:
        yield from _paths(value, (*path, key))


def _at(state, path):
    for key in path:
        state = state[key]
    return state


def _with(state, path, value):
    if not path:
        return value
    parts = dict(state) if isinstance(state, dict) else list(state)
    parts[path[0]] = _with(state[path[0]], path[1:], value)
    return type(state)(parts)


def _forgeries(value):
    yield from (None, "x", -1, 1 << 40, 1 << 70, 1e308, float("nan"), True, [], {}, (), [1], {"a": 1})
    yield from (torch.zeros(0), torch.zeros(3, 5, dtype=torch.int64), torch.zeros(1).expand(1 << 38))
    if isinstance(value, torch.Tensor):
        yield from (value.to(torch.int32), value.to(torch.complex64), value[..., None], value.flatten()[:1])
        yield from (
            torch.full_like(value, -1),
            torch.full_like(value, 1 << 30),
            value.to("meta"),
            torch.cat([value] * 2),
        )
        yield from (
            (value.new_zeros(()).expand(1 << 20, *value.shape[1:]), value[:0], value.mT) if value.dim() > 1 else ()
        )
    if isinstance(value, (list, tuple)):
        yield from (type(value)(value[1:]), type(value)([*value, *value]))
    if isinstance(value, dict) and value:
        yield dict(list(value.items())[1:])
    if type(value) is int:
        yield from (value + 1, 1000 * value, float(value))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("row", ROWS)
def test_a_forged_state_of_a_stream_does_no_harm(row):
    model = random_model(layers=2, value_layers=(1,))
    killed, left, states = _pass(model, row), iter(range(3)), []

    def kill():
        if next(left, None) is None:
            states.append(copy.deepcopy(killed.state_dict()))
            raise _Killed

    with pytest.raises(_Killed):
        killed.run(on_chunk=kill)
    cases = []
    for path in _paths(states[0]):
        old = _at(states[0], path)
        if not (isinstance(old, torch.Tensor) and not old.dim()):
            cases += [(path, forged) for forged in _forgeries(old)]
    ended = {"refused": 0, "went on": 0}
    for path, forged in random.Random(0).sample(cases, 400):
        going = _pass(model, row)
        try:
            going.load_state_dict(_with(copy.deepcopy(states[0]), path, forged))
        except REFUSED:
            ended["refused"] += 1
            continue
        ended["went on"] += 1
        try:
            going.run()
        except InputError:
            continue
        except Exception as error:
            raise AssertionError(f"{path}: {forged!r:.80}") from error
        assert going.nll.shape == (1, 57) and going.charged == 57
    assert ended["refused"] > 100 and ended["went on"] > 5, ended


def test_a_state_is_not_taken_for_one_of_another_place():
    """Its own parts disagree."""
    model = random_model(layers=2, value_layers=(1,))
    passed = _pass(model, ROWS[0])
    passed.run()
    state = passed.state_dict()
    for name, value in (
        ("charged", 49),
        ("charged", 58),
        ("charged", 57.0),
        ("nll", {}),
        ("nll", {1: state["nll"][0]}),
    ):
        with pytest.raises(ValueError, match="expected"):
            _pass(model, ROWS[0]).load_state_dict({**state, name: value})
