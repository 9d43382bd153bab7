"""A model of nanochat's form in `examples.evaluate`: rotary positions, norms without weights, a soft cap on the logits.

Called without targets, it gives the logits of all positions, of a vocabulary that is padded to a multiple of 64: the
padding is cut off before they are scored, for no token has its probability. Its weights here are random: load yours.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .evaluate import bits_per_byte, losses


def norm(x: Tensor) -> Tensor:
    """To a root mean square of 1."""
    return F.rms_norm(x, (x.shape[-1],))


def rotate(x: Tensor) -> Tensor:
    """Float [W, H, T, D] turned by position."""
    half = x.shape[-1] // 2
    turns = torch.arange(x.shape[-2])[:, None] * 10000.0 ** (-torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * turns.cos() + b * turns.sin(), b * turns.cos() - a * turns.sin()], -1)


class Block(nn.Module):
    """Attention over normalised queries and keys, and an MLP with a squared ReLU."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Float [W, T, D] to the same."""
        y = norm(x)
        q, k, v = (each(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in (self.q, self.k, self.v))
        q, k = norm(rotate(q)), norm(rotate(k))
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(self.up(norm(x)).relu().square())


class Chat(nn.Module):
    """Embedding and output matrix of their own, and logits within +-15."""

    def __init__(self, vocab_size: int = 257, layers: int = 2, width: int = 32, heads: int = 2):
        super().__init__()
        padded = -(-vocab_size // 64) * 64
        self.vocab_size = vocab_size
        self.wte, self.lm_head = nn.Embedding(padded, width), nn.Linear(width, padded, bias=False)
        self.h = nn.ModuleList(Block(width, heads) for _ in range(layers))

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        """Int64 [W, T] to logits, or to the mean loss where targets are given."""
        x = norm(self.wte(idx))
        for block in self.h:
            x = block(x)
        logits = 15 * torch.tanh(self.lm_head(norm(x))[..., : self.vocab_size] / 15)
        return logits if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def main() -> None:
    """Score this file's bytes behind a BOS of 256."""
    torch.manual_seed(0)
    tokens = torch.tensor([256, *Path(__file__).read_bytes()])
    token_bytes = torch.tensor([1] * 256 + [0])
    plain, adapted = losses(Chat().eval(), tokens, length=64, stride=16, bos_id=256)
    print(f"plain {bits_per_byte(plain, token_bytes, tokens):.4f} bpb")
    print(f"adapted {bits_per_byte(adapted, token_bytes, tokens):.4f} bpb")


if __name__ == "__main__":
    main()
