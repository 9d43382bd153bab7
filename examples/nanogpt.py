"""A model of nanoGPT's form in `examples.evaluate`: learned positions, and logits that come with a loss.

Called with targets, it gives the logits of all positions and the mean loss; without, those of the last position alone,
which is too little to score with. Its weights here are random: load yours.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .evaluate import bits_per_byte, losses


class Block(nn.Module):
    """Attention and an MLP, each behind a LayerNorm."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
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

    def __init__(self, vocab_size: int = 257, block_size: int = 64, layers: int = 2, width: int = 32, heads: int = 2):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab_size, width), nn.Embedding(block_size, width)
        self.h = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width)
        nn.init.normal_(self.wte.weight, std=0.02)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Int64 [W, T], T <= block_size, to logits and loss."""
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1]))
        for block in self.h:
            x = block(x)
        x = self.ln_f(x)
        if targets is None:
            return x[:, -1:] @ self.wte.weight.T, None
        logits = x @ self.wte.weight.T
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def main() -> None:
    """Score this file's bytes behind a BOS of 256."""
    torch.manual_seed(0)
    tokens = torch.tensor([256, *Path(__file__).read_bytes()])
    token_bytes = torch.tensor([1] * 256 + [0])
    model = GPT().eval()
    plain, adapted = losses(lambda idx: model(idx, idx)[0], tokens, length=64, stride=16, bos_id=256)
    print(f"plain {bits_per_byte(plain, token_bytes, tokens):.4f} bpb")
    print(f"adapted {bits_per_byte(adapted, token_bytes, tokens):.4f} bpb")


if __name__ == "__main__":
    main()
