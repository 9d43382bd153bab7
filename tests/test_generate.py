"""Sampling: the draws follow the plain forward's distribution."""

import pytest
import torch

from slotfast.errors import InputError
from slotfast.generate import sample
from tests.models import random_model


def test_samples_are_the_models_own():
    """Each drawn token is what the plain forward's distribution gives at that place in the generator's sequence."""
    model, length, temperature = random_model(), 10, 0.8
    (tokens,) = sample(model, 3, length, temperature=temperature, seed=5)
    generator = torch.Generator().manual_seed(5)
    assert torch.equal(tokens[:, 0], torch.randint(37, (3,), generator=generator))
    logits = model.head(model.hidden(tokens))
    for i in range(length - 1):
        shares = (logits[:, i] / temperature).softmax(-1)
        assert torch.equal(tokens[:, i + 1], torch.multinomial(shares, 1, generator=generator)[:, 0])


def test_temperature_sharpens():
    model = random_model(softcap=0.0)
    (tokens,) = sample(model, 4, 12, temperature=1e-3)
    best = model.head(model.hidden(tokens)).argmax(-1)
    assert torch.equal(tokens[:, 1:], best[:, :-1])


def test_batches_and_seeds():
    model = random_model()
    first, again, other = (list(sample(model, 5, 6, seed=seed, batch=2)) for seed in (1, 1, 2))
    assert [tuple(part.shape) for part in first] == [(2, 6), (2, 6), (1, 6)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0]) and not torch.equal(first[0], first[1])
    assert list(sample(model, 0, 6)) == [] and next(sample(model, 1, 1)).shape == (1, 1)


def test_what_cannot_be_sampled_is_refused():
    model = random_model()
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(InputError, match="expected a positive number"):
            next(sample(model, 1, 4, temperature=temperature))
    model.blocks[2].mlp.fc.weight[3, 4] = torch.nan
    with pytest.raises(InputError, match="logits at position 0 are NaN"):
        next(sample(model, 1, 4))
