"""A model of nanochat's form in `examples.evaluate`: rotary positions, norms without weights, a soft cap on the logits.

Called without targets, it gives the logits of all positions, of a vocabulary that is padded to a multiple of 64: the
padding is cut off before they are scored, for no token has its probability. `slotfast eval --model` runs it as it is:
`--model examples.nanochat:untrained`. What `stream` adds lets it read every token once, with `--forward stream`. Its
weights here are random: load yours.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .evaluate import bits_per_byte, losses

Past = tuple[Tensor, Tensor]  # keys and values of earlier tokens, float [1, H, P, D]


@dataclass
class ChatConfig:
    """Sizes; sequence_len is the window that it was trained on."""

    sequence_len: int = 64
    vocab_size: int = 257
    n_layer: int = 2
    n_head: int = 2
    n_embd: int = 32


def norm(x: Tensor) -> Tensor:
    """To a root mean square of 1."""
    return F.rms_norm(x, (x.shape[-1],))


def rotate(x: Tensor, first: int) -> Tensor:
    """Float [W, H, T, D] turned by positions first, first + 1, ..."""
    half = x.shape[-1] // 2
    places = first + torch.arange(x.shape[-2], device=x.device)
    turns = places[:, None] * 10000.0 ** (-torch.arange(half, device=x.device) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * turns.cos() + b * turns.sin(), b * turns.cos() - a * turns.sin()], -1)


class Block(nn.Module):
    """Attention over normalised queries and keys, and an MLP with a squared ReLU."""

    def __init__(self, config: ChatConfig):
        super().__init__()
        self.heads, self.window, width = config.n_head, config.sequence_len, config.n_embd
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, first: int = 0, past: Past | None = None) -> tuple[Tensor, Past]:
        """Float [W, T, D] at positions from `first` on, behind a past, to the same, and what the next ones may see."""
        y = norm(x)
        q, k, v = (each(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in (self.q, self.k, self.v))
        q, k = norm(rotate(q, first)), norm(rotate(k, first))
        if past is not None:
            k, v = (torch.cat(both, 2) for both in zip(past, (k, v), strict=True))
        queries = torch.arange(x.shape[1], device=x.device)[:, None] + k.shape[2] - x.shape[1]
        distance = queries - torch.arange(k.shape[2], device=x.device)
        visible = (distance >= 0) & (distance < self.window)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v, visible).transpose(1, 2).flatten(2))
        kept = max(0, k.shape[2] - (self.window - 1))
        return x + self.down(self.up(norm(x)).relu().square()), (k[:, :, kept:], v[:, :, kept:])


class Chat(nn.Module):
    """Embedding and output matrix of their own, and logits within +-15."""

    def __init__(self, config: ChatConfig):
        super().__init__()
        padded = -(-config.vocab_size // 64) * 64
        self.config = config
        self.wte, self.lm_head = nn.Embedding(padded, config.n_embd), nn.Linear(config.n_embd, padded, bias=False)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        """Int64 [W, T] to logits, or to the mean loss where targets are given."""
        logits, _ = self.stream(idx, None)
        return logits if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def stream(self, idx: Tensor, state: tuple[int, list[Past]] | None) -> tuple[Tensor, tuple[int, list[Past]]]:
        """Logits of the next tokens, int64 [1, T], and the state behind them: a position, and a past for each block."""
        first, pasts = (0, [None] * len(self.h)) if state is None else state
        x, kept = norm(self.wte(idx)), []
        for block, past in zip(self.h, pasts, strict=True):
            x, new = block(x, first, past)
            kept.append(new)
        logits = self.lm_head(norm(x))[..., : self.config.vocab_size]
        return 15 * torch.tanh(logits / 15), (first + idx.shape[1], kept)


def untrained() -> Chat:
    """For `--model`: a random one with the vocabulary of the tokenizer that is used where none is named."""
    torch.manual_seed(0)
    return Chat(ChatConfig(vocab_size=1024))


def main() -> None:
    """Score this file's bytes behind a BOS of 256."""
    torch.manual_seed(0)
    tokens = torch.tensor([256, *Path(__file__).read_bytes()])
    token_bytes = torch.tensor([1] * 256 + [0])
    plain, adapted = losses(Chat(ChatConfig()).eval(), tokens, length=64, stride=16, bos_id=256)
    print(f"plain {bits_per_byte(plain, token_bytes, tokens):.4f} bpb")
    print(f"adapted {bits_per_byte(adapted, token_bytes, tokens):.4f} bpb")


if __name__ == "__main__":
    main()
