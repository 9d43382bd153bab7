"""Windows of logits with their targets, biases and weights, as the specs draw them for their cases."""

import torch


def draw(generator, device, dtype, *, W, T, V, bias=None, weights=False, scale=3.0, edit=None, **options):
    """Arguments of a kernel: logits of a plausible spread, targets, and a bias and weights where asked for.

    `bias` is for "windows", "shared" or None, `edit` names what is unusual, `options` are passed on.
    """
    drawing = {"generator": generator, "device": generator.device}

    def normal(*shape):
        return torch.randn(shape, dtype=torch.float32, **drawing)

    logits = (scale * normal(W, T, V)).to(dtype)
    targets = torch.randint(V, (W, T), **drawing)
    if edit == "strided":  # V outermost, every second position
        logits = torch.stack([logits, logits], 2).permute(3, 1, 2, 0).contiguous()[:, :, 0].permute(2, 1, 0)
    elif edit == "narrow":  # a slice of a wider vocabulary; int32 targets
        logits, targets = torch.cat([logits, logits], -1)[..., :V], targets.int()
    elif edit == "some ignored":
        targets[torch.rand(W, T, **drawing) < 0.4] = options.get("ignore_index", -100)
    elif edit == "all ignored":
        targets[:] = -100
        logits[0] = torch.nan
    elif edit == "poor rows":  # each spoils only itself; the ignored one nothing
        targets[0, 0], targets[0, 1], targets[1, 0] = V, -1, -100
        logits[0, 2, 0], logits[0, 3, V - 1], logits[1, 0] = torch.nan, torch.inf, torch.nan
        logits[1, 1] = -torch.inf
    elif edit == "banned":
        logits[..., : V // 2] = -torch.inf
        targets = targets.clamp(min=V // 2)
    drawn = {"logits": logits, "targets": targets}
    if bias is not None:
        drawn["bias"] = normal(*((V,) if bias == "shared" else (W, V)))
    if weights:
        drawn["weights"] = torch.rand(W, T, **drawing)
        drawn["weights"][torch.rand(W, T, **drawing) < 0.3] = 0.0
        drawn["weights"][-1] = 0.0  # a window that weighs nothing
    return {name: tensor.to(device) for name, tensor in drawn.items()} | options
