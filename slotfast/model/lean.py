"""Pieces of a block whose pass back makes fewer temporaries than autograd's own.

Values have the bits of the plain expressions, gradients differ by rounding. On a CPU a large temporary costs more than
the arithmetic that fills it, since its pages are new each time, and a small one costs its launch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..kernels.linear import turned


def goes_back(x: Tensor) -> bool:
    """Whether gradients of x will be asked for in eager mode; a compiler fuses the plain expressions itself."""
    return x.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling()


class RmsNorm(torch.autograd.Function):
    """x / rms(x) over the last dimension; float32 and float64."""

    @staticmethod
    def forward(ctx, x):
        scale = x.square().mean(-1, keepdim=True).add_(torch.finfo(x.dtype).eps).rsqrt_()
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        y, scale = ctx.saved_tensors
        return torch.addcmul(dy, y, (dy * y).mean(-1, keepdim=True), value=-1).mul_(scale)


class SquaredLeakyRelu(torch.autograd.Function):
    """leaky_relu(x)^2, for slopes > 0."""

    @staticmethod
    def forward(ctx, x, slope):
        leaky, ctx.slope = F.leaky_relu(x, slope), slope
        ctx.save_for_backward(leaky)
        return leaky.square()

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (leaky,) = ctx.saved_tensors
        dx = torch.ops.aten.leaky_relu_backward(dy, leaky, ctx.slope, True)  # the sign of leaky is that of x
        return dx.mul_(leaky).mul_(2), None


class Rotate(torch.autograd.Function):
    """The leading dimensions of x [..., heads, head_width] turned pairwise by angles [..., 1, half]."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return turned(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        cos, sin = ctx.saved_tensors
        return turned(dy, cos, -sin), None, None


class LowRank(torch.autograd.Function):
    """y + scale (x a^T) b^T for y [..., N], x [..., K], a [rank, K], b [N, rank]."""

    @staticmethod
    def forward(ctx, y, x, a, b, scale):
        narrow = x.flatten(0, -2) @ a.mT
        ctx.save_for_backward(x, a, b, narrow)
        ctx.scale = scale
        return torch.addmm(y.flatten(0, -2), narrow, b.mT, alpha=scale).view(y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, a, b, narrow = ctx.saved_tensors
        dout = dy.flatten(0, -2)
        dnarrow, db = dout @ b, dout.mT @ narrow
        if ctx.scale != 1:
            dnarrow, db = dnarrow.mul_(ctx.scale), db.mul_(ctx.scale)
        dx = (dnarrow @ a).view(x.shape) if ctx.needs_input_grad[1] else None
        return dy, dx, dnarrow.mT @ x.flatten(0, -2), db, None
