"""The contest's GPT, every part of it a setting: tokens -> hidden states -> logits of the positions that are asked for.

The architecture and its names are those of PR #1019 of openai/parameter-golf, so that tensors can be exchanged with
community artifacts; what later entries added (skip gates, repeated layers, parallel residuals, document awareness) is
off by default. `hidden` and `head` are apart: an evaluation needs the logits of few positions, and adaptations of
the hidden state go through `head` alone.
"""

import math
from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from . import ops
from .kernels import PackedInt6


class GPTConfig(BaseModel):
    """Shape and parts of a model; the defaults are PR #1019's.

    Raises:
        pydantic.ValidationError: sizes that do not fit together.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    vocab_size: int = Field(1024, ge=2, le=65536)
    seq_len: int = Field(2048, ge=1, le=1 << 17)
    layers: int = Field(11, ge=1, le=256)
    width: int = Field(512, ge=4, le=16384)
    heads: int = Field(8, ge=1, le=256)
    kv_heads: int = Field(4, ge=1, le=256)
    mlp_width: int = Field(1536, ge=1, le=65536)
    mlp_slope: float = Field(0.5, description="slope of the leaky ReLU that is then squared")
    rope_dims: int = Field(16, ge=0, description="leading dimensions of each head that are rotated; the rest are not")
    rope_base: float = Field(10_000.0, gt=1)
    rope_length: int = Field(1024, ge=1, description="longer inputs stretch the base")
    rope_bf16: bool = Field(
        False, description="unstretched tables of frequencies rounded to bfloat16, as PR #1019's evaluation has them"
    )
    qk_gain: float = Field(1.5, description="initial gain of the normalised queries, learned per head")
    xsa_layers: int = Field(11, ge=0, description="last layers whose attention output drops its own value's direction")
    ln_scale: bool = Field(True, description="divide the normalised input of layer i by sqrt(i + 1)")
    unet: bool = Field(True, description="skips from the first half of the layers to the second, last in first out")
    smear: bool = Field(True, description="mix each embedding with the one before by a learned gate")
    bigram_buckets: int = Field(2048, ge=0, le=1 << 20, description="rows of the hashed bigram table; 0: none")
    bigram_width: int = Field(128, ge=1, le=4096)
    value_width: int = Field(128, ge=0, le=4096, description="width of the table added to the values; 0: none")
    value_layers: tuple[int, ...] = Field((9, 10), max_length=256, description="layers whose values get it")
    softcap: float = Field(30.0, ge=0, description="logits are cap * tanh(logits / cap); 0: no cap")
    tied: bool = Field(True, description="the embedding is the output matrix")
    bos_id: int | None = Field(
        None, ge=0, description="token at which smear gate and bigram hash start anew; None: they look across documents"
    )
    skip_gates: bool = Field(False, description="a learned gate per channel between each skip and the stream (#1179)")
    loops: int = Field(0, ge=0, le=16, description="how often more the layers loop_start..loop_end run (#1394, #1493)")
    loop_start: int = Field(0, ge=0)
    loop_end: int = Field(0, ge=0, description="last layer of the repeated segment")
    parallel_from: int | None = Field(
        None, ge=0, description="layers from here on add attention and MLP of one and the same input (#1412)"
    )

    @model_validator(mode="after")
    def _sizes_fit(self) -> "GPTConfig":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        if self.rope_dims % 2 or self.rope_dims > self.head_width:
            raise ValueError(f"rope_dims {self.rope_dims}: expected an even number up to {self.head_width}")
        if self.bigram_buckets == 1:
            raise ValueError("bigram_buckets 1: expected 0 or at least 2")
        layers = set(self.value_layers)
        if self.value_width and (len(layers) < len(self.value_layers) or not layers <= set(range(self.layers))):
            raise ValueError(f"value_layers {self.value_layers}: expected different layers of 0..{self.layers - 1}")
        if self.loops and not self.loop_start <= self.loop_end < self.layers:
            raise ValueError(
                f"loop {self.loop_start}..{self.loop_end}: expected layers of 0..{self.layers - 1} in order"
            )
        if self.skip_gates and not self.unet:
            raise ValueError("skip_gates without unet: there are no skips to gate")
        return self

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_width

    @property
    def order(self) -> tuple[int, ...]:
        """Layers in the order in which they run: the repeated segment comes loops + 1 times."""
        layers = tuple(range(self.layers))
        if not self.loops:
            return layers
        after = self.loop_end + 1
        return layers[:after] + layers[self.loop_start : after] * self.loops + layers[after:]

    @property
    def skips(self) -> int:
        return len(self.order) // 2 if self.unet else 0


def rms_norm(x: Tensor) -> Tensor:
    """x / rms(x) over the last dimension; no gain, the dtype's epsilon."""
    return F.rms_norm(x, (x.size(-1),))


def softcap(logits: Tensor, cap: float) -> Tensor:
    """cap * tanh(logits / cap), or the logits where cap is 0."""
    return cap * torch.tanh(logits / cap) if cap else logits


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

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if self.rounding is None else self.rounding(self.weight)
        return F.linear(x, weight.to(x.dtype))


class PackedLinear(nn.Module):
    """A bias-free linear layer on packed 6-bit weights.

    Args:
        weight: packed [n_out, n_in].
        backend: triton, torch or auto.
    """

    def __init__(self, weight: PackedInt6, backend: ops.Backend = "auto"):
        super().__init__()
        self.shape, self.backend = weight.shape, backend
        self.register_buffer("low", weight.low)
        self.register_buffer("high", weight.high)
        self.register_buffer("scale", weight.scale)

    def forward(self, x: Tensor) -> Tensor:
        return ops.int6_linear(x, PackedInt6(self.low, self.high, self.scale, self.shape), self.backend)


def document_starts(tokens: Tensor, bos_id: int | None) -> Tensor:
    """Positions that look at none before them: the first one, and every BOS where `bos_id` is given; bool [B, T]."""
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
        """Bucket of each position; where a document starts there is no predecessor, and it is the last bucket."""
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


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the leading dimensions of x [B, T, heads, head_width] pairwise, first half against second half."""
    half = cos.size(-1)
    if not half:
        return x
    cos, sin = cos[:, None, :].to(x.dtype), sin[:, None, :].to(x.dtype)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos + b * sin, b * cos - a * sin, rest], dim=-1)


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

    def __call__(self, run: int, q: Tensor, k: Tensor, v: Tensor, exclude_own: bool) -> Tensor:
        """See `Attend`."""
        first = k.size(1) - q.size(1)
        y = ops.attention(rotate(q, *(table[first:] for table in self.rope)), rotate(k, *self.rope), v)
        return ops.without_own(y, v[:, first:]) if exclude_own else y


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


class MLP(nn.Module):
    """Two linear layers around a squared leaky ReLU."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.slope = config.mlp_slope
        self.fc = Linear(config.width, config.mlp_width)
        self.proj = Linear(config.mlp_width, config.width, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.leaky_relu(self.fc(x), self.slope).square())


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


class GPT(nn.Module):
    """The whole model.

    Args:
        config: shape and parts.

    `looping` is for training, which may run every layer once at first: False leaves the repetitions out.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.looping = True
        self.tok_emb = nn.Embedding(config.vocab_size, config.width)
        nn.init.normal_(self.tok_emb.weight, std=0.005)
        self.bigram = BigramHash(config) if config.bigram_buckets else None
        self.smear = SmearGate(config) if config.smear else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.skip_weights = nn.Parameter(torch.ones(config.skips, config.width)) if config.skips else None
        gates = config.skips and config.skip_gates
        self.skip_gates = nn.Parameter(torch.zeros(config.skips, config.width)) if gates else None
        has_values = config.value_width and config.value_layers
        self.ve_shared = ValueEmbedding(config) if has_values else None
        scales = config.value_layers if has_values else ()
        self.ve_layer_scales = nn.ParameterList(nn.Parameter(torch.ones(1)) for _ in scales)
        self.lm_head = None if config.tied else Linear(config.width, config.vocab_size)

    def hidden(
        self, tokens: Tensor, dtype: torch.dtype | None = None, first: int = 0, length: int | None = None
    ) -> Tensor:
        """Normalised states before the output matrix, of windows.

        Args:
            tokens: int [B, T].
            dtype: of the computation; the embedding's where None.
            first: position from which on states are wanted; the last layer leaves out what those before it alone need.
            length: that the windows would have, were there more of the stream; T by default.

        Returns:
            [B, T - first, width] in that dtype.
        """
        attend = WindowAttention(tokens.size(1), self.config, tokens.device, length)
        return self.states(tokens, attend, dtype or self.tok_emb.weight.dtype, first=first)

    def cast_matrices(self, dtype: torch.dtype) -> "GPT":
        """Cast linear weights and embeddings for good, not in each forward; every state has the same bits."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                module.weight.data = module.weight.data.to(dtype)
        return self

    @property
    def order(self) -> tuple[int, ...]:
        """Layers in the order in which they run."""
        return self.config.order if self.looping else tuple(range(self.config.layers))

    def states(self, tokens: Tensor, attend: Attend, dtype: torch.dtype, before: int = 0, first: int = 0) -> Tensor:
        """Normalised states before the output matrix, of tokens that attend as `attend` says.

        Args:
            tokens: int [B, before + T].
            attend: called once for each layer's run, with the queries, keys and values of the last T tokens.
            dtype: of the computation.
            before: leading tokens that only smear gate and bigram hash look at.
            first: of the T positions, the first whose state is wanted.

        Returns:
            [B, T - first, width] in that dtype.
        """
        x = self.tok_emb(tokens).to(dtype)
        if self.bigram is not None:
            x = x + self.bigram(tokens, dtype)
        x = rms_norm(x)
        if self.smear is not None:
            x = self.smear(x, tokens)
        x, tokens = x[:, before:], tokens[:, before:]
        x0, skips = x, []
        value = self.ve_shared(tokens, dtype) if self.ve_shared is not None else None
        order = self.order
        half = len(order) // 2
        for run, layer in enumerate(order):
            if skips and run >= half:
                x = self.add_skip(x, skips.pop(), run - half)
            own_value = None
            if value is not None and layer in self.config.value_layers:
                own_value = value * self.ve_layer_scales[self.config.value_layers.index(layer)].to(dtype)
            x = self.blocks[layer](x, x0, own_value, attend, run, first if run == len(order) - 1 else 0)
            if self.config.unet and run < half:
                skips.append(x)
        return rms_norm(x)

    def add_skip(self, x: Tensor, skip: Tensor, index: int) -> Tensor:
        """States x joined by those of the skip that step `index` of the second half takes; both [B, T, width]."""
        skip = self.skip_weights[index].to(x.dtype) * skip
        if self.skip_gates is None:
            return x + skip
        return torch.lerp(skip, x, torch.sigmoid(self.skip_gates[index]).to(x.dtype))

    def unembed(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states [..., width] before the soft cap, in their dtype [..., vocab_size]."""
        matrix = self.tok_emb.weight if self.lm_head is None else self.lm_head.weight
        return F.linear(hidden, matrix.to(hidden.dtype))

    def head(self, hidden: Tensor, bias: Tensor | None = None) -> Tensor:
        """Logits of hidden states [..., width], soft-capped, float32 (float64 for float64) [..., vocab_size].

        A bias [..., vocab_size] is added before the cap.
        """
        logits = self.unembed(hidden)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return softcap(logits if bias is None else logits + bias, self.config.softcap)

    def forward(self, tokens: Tensor, targets: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Mean cross-entropy in nats; tokens and targets int [B, T]."""
        return ops.cross_entropy(self.unembed(self.hidden(tokens, dtype)), targets, softcap=self.config.softcap).mean()
