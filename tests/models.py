"""Small models for tests: settings of one with every part, and of one with none but a transformer's; an artifact."""

from importlib import resources

import torch

from slotfast.artifact import Artifact, write_artifact
from slotfast.data import Tokenizer
from slotfast.model import GPT, GPTConfig

SMALL = {
    "vocab_size": 37,
    "seq_len": 12,
    "layers": 5,
    "width": 24,
    "heads": 4,
    "kv_heads": 2,
    "mlp_width": 20,
    "rope_dims": 4,
    "rope_length": 8,
    "xsa_layers": 3,
    "bigram_buckets": 11,
    "bigram_width": 6,
    "value_width": 5,
    "value_layers": (1, 4),
    "softcap": 3.0,
    "qk_gain": 1.7,
}
# over SMALL
PLAIN = {
    "xsa_layers": 0,
    "bigram_buckets": 0,
    "smear": False,
    "value_width": 0,
    "ln_scale": False,
    "unet": False,
    "softcap": 0.0,
    "rope_dims": 0,
}


def write_tiny(path, seed=0):
    """Write a tiny random model of the demo tokenizer, of length 64."""
    torch.manual_seed(seed)
    tokenizer = Tokenizer(str(resources.files("slotfast") / "demo" / "demo.model"))
    sizes = {"seq_len": 64, "layers": 2, "width": 16, "heads": 2, "kv_heads": 1, "mlp_width": 16, "rope_dims": 4}
    config = GPTConfig(**sizes, bigram_buckets=0, value_width=0, vocab_size=tokenizer.vocab_size)
    write_artifact(path, Artifact.from_model(GPT(config), {"tokenizer_sha256": tokenizer.sha256}))
