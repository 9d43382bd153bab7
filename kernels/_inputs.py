"""Windows of logits with their targets and weights: what the kernels that take them share.

How a reference reads them, and how a launch checks them.
"""

import torch

# References: row-wise operations only; matrix products and reductions over the whole batch would round differently in
# another batch.


def _scores_ref(logits, bias, softcap, cap_after_bias):
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)).contiguous()
    b = None if bias is None else bias.to(z.dtype).unsqueeze(-2)  # [1, V] or [W, 1, V]
    if b is not None and (cap_after_bias or softcap is None):
        z = z + b
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    if b is not None and not (cap_after_bias or softcap is None):
        z = z + b
    return z


def _targets_ref(targets, vocabulary, ignore_index):
    """Which positions count, which of those name no token, and an index that is safe to gather with."""
    used = targets != ignore_index
    bad = used & ((targets < 0) | (targets >= vocabulary))
    return used, bad, targets.masked_fill(~used | bad, 0).long()


# Launches


def _check_windows(logits, targets, weights, softcap=None, **others):
    """`others` are vectors of the vocabulary's size, or None: of them, only the device is looked at."""
    if logits.dim() != 3 or logits.shape[-1] == 0 or logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            "logits: expected float32, bfloat16 or float16 [W, T, V] with V > 0, "
            f"got {logits.dtype} {list(logits.shape)}"
        )
    W, T, _ = logits.shape
    if targets.shape != (W, T) or targets.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"targets: expected int64 or int32 {[W, T]}, got {targets.dtype} {list(targets.shape)}")
    if weights is not None and (weights.shape != (W, T) or weights.dtype != torch.float32):
        raise ValueError(f"weights: expected float32 {[W, T]}, got {weights.dtype} {list(weights.shape)}")
    for name, tensor in {"targets": targets, "weights": weights, **others}.items():
        if tensor is not None and tensor.device != logits.device:
            raise ValueError(f"{name}: expected on {logits.device} like logits, got {tensor.device}")
    _check_softcap(softcap)


def _check_softcap(softcap):
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"softcap: expected a finite number above 0, or None, got {softcap}")


def _contiguous(*tensors):
    return (None if tensor is None else tensor.contiguous() for tensor in tensors)
