"""A model of nanoGPT's form in `examples.evaluate`: learned positions, and logits that come with a loss.

Called with targets, it gives the logits of all positions and the mean loss; without, those of the last position alone,
which is too little to score with. `slotfast eval --model examples.nanogpt:untrained` knows that form, and calls it with
targets. Its weights here are random: load yours.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .evaluate import bits_per_byte, losses


@dataclass
class GPTConfig:
    """Sizes; block_size is the longest window."""

    block_size: int = 64
    vocab_size: int = 257
    n_layer: int = 2
    n_head: int = 2
    n_embd: int = 32


class Block(nn.Module):
    """Attention and an MLP, each behind a LayerNorm."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.heads, width = config.n_head, config.n_embd
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Float [W, T, D] to the same."""
        parts = self.c_attn(self.ln_1(x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.c_proj(attended)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """Tokens and positions are embedded; the output matrix is the tokens' own."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        nn.init.normal_(self.wte.weight, std=0.02)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Int64 [W, T], T <= block_size, to logits and loss."""
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1], device=idx.device))
        for block in self.h:
            x = block(x)
        x = self.ln_f(x)
        if targets is None:
            return x[:, -1:] @ self.wte.weight.T, None
        logits = x @ self.wte.weight.T
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def untrained() -> GPT:
    """For `--model`: a random one with the vocabulary of the tokenizer that is used where none is named."""
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=1024))


def main() -> None:
    """Score this file's bytes behind a BOS of 256."""
    torch.manual_seed(0)
    tokens = torch.tensor([256, *Path(__file__).read_bytes()])
    token_bytes = torch.tensor([1] * 256 + [0])
    model = GPT(GPTConfig()).eval()
    plain, adapted = losses(lambda idx: model(idx, idx)[0], tokens, length=64, stride=16, bos_id=256)
    print(f"plain {bits_per_byte(plain, token_bytes, tokens):.4f} bpb")
    print(f"adapted {bits_per_byte(adapted, token_bytes, tokens):.4f} bpb")


if __name__ == "__main__":
    main()
