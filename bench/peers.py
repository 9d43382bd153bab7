"""What a kernel is measured against: what one would write in torch, what torch.compile makes of that, other libraries.

`contenders(spec, device)` gives name -> function of the spec's inputs. "eager" is the yardstick. Where `None` stands in
a function's place, the string beside it says why there is none.
"""

import importlib.util
import shutil

import torch
import torch.nn.functional as F

from slotfast.kernels import bias_cross_entropy, dequantize_int6, int6_matmul


def _scores(logits, bias, softcap, cap_after_bias):
    z = logits.float()
    bias = None if bias is None else bias if bias.dim() == 1 else bias[:, None]
    if bias is not None and cap_after_bias:
        z = z + bias
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z if bias is None or cap_after_bias else z + bias


def cross_entropy(logits, targets, bias=None, *, softcap=None, cap_after_bias=False, ignore_index=-100):
    """(nll, lse) in plain torch, as anybody would write it."""
    z = _scores(logits, bias, softcap, cap_after_bias)
    nll = F.cross_entropy(z.flatten(0, 1), targets.flatten(), ignore_index=ignore_index, reduction="none")
    return nll.view(targets.shape), torch.logsumexp(z, -1)


def cross_entropy_grad(logits, targets, bias=None, **options):
    """(loss, dbias) by autograd."""
    bias = bias.detach().requires_grad_()
    with torch.enable_grad():
        z = _scores(logits, bias, options.get("softcap"), options.get("cap_after_bias", False))
        nll = F.cross_entropy(z.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
        loss = nll.mean(1)
        (dbias,) = torch.autograd.grad(loss.sum(), bias)
    return loss.detach(), dbias


def liger_cross_entropy_grad(logits, targets, bias=None, **options):
    """(loss, dbias) by Liger's kernel, which has no bias: it is added before, and its gradient summed after."""
    from liger_kernel.transformers.functional import liger_cross_entropy

    bias = bias.detach().requires_grad_()
    with torch.enable_grad():
        z = logits + bias[:, None].to(logits.dtype)
        nll = liger_cross_entropy(z.flatten(0, 1), targets.flatten(), reduction="none", softcap=options.get("softcap"))
        loss = nll.view(targets.shape).float().mean(1)
        (dbias,) = torch.autograd.grad(loss.sum(), bias)
    return loss.detach(), dbias


def linear_cross_entropy(x, weight, targets, bias=None, *, softcap=None, ignore_index=-100):
    """The losses of logits in memory, in plain torch, as anybody would write it."""
    z = _scores(F.linear(x, weight), bias, softcap, True)
    return F.cross_entropy(z, targets, ignore_index=ignore_index, reduction="none")


def linear_then_cross_entropy(x, weight, targets, **options):
    """The library's product, and our kernel on its result."""
    return bias_cross_entropy(F.linear(x, weight)[None], targets[None], **options)[0][0]


class Dense:
    """The library's product with weights that were dequantised before: what 6 bits are measured against."""

    def __init__(self):
        self.kept = {}

    def of(self, x, weight):
        key = weight.low.data_ptr(), x.dtype
        if key not in self.kept:
            from slotfast.kernels import dequantize_int6_ref

            self.kept[key] = (dequantize_int6 if x.is_cuda else dequantize_int6_ref)(weight, x.dtype)
        return self.kept[key]

    def __call__(self, x, weight):
        return F.linear(x, self.of(x, weight))


def _without_compiler(device) -> str | None:
    if torch.device(device).type == "cuda":
        return None if importlib.util.find_spec("triton") else "torch.compile needs triton"
    found = any(shutil.which(name) for name in ("c++", "g++", "clang++"))
    return None if found else "torch.compile needs a C++ compiler"


def contenders(spec, device) -> dict:
    """Functions of `spec.inputs`' keyword arguments, or reasons for there being none."""
    on_gpu = torch.device(device).type == "cuda"
    if spec.name.startswith("slot_solve"):
        return {"ours": "a whole fit: its reference loops over windows, its peers are in bench_solve.py"}
    dense = Dense()
    eager = {
        "bias_cross_entropy": cross_entropy,
        "bias_cross_entropy_grad": cross_entropy_grad,
        "int6_matmul": dense,
        "linear_cross_entropy": linear_cross_entropy,
    }.get(spec.name, spec.reference)
    found = {"ours": spec.fn if on_gpu else spec.reference}
    found["eager"] = eager if eager is not found["ours"] else "on the CPU, ours is this very function"
    if eager in (cross_entropy, cross_entropy_grad, linear_cross_entropy):
        found["compile"] = _without_compiler(device) or torch.compile(eager, dynamic=False)
    if on_gpu and spec.name == "int6_matmul":
        found["ours, dense kept"] = lambda x, weight: int6_matmul(x, weight, dense.of(x, weight))
    if on_gpu and spec.name == "linear_cross_entropy":
        found["logits in memory, bias_cross_entropy"] = linear_then_cross_entropy
    if spec.name == "bias_cross_entropy_grad":
        missing = None if importlib.util.find_spec("liger_kernel") else "liger-kernel is not installed"
        found["liger"] = missing or (liger_cross_entropy_grad if on_gpu else "liger-kernel needs a GPU")
    return found
