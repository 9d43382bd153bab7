"""The parts of the contest's GPT."""

import math
from collections.abc import Callable
from typing import Protocol, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..kernels import PackedInt6, dequantize_int6
from ..kernels.linear import turned
from .config import GPTConfig
from .lean import RmsNorm, Rotate, SquaredLeakyRelu, goes_back


def rms_norm(x: Tensor) -> Tensor:
    """x / rms(x) over the last dimension; no gain, the dtype's epsilon."""
    if goes_back(x) and not x.is_cuda and x.dtype.itemsize >= 4:
        return RmsNorm.apply(x)
    return F.rms_norm(x, (x.size(-1),))


def softcap(logits: Tensor, cap: float | None) -> Tensor:
    """cap * tanh(logits / cap), or the logits where cap is None."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


class Linear(nn.Linear):
    """A bias-free linear layer whose weight is cast to the input's dtype; orthogonal initialisation.

    `rounding` is for training: a function that the weight goes through first.
    """

    def __init__(self, n_in: int, n_out: int, zero: bool = False):
        self.zero = zero
        super().__init__(n_in, n_out, bias=False)
        self.rounding: Callable[[Tensor], Tensor] | None = None

    def reset_parameters(self) -> None:
        if self.zero:
            nn.init.zeros_(self.weight)
        else:
            nn.init.orthogonal_(self.weight)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """What a forward in this dtype multiplies by."""
        weight = self.weight if self.rounding is None else self.rounding(self.weight)
        return weight.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix(x.dtype))


class PackedLinear(nn.Module):
    """A bias-free linear layer on packed 6-bit weights.

    Args:
        weight: packed [n_out, n_in].
        backend: triton, torch or auto.
    """

    low: Tensor
    high: Tensor
    scale: Tensor
    dense: Tensor | None

    def __init__(self, weight: PackedInt6, backend: ops.Backend = "auto"):
        super().__init__()
        self.shape, self.backend = weight.shape, backend
        self.register_buffer("low", weight.low)
        self.register_buffer("high", weight.high)
        self.register_buffer("scale", weight.scale)
        self.register_buffer("dense", None, persistent=False)

    @property
    def packed(self) -> PackedInt6:
        return PackedInt6(self.low, self.high, self.scale, self.shape)

    def keep_dense(self, dtype: torch.dtype) -> None:
        """Keep the weights as a matrix [n_out, n_in] of this dtype besides, for inputs of it."""
        self.dense = dequantize_int6(self.packed, dtype)

    def matrix(self, dtype: torch.dtype) -> Tensor | None:
        """The weights as a matrix of this dtype, where one is kept."""
        return self.dense if self.dense is not None and self.dense.dtype == dtype else None

    def forward(self, x: Tensor) -> Tensor:
        return ops.int6_linear(x, self.packed, self.backend, self.matrix(x.dtype))


def document_starts(tokens: Tensor, bos_id: int | None) -> Tensor:
    """Positions that look at none before them: the first, and every BOS if `bos_id` is given; bool [B, T]."""
    starts = torch.zeros_like(tokens, dtype=torch.bool) if bos_id is None else tokens == bos_id
    return torch.cat([torch.ones_like(starts[:, :1]), starts[:, 1:]], dim=1)


class BigramHash(nn.Module):
    """A learned vector for a hash of each token and the one before it."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.buckets, self.bos_id = config.bigram_buckets, config.bos_id
        self.embed = nn.Embedding(config.bigram_buckets, config.bigram_width)
        nn.init.zeros_(self.embed.weight)
        self.proj = Linear(config.bigram_width, config.width)
        self.scale = nn.Parameter(torch.tensor(0.05))

    def index(self, tokens: Tensor) -> Tensor:
        """The bucket of each position; where a document starts, which has no predecessor, the last bucket."""
        tokens = tokens.to(torch.int64)
        last = self.buckets - 1
        hashed = ((36313 * tokens) ^ (27191 * tokens.roll(1, dims=1))) % last
        return hashed.masked_fill(document_starts(tokens, self.bos_id), last)

    def forward(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        return self.proj(self.embed(self.index(tokens)).to(dtype)) * self.scale.to(dtype)


class SmearGate(nn.Module):
    """(1 - g) * x_i + g * x_(i-1) with a gate g per channel; where a document starts, x_(i-1) is zero."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.bos_id = config.bos_id
        self.gate = nn.Parameter(torch.zeros(config.width))

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        gate = torch.sigmoid(self.gate).to(x.dtype)
        before = x.roll(1, dims=1).masked_fill(document_starts(tokens, self.bos_id)[..., None], 0.0)
        return (1 - gate) * x + gate * before


class ValueEmbedding(nn.Module):
    """A second token embedding that some layers add to their attention values."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.value_width)
        nn.init.normal_(self.embed.weight, std=0.01)
        self.proj = Linear(config.value_width, config.kv_width)
        self.scale = nn.Parameter(torch.tensor(0.1))

    def forward(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        return self.proj(self.embed(tokens).to(dtype)) * self.scale.to(dtype)


def rotary_table(length: int, config: GPTConfig, position: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of int64 [T] positions, each float64 [T, rope_dims / 2]; `length` sets the base.

    Inputs longer than `rope_length` stretch it.
    """
    dims, base, device = config.rope_dims, config.rope_base, position.device
    stretched = length > config.rope_length and dims > 2
    if stretched:
        base = base * (length / config.rope_length) ** (dims / (dims - 2))
    frequency = base ** (-torch.arange(0, dims, 2, device=device, dtype=torch.float64) / max(dims, 1))
    if config.rope_bf16 and not stretched:
        frequency = frequency.bfloat16().double()
    angle = torch.outer(position.double(), frequency)
    return angle.cos(), angle.sin()


def single(table: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Cosines and sines in float32."""
    return table[0].float(), table[1].float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the leading dimensions of x [B, T, heads, head_width] pairwise, first half against second half."""
    if not cos.size(-1):
        return x
    angles = cos[:, None, :].to(x.dtype), sin[:, None, :].to(x.dtype)
    return Rotate.apply(x, *angles) if goes_back(x) else turned(x, *angles)


# States [B, T, width], and parts [parts, B, T] of the sums of squares of their rows, float32.
Mixed = tuple[Tensor, Tensor]


class Attend(Protocol):
    """How queries meet keys and values: within a window, or with those that a stream remembers."""

    def __call__(self, run: int, q: Tensor, k: Tensor, v: Tensor, exclude_own: bool) -> Tensor:
        """What the last positions attend to.

        Args:
            run: number of the layer's run, in the order of runs.
            q: [B, N, heads, head_width] of the last N positions, before rotation.
            k, v: [B, T, kv_heads, head_width], k before rotation.
            exclude_own: drop the direction of a position's own value from every head (XSA).

        Returns:
            [B, N, heads, head_width].
        """
        ...


class AttendRotated(Protocol):
    """An `Attend` that also takes queries and keys that are rotated."""

    angles: tuple[Tensor, Tensor]  # cosines and sines by which they are to be, float32 [T, rope_dims / 2]

    def rotated(self, run: int, q: Tensor, k: Tensor, v: Tensor, exclude_own: bool) -> Tensor:
        """As `Attend`, of q and k after rotation."""
        ...


class WindowAttention:
    """Every position sees those of its own window before it; positions count from 0.

    Args:
        length: positions of the window.
        config: of the model.
        device: of the tokens.
        base_length: sets the rotary base; default: as many.
    """

    def __init__(self, length: int, config: GPTConfig, device: torch.device, base_length: int | None = None):
        self.rope = rotary_table(base_length or length, config, torch.arange(length, device=device))
        self.angles = single(self.rope)

    def __call__(self, run: int, q: Tensor, k: Tensor, v: Tensor, exclude_own: bool) -> Tensor:
        """See `Attend`."""
        first = k.size(1) - q.size(1)
        return self.rotated(
            run, rotate(q, *(table[first:] for table in self.rope)), rotate(k, *self.rope), v, exclude_own
        )

    def rotated(self, run: int, q: Tensor, k: Tensor, v: Tensor, exclude_own: bool) -> Tensor:
        """See `AttendRotated`."""
        y = ops.attention(q, k, v)
        return ops.without_own(y, v[:, k.size(1) - q.size(1) :]) if exclude_own else y


class Attention(nn.Module):
    """Causal grouped-query attention with normalised queries and keys, query gain, partial RoPE and XSA."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.heads, self.kv_heads, self.head_width = config.heads, config.kv_heads, config.head_width
        self.xsa = layer >= config.layers - config.xsa_layers
        self.c_q = Linear(config.width, config.width)
        self.c_k = Linear(config.width, config.kv_width)
        self.c_v = Linear(config.width, config.kv_width)
        self.proj = Linear(config.width, config.width, zero=True)
        self.q_gain = nn.Parameter(torch.full((config.heads,), config.qk_gain))

    def forward(self, x: Tensor, value: Tensor | None, attend: Attend, run: int, first: int = 0) -> Tensor:
        """Attention of positions from `first` on: x [B, T, width] to [B, T - first, width]."""
        batch, length, _ = x.shape
        q = self.c_q(x[:, first:]).view(batch, length - first, self.heads, self.head_width)
        k = self.c_k(x).view(batch, length, self.kv_heads, self.head_width)
        v = self.c_v(x)
        v = (v if value is None else v + value).view(batch, length, self.kv_heads, self.head_width)
        y = attend(run, rms_norm(q) * self.q_gain.to(x.dtype)[:, None], rms_norm(k), v, self.xsa)
        return self.proj(y.flatten(2))

    def fused(
        self, mixed: Mixed, norm: float, value: Tensor | None, attend: AttendRotated, run: int, first: int
    ) -> Tensor:
        """What `proj` would be given: of x [B, T, width] that is still to be normalised, [B, T - first, width]."""
        x, squares = mixed
        weight = torch.cat([layer.matrix(x.dtype) for layer in (self.c_q, self.c_k, self.c_v)])
        q, k, v = ops.linear_heads(x, weight, squares, self.q_gain, *attend.angles, self.head_width, value, norm)
        return attend.rotated(run, q[:, first:], k, v, self.xsa).flatten(2)


class MLP(nn.Module):
    """Two linear layers around a squared leaky ReLU."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.slope = config.mlp_slope
        self.fc = Linear(config.width, config.mlp_width)
        self.proj = Linear(config.mlp_width, config.width, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        lean = self.slope > 0 and goes_back(x)
        return self.proj(SquaredLeakyRelu.apply(x, self.slope) if lean else F.leaky_relu(x, self.slope).square())


class Block(nn.Module):
    """Mix in the embedding, attend, transform; learned scales per channel."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.attn_scale = nn.Parameter(torch.ones(config.width))
        self.mlp_scale = nn.Parameter(torch.ones(config.width))
        self.resid_mix = nn.Parameter(torch.stack([torch.ones(config.width), torch.zeros(config.width)]))
        self.norm_scale = 1 / math.sqrt(layer + 1) if config.ln_scale else 1.0
        self.parallel = config.parallel_from is not None and layer >= config.parallel_from

    def forward(self, x: Tensor, x0: Tensor, value: Tensor | None, attend: Attend, run: int, first: int = 0) -> Tensor:
        """States of positions from `first` on: x, x0 [B, T, width] to [B, T - first, width]."""
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        seen = self.attn(rms_norm(x) * self.norm_scale, value, attend, run, first)
        x = x[:, first:]
        attended = x + self.attn_scale.to(x.dtype) * seen
        mlp_input = x if self.parallel else attended
        return attended + self.mlp_scale.to(x.dtype) * self.mlp(rms_norm(mlp_input) * self.norm_scale)

    def fuses(self, attend: Attend, backend: ops.Backend, x: Tensor) -> TypeGuard[AttendRotated]:
        """Whether `fused` does what `forward` does: kernels run, and nothing is hooked to the block or its parts."""
        if not (ops.fuses(backend, x, self.attn.head_width) and hasattr(attend, "rotated")):
            return False
        attn, mlp = self.attn, self.mlp
        for part in (self, attn, attn.c_q, attn.c_k, attn.c_v, attn.proj, mlp, mlp.fc, mlp.proj):
            if part._forward_hooks or part._forward_pre_hooks:
                return False
            if isinstance(part, PackedLinear) and part.matrix(x.dtype) is None:
                return False
        return True

    def mixing(self, skip: Tensor | None, share: Tensor | None) -> Tensor:
        """Weights by channel of x and x0, [2, width], and of the skip that comes in before them, [3, width].

        Args:
            skip: weight [width] of the skip, or None where there is none.
            share: x's, in 0..1, where a gate shares between x and the skip, [width]; or None.
        """
        of_x, of_x0 = self.resid_mix
        if skip is None:
            return self.resid_mix
        if share is None:
            return torch.stack([of_x, of_x0, of_x * skip])
        return torch.stack([of_x * share, of_x0, of_x * (1 - share) * skip])

    def fused(self, mixed: Mixed, value: Tensor | None, attend: AttendRotated, run: int, first: int = 0) -> Tensor:
        """`forward` from what `ops.channel_mix` made of x, x0 and a skip: four products and attention."""
        seen = self.attn.fused(mixed, self.norm_scale, value, attend, run, first)
        x, squares = mixed[0][:, first:], mixed[1][..., first:]
        attended, its = ops.linear_residual(seen, self.attn.proj.matrix(x.dtype), self.attn_scale, x)
        x, squares = (x, squares) if self.parallel else (attended, its)
        wide = ops.linear_squared(x, self.mlp.fc.matrix(x.dtype), squares, self.norm_scale, self.mlp.slope)
        return ops.linear_residual(wide, self.mlp.proj.matrix(x.dtype), self.mlp_scale, attended)[0]
