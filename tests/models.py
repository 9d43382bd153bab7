"""Settings of a small model with every part, and of one with none but a transformer's, for tests."""

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
