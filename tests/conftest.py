"""Chooses, before any test imports a kernel, how kernels run: compiled where there is a GPU, else interpreted."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads this when a kernel is decorated, that is at import of a kernel module.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def tiny_model():
    """A random model with every part, in evaluation mode: V = 64, length 32."""
    from slotfast.model import GPT, GPTConfig

    torch.manual_seed(0)
    config = GPTConfig(
        vocab_size=64,
        seq_len=32,
        layers=3,
        width=16,
        heads=2,
        kv_heads=1,
        mlp_width=24,
        rope_dims=4,
        bigram_buckets=32,
        bigram_width=8,
        value_width=8,
        value_layers=(2,),
    )
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():  # zero-initialised parts would hide their mistakes
            parameter.normal_(0, 0.5)
    return model.eval().requires_grad_(False)
