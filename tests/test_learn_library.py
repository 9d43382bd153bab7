"""`slotfast.learn(...)`: any module of torch with linear layers in one call, and what it says of bad input."""

import inspect
import subprocess
import sys

import pytest
import torch
from torch import nn

import slotfast
from slotfast.errors import InputError

V = 50


class Plain(nn.Module):
    """Somebody's model, as it is when it was just made: in training mode, with dropout."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.mix = nn.Embedding(V, 16), nn.GRU(16, 16, batch_first=True)
        self.drop, self.out = nn.Dropout(0.5), nn.Linear(16, V)

    def forward(self, tokens):
        return self.out(self.drop(self.mix(self.table(tokens))[0]))


def _tokens(n=200):
    return torch.arange(n) % 7 + 1


def test_it_is_called_beside_adapt_without_another_import():
    lines = ("import slotfast, sys", "assert 'torch' not in sys.modules")
    code = "\n".join([*lines, "print(slotfast.learn.__name__, callable(slotfast.learn))"])
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["slotfast.learn", "True"]
    from slotfast.learn import Learning, learn

    assert inspect.signature(slotfast.learn) == inspect.signature(learn)
    assert slotfast.learn.Learning is Learning


def test_a_model_runs_as_in_evaluation_and_is_left_as_it_was():
    model = Plain()
    model.mix.eval()
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    found = slotfast.learn(model, _tokens(), "learn:lr=1e-2,chunk=16", window=32)
    assert model.training and model.drop.training and not model.mix.training
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    again = slotfast.learn(model.eval(), _tokens(), "learn:lr=1e-2,chunk=16", window=32)
    assert torch.equal(found.nll, again.nll) and torch.equal(found.unlearned, again.unlearned)
    assert found.nll[100:].mean() < found.unlearned[100:].mean() - 0.1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"tokens": [1, 2, 3]}, "tokens of type list: expected a tensor, int"),
        ({"tokens": _tokens().float()}, r"tokens \[200\], torch.float32: expected int \[N\] with at least 2"),
        ({"tokens": _tokens()[None]}, r"tokens \[1, 200\], torch.int64: expected int"),
        ({"tokens": _tokens()[:1]}, r"tokens \[1\]"),
        ({"tokens": _tokens() - 2}, "tokens -1 to 5: expected 0 or more"),
        ({"window": 0}, "window 0: expected at least 1"),
        ({"window": -3}, "window -3: expected at least 1"),
        ({"sinks": -1}, "sinks -1: expected at least 0"),
        ({"sinks": 2}, "sinks 2: the model has no keys that could stay"),
        ({"row": 3}, "row of type int: expected NAME"),
        ({"row": "causal"}, "'causal' learns nothing: slotfast.adapt runs it"),
        ({"row": "learn:betas=0.9"}, "betas=0.9: expected two numbers, as 0.9"),
        ({"row": "learn:betas=a+b"}, "expected two numbers, as 0.9"),
        ({"row": "lora-1530:short=a"}, "short=a: expected pairs of tokens and chunk, as 2000"),
        ({"row": "lora-1530:short=5+5+5"}, "expected pairs of tokens and chunk"),
        ({"row": "learn:top=causal"}, "'top' does nothing here"),
        ({"row": "learn:name=x"}, "'name' does nothing here"),
    ],
)
def test_bad_input_ends_with_one_line(given, said):
    how = {"tokens": _tokens(), "row": "learn:chunk=16", "window": 32} | given
    with pytest.raises(InputError, match=said) as raised:
        slotfast.learn(Plain(), how.pop("tokens"), how.pop("row"), **how)
    assert "\n" not in str(raised.value)


def test_tokens_outside_of_a_known_vocabulary_are_refused():
    model = Plain()
    model.config = type("Config", (), {"vocab_size": V})()
    with pytest.raises(InputError, match="tokens 44 to 50: expected 0 to 49"):
        slotfast.learn(model, _tokens() + 43, "learn:chunk=16", window=32)
