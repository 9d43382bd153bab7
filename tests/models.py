"""Small models for tests: settings of one with every part, and of one with none but a transformer's; an artifact."""

import io
from importlib import resources

import sentencepiece
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
    "softcap": None,
    "rope_dims": 0,
}


# over SMALL
VARIANTS = {
    "every part": {},
    "plain GPT": PLAIN,
    "untied, no groups, even depth": {"tied": False, "kv_heads": 4, "layers": 4, "value_layers": (0,)},
    "documents apart": {"bos_id": 5},
    "gated skips": {"skip_gates": True},
    "a repeated segment": {"loops": 2, "loop_start": 1, "loop_end": 3},
    "parallel residuals": {"parallel_from": 2},
    "all at once": {"bos_id": 5, "skip_gates": True, "loops": 1, "loop_start": 2, "loop_end": 3, "parallel_from": 3},
    "one layer, short of the rope length": {"rope_length": 64, "layers": 1, "value_layers": (0,)},
}


def randomised(config, seed=0, spread=0.4, dtype=torch.float32):
    """A model of a `GPTConfig`, or of what one is made of, in evaluation mode, every weight of it random."""
    torch.manual_seed(seed)
    model = GPT(config if isinstance(config, GPTConfig) else GPTConfig(**config)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():  # zero-initialised parts would hide their mistakes
            parameter.normal_(0, spread)
    return model.eval().requires_grad_(False)


def random_model(**changes):
    """A float64 model of `SMALL` with the changes, every weight of it random."""
    return randomised({**SMALL, **changes}, dtype=torch.float64)


SENTENCES = ["the cat sat on the mat", "a dog and a cat", "  two  spaces  here"] * 20


def write_tokenizer(path, sentences=SENTENCES, **options):
    """Train and write a small tokenizer that loses nothing, unless the options say otherwise."""
    written = io.BytesIO()
    settings = {"vocab_size": 300, "byte_fallback": True, "normalization_rule_name": "identity", "minloglevel": 2}
    settings |= {"remove_extra_whitespaces": False, "hard_vocab_limit": False, "model_type": "bpe", **options}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(sentences), model_writer=written, **settings)
    path.write_bytes(written.getvalue())
    return Tokenizer(path)


def write_tiny(path, seed=0, tokenizer=None, **more):
    """Write a tiny random model, of length 64, of a tokenizer: the demo's by default; `more` is of its settings."""
    torch.manual_seed(seed)
    tokenizer = tokenizer or Tokenizer(str(resources.files("slotfast") / "demo" / "demo.model"))
    sizes = {"seq_len": 64, "layers": 2, "width": 16, "heads": 2, "kv_heads": 1, "mlp_width": 16, "rope_dims": 4}
    config = GPTConfig(**sizes, bigram_buckets=0, value_width=0, vocab_size=tokenizer.vocab_size, **more)
    write_artifact(path, Artifact.from_model(GPT(config), {"tokenizer_sha256": tokenizer.sha256}))


def numbers_held(thing: object) -> int:
    """How many numbers the tensors have that an object holds, at any depth, but those of modules."""
    found, seen, todo = 0, set(), [thing]
    while todo:
        each = todo.pop()
        if id(each) in seen or isinstance(each, torch.nn.Module):
            continue
        seen.add(id(each))
        if isinstance(each, torch.Tensor):
            found += each.numel()
        elif isinstance(each, dict):
            todo += each.values()
        elif isinstance(each, (list, tuple, set)):
            todo += each
        elif hasattr(each, "__dict__"):
            todo += vars(each).values()
    return found
