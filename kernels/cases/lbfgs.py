"""Inputs and cases of `lbfgs_push` and `lbfgs_direction`; `history_type` is the tuple that they take."""

import torch

from ..spec import Case

CASES = (
    Case("no problem", {"W": 0, "H": 3, "V": 8}),
    Case("one variable, one pair", {"W": 2, "H": 1, "V": 1}),
    Case("memories of different ages and fillings", {"W": 7, "H": 5, "V": 33, "counts": [0, 1, 4, 5]}),
    Case("BLOCK - 1", {"W": 2, "H": 4, "V": 63, "counts": [3, 4]}),
    Case("BLOCK + 1", {"W": 2, "H": 4, "V": 65, "counts": [4, 2]}),
    Case("prime, history not a power of two", {"W": 2, "H": 7, "V": 509}),
    Case("longest history asked for", {"W": 1, "H": 32, "V": 100}),
    Case("the contest's smallest vocabulary", {"W": 2, "H": 20, "V": 1024, "counts": [20, 11]}),
    Case("largest V", {"W": 1, "H": 2, "V": 8192}),
    Case("strided", {"W": 3, "H": 2, "V": 40, "edit": "strided"}),
    Case("production", {"W": 1024, "H": 20, "V": 1024}, production=True),
    Case("production, V 4096", {"W": 512, "H": 20, "V": 4096}, production=True),
    Case("production, V 8192", {"W": 256, "H": 20, "V": 8192}, production=True),
)
PUSH_CASES = (*CASES, Case("refused pairs", {"W": 5, "H": 3, "V": 48, "counts": [3, 1], "edit": "refused"}))
DIRECTION_CASES = (*CASES, Case("poor problems", {"W": 4, "H": 3, "V": 48, "edit": "poor"}))


def _memory(generator, W, H, V, counts):
    """Pairs y = A s + noise with A diagonal in [0.5, 2]; problem w holds counts[w % len] of them, at any turn of the
    ring; NaN where there is none."""
    device = generator.device
    drawing = {"generator": generator, "device": device}
    scale = torch.exp2(2 * torch.rand(V, **drawing) - 1)
    s = torch.randn(W, H, V, **drawing)
    y = scale * s
    count = [(counts or [H])[w % len(counts or [H])] for w in range(W)]
    count = torch.tensor(count, dtype=torch.int32, device=device)
    head = torch.randint(H, (W,), dtype=torch.int32, **drawing)
    ys, newest = (s * y).sum(-1), (head.long() - 1) % H
    gamma = (ys / (y * y).sum(-1)).gather(1, newest[:, None])[:, 0]
    ages = torch.arange(H, device=device)
    empty = (head.long()[:, None] - 1 - ages) % H
    empty = torch.zeros(W, H, dtype=torch.bool, device=device).scatter_(1, empty, ages >= count[:, None])
    s[empty], y[empty] = torch.nan, torch.nan
    rho = torch.where(empty, torch.nan, 1 / ys)
    return s, y, rho, torch.where(count > 0, gamma, 1.0), head, count


def push_inputs(history_type, generator, device, dtype, *, W, H, V, counts=None, edit=None):
    history = history_type(*_memory(generator, W, H, V, counts))
    drawing = {"generator": generator, "device": generator.device}
    s = torch.randn(W, V, **drawing)
    y = s * torch.rand(W, V, **drawing)
    if edit == "refused":  # a zero step, negative curvature, NaN, curvature below the threshold; and one that is kept
        s[0], y[1], y[2, V // 2] = 0, -y[1], torch.nan
        s[3], y[3] = 1e-6, 1e-6 / V
    elif edit == "strided":
        s, y = torch.stack((s, y), -1).unbind(-1)
    return {"history": history_type(*(tensor.to(device) for tensor in history)), "s": s.to(device), "y": y.to(device)}


def direction_inputs(history_type, generator, device, dtype, *, W, H, V, counts=None, edit=None):
    history = history_type(*_memory(generator, W, H, V, counts))
    gradient = torch.randn(W, V, generator=generator, device=generator.device)
    if edit == "poor":
        gradient[0, 0], gradient[1] = torch.nan, 0
        history.s[2, (int(history.head[2]) - 1) % H, 0] = torch.inf
    elif edit == "strided":
        gradient = torch.stack((gradient, gradient), -1)[..., 0]
    return {"history": history_type(*(tensor.to(device) for tensor in history)), "gradient": gradient.to(device)}
