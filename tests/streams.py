"""Windows of a made-up stream, with hidden states and a head that caps, for tests of adaptation."""

import torch

V, L, STRIDE, BOS, D = 50, 24, 6, 1, 12
MATRIX = torch.randn(D, V, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def head(hidden, bias=0.0):
    return 15 * torch.tanh((hidden @ MATRIX.to(hidden) + bias) / 15)


def to_hidden(logits):
    """The states whose head gives these logits, but for rounding."""
    return ((15 * torch.atanh(logits.double() / 15)) @ torch.linalg.pinv(MATRIX)).to(logits)


def stream(windows, seed=0, dtype=torch.float32):
    """Logits of consecutive windows of one stream, targets, context and scored ends; the last window is short."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, V, (L + STRIDE * windows,), generator=generator)
    tokens[torch.randint(0, len(tokens), (3,), generator=generator)] = BOS
    table = 2 * torch.randn(V, V, generator=generator, dtype=dtype)
    starts = STRIDE * torch.arange(windows)
    index = starts[:, None] + torch.arange(L)
    logits = table[tokens[index]] + 0.3 * torch.randn(windows, L, V, generator=generator, dtype=dtype)
    context = torch.where(starts > 0, L - STRIDE, 0)
    scored = torch.full((windows,), L)
    scored[-1] = L - 2
    return head(logits @ torch.linalg.pinv(MATRIX).to(logits)), tokens[index + 1], context, scored
