"""Sampling with a cache: every step is the plain forward's position, and the draws follow its distribution."""

import pytest
import torch
from pydantic import Field

import slotfast.generate
from slotfast.errors import InputError
from slotfast.generate import Decoder, sample
from slotfast.model import GPT, GPTConfig
from tests.models import PLAIN, SMALL

VARIANTS = {
    "every part": {},
    "plain GPT": PLAIN,
    "untied, one head group, even depth": {"tied": False, "kv_heads": 4, "layers": 4, "value_layers": (0,)},
    "documents apart": {"bos_id": 5},
    "gated skips": {"skip_gates": True},
    "a repeated segment": {"loops": 2, "loop_start": 1, "loop_end": 3},
    "everything at once": {
        "bos_id": 5,
        "skip_gates": True,
        "loops": 1,
        "loop_start": 2,
        "loop_end": 3,
        "parallel_from": 3,
    },
    "parallel residuals": {"parallel_from": 2},
    "one layer, short of the rope length": {"rope_length": 64, "layers": 1, "value_layers": (0,)},
}


def _random_model(**changes) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SMALL, **changes})).double()
    with torch.no_grad():
        for parameter in model.parameters():  # zero-initialised parts would hide their mistakes
            parameter.normal_(0, 0.4)
    return model.eval().requires_grad_(False)


def _steps(model, tokens, dtype=None):
    decoder = Decoder(model, *tokens.shape, dtype)
    return torch.stack([decoder.step(column) for column in tokens.T], 1)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_every_step_is_a_position_of_the_forward(changes, dtype, tolerance):
    model = _random_model(**changes)
    tokens = torch.randint(37, (3, 12), generator=torch.Generator().manual_seed(1))
    tokens[0, 4] = tokens[1, 0] = tokens[2, 11] = 5
    expected = model.head(model.hidden(tokens, dtype))
    got = _steps(model, tokens, dtype)
    assert got.dtype == expected.dtype
    assert (got - expected).abs().max() < tolerance * expected.abs().max()


def test_a_model_whose_repetitions_are_off_is_sampled_without_them():
    model = _random_model(loops=2, loop_start=1, loop_end=3, layers=6, xsa_layers=4)
    model.looping = False
    tokens = torch.randint(37, (1, 12), generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(_steps(model, tokens), model.head(model.hidden(tokens)))


def test_the_length_decides_the_rotary_base():
    model = _random_model()
    tokens = torch.randint(37, (1, 12), generator=torch.Generator().manual_seed(1))
    short, long = Decoder(model, 1, 9), Decoder(model, 1, 12)
    different = [not torch.allclose(short.step(tokens[:, i]), long.step(tokens[:, i])) for i in range(9)]
    assert different == [False] + [True] * 8  # the first position attends to itself alone
    with pytest.raises(IndexError, match="9 positions"):
        short.step(tokens[:, 9])


def test_samples_are_the_models_own():
    """Each drawn token is what the plain forward's distribution gives at that place in the generator's sequence."""
    model, length, temperature = _random_model(), 10, 0.8
    (tokens,) = sample(model, 3, length, temperature=temperature, seed=5)
    generator = torch.Generator().manual_seed(5)
    assert torch.equal(tokens[:, 0], torch.randint(37, (3,), generator=generator))
    logits = model.head(model.hidden(tokens))
    for i in range(length - 1):
        shares = (logits[:, i] / temperature).softmax(-1)
        assert torch.equal(tokens[:, i + 1], torch.multinomial(shares, 1, generator=generator)[:, 0])


def test_temperature_sharpens():
    model = _random_model(softcap=0.0)
    (tokens,) = sample(model, 4, 12, temperature=1e-3)
    best = model.head(model.hidden(tokens)).argmax(-1)
    assert torch.equal(tokens[:, 1:], best[:, :-1])


def test_batches_and_seeds():
    model = _random_model()
    first, again, other = (list(sample(model, 5, 6, seed=seed, batch=2)) for seed in (1, 1, 2))
    assert [tuple(part.shape) for part in first] == [(2, 6), (2, 6), (1, 6)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0]) and not torch.equal(first[0], first[1])
    assert list(sample(model, 0, 6)) == [] and next(sample(model, 1, 1)).shape == (1, 1)


def test_a_packed_model_samples(tiny_model):
    from slotfast.artifact import Artifact

    packed = Artifact.from_model(tiny_model, {}).model("int6", "torch")
    tokens = torch.randint(64, (2, 32), generator=torch.Generator().manual_seed(3))
    assert (_steps(packed, tokens) - packed.head(packed.hidden(tokens))).abs().max() < 1e-3


def test_what_cannot_be_sampled_is_refused(monkeypatch):
    model = _random_model()
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(InputError, match="expected a positive number"):
            next(sample(model, 1, 4, temperature=temperature))
    model.blocks[2].mlp.fc.weight[3, 4] = torch.nan
    with pytest.raises(InputError, match="logits at position 0 are NaN"):
        next(sample(model, 1, 4))

    class Extended(GPTConfig):
        experts: int = Field(0)

    monkeypatch.setattr(slotfast.generate, "GPTConfig", Extended)
    for value, refused in ((0, False), (2, True)):
        model = _random_model()
        model.config = Extended(**SMALL, experts=value)
        if refused:
            with pytest.raises(InputError, match="a model with experts 2 is not supported"):
                Decoder(model, 1, 4)
        else:
            Decoder(model, 1, 4).step(torch.tensor([3]))
