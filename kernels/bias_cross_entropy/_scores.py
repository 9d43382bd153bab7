"""What every kernel here does with a logit: its score, from bias and softcap; and which targets count."""

from .._tile import _tile_arguments
from .._triton import _LOG2E, tl, triton


def _cap(softcap, cap_after_bias):
    return "none" if softcap is None else "after" if cap_after_bias else "before"


def _score_arguments(logits, bias, options, tile):
    """What every kernel that reads logits takes, by name; `options` are softcap, cap_after_bias, ignore_index."""
    _, T, V = logits.shape
    softcap, cap_after_bias, ignore_index = options
    return {
        "bias_ptr": bias,
        "T": T,
        "V": V,
        "stride_lw": logits.stride(0),
        "stride_lt": logits.stride(1),
        "stride_lv": logits.stride(2),
        "stride_bw": 0 if bias is None or bias.dim() == 1 else bias.stride(0),
        "softcap": 1.0 if softcap is None else float(softcap),
        "ignore_index": ignore_index,
        "CAP": _cap(softcap, cap_after_bias),
        **_tile_arguments(tile, V),
    }


@triton.jit
def _softcap(a, softcap):
    """softcap * tanh(a / softcap) to 2 ulp.

    1 - 2 / (exp(2x) + 1) cancels near 0; there an odd polynomial, fitted by least squares, takes over.
    """
    inverse = 1.0 / softcap
    y = a * a * (inverse * inverse)
    q = -0.005893945302384097 * y + 0.020794617709385475
    q = q * y - 0.05378329300012262
    q = q * y + 0.13331915298812771
    q = q * y - 0.33333297510128557
    far = softcap - 2.0 * softcap / (tl.exp2(a * (inverse * (2.0 * _LOG2E))) + 1.0)
    return tl.where(y < 0.36, a + a * y * q, far)


@triton.jit
def _scores(x, bias, softcap, CAP: tl.constexpr):
    z = x.to(tl.float32)
    if CAP == "before":
        z = _softcap(z, softcap)
    if bias is not None:
        z += bias
    if CAP == "after":
        z = _softcap(z, softcap)
    return z


@triton.jit
def _slope(z, softcap):
    """Derivative of softcap * tanh(a / softcap), from its value."""
    t = z * (1.0 / softcap)
    return 1.0 - t * t


@triton.jit
def _load_targets(targets_ptr, window, offs_t, T, V, ignore_index):
    target = tl.load(targets_ptr + window * T + offs_t, mask=offs_t < T, other=ignore_index)
    used = target != ignore_index
    bad = used & ((target < 0) | (target >= V))
    return tl.where(used & (target >= 0) & (target < V), target, 0).to(tl.int32), used, bad
