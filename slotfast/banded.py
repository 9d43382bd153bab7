"""Banded attention by torch's own fused attention: what a CPU runs.

Queries are taken in blocks, and a block meets the keys that it can see and no others: its own, and the window - 1
before its first. Blocks are one batch of `scaled_dot_product_attention`; their keys are overlapping views of one
tensor, and the heads of a group are rows of one block, so that nothing is repeated in memory. The specification of what
is computed is `kernels.banded_attention_ref`.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_ROWS = 64  # queries of a block; on two CPUs 32 to 128 are within a tenth of each other


class _BehindCache(torch.autograd.Function):
    """`scaled_dot_product_attention` whose keys and values before `first` get gradients of zero, at no cost.

    Shapes: q [B, heads, N, D], k and v [B, heads, M, D], mask [B or 1, 1, N, M].
    """

    @staticmethod
    def forward(ctx, q, k, v, mask, scale, first):
        ctx.save_for_backward(q, k, v, mask)
        ctx.scale, ctx.first = scale, first
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        q, k, v, mask = ctx.saved_tensors
        shares = torch.softmax((q @ k.mT).mul_(ctx.scale).add_(mask), -1)
        dscores = torch.ops.aten._softmax_backward_data(dy @ v.mT, shares, -1, shares.dtype).mul_(ctx.scale)
        dk, dv = torch.zeros_like(k), torch.zeros_like(v)
        dk[:, :, ctx.first :] = dscores[..., ctx.first :].mT @ q
        dv[:, :, ctx.first :] = shares[..., ctx.first :].mT @ dy
        return dscores @ k, dk, dv, None, None, None


def fused_banded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    position: Tensor | None,
    sinks: tuple[Tensor, Tensor, Tensor] | None,
    fixed_cache: bool = False,
) -> Tensor:
    """See `slotfast.ops.banded_attention`; every key of the cache must exist."""
    batch, length, heads, width = q.shape
    kv_heads, past = k.size(2), k.size(1) - q.size(1)
    if not length:
        return torch.empty_like(q)
    rows = min(_ROWS, length)
    blocks = -(-length // rows)
    # Keys before a block's first query: all there are where there is one block, else the same number for every block
    before = min(past, window - 1) if blocks == 1 else window - 1
    missing, behind = max(0, before - past), blocks * rows - length
    k, v = (_padded(x[:, max(0, past - before) :], missing, behind) for x in (k, v))
    query = torch.arange(blocks * rows).view(blocks, rows, 1)
    key = torch.arange(before + rows)
    visible = (key <= query[:1] + before) & (key > query[:1] + before - window)  # (1, rows, keys)
    if missing:
        visible = visible & (key >= missing - query[:, :1])  # (blocks, rows, keys)
    keys, values = (_overlapping(x, blocks, rows, before + rows) for x in (k, v))
    queries = _blocks(q, kv_heads, blocks, rows)
    if sinks is not None:
        if position is None:
            raise ValueError("position: expected one where there are sinks, got None")
        queries, keys, values = _with_sinks(queries, keys, values, *sinks)
        left = position[:, None, None, None] + query - window >= torch.arange(sinks[1].size(1))  # is out of the band
        visible = torch.cat([visible.expand(*left.shape[:3], -1), left], -1)  # (B, blocks, rows, keys + S)
    mask = None
    if length > 1 or sinks is not None:  # a single query sees every key that it is given
        mask = torch.zeros(visible.shape, dtype=q.dtype).masked_fill_(~visible, -math.inf)
        mask = mask.view(-1, 1, 1, *mask.shape[-2:]).expand(-1, -1, heads // kv_heads, -1, -1).flatten(2, 3)
        mask = mask.repeat(batch, 1, 1, 1) if sinks is None and batch > 1 and missing else mask
    parts = queries.flatten(3, 4).flatten(0, 1), keys.flatten(0, 1), values.flatten(0, 1), mask
    if fixed_cache and blocks == 1 and before and sinks is None and mask is not None and q.requires_grad:
        y = _BehindCache.apply(*parts, width**-0.5, before)
    else:
        y = F.scaled_dot_product_attention(*parts, scale=width**-0.5)
    y = y[..., :width].view(batch, blocks, kv_heads, -1, rows, width).permute(0, 1, 4, 2, 3, 5)
    return y.reshape(batch, blocks * rows, heads, width)[:, :length]


def _with_sinks(
    queries: Tensor, keys: Tensor, values: Tensor, q_sink: Tensor, k_sink: Tensor, v_sink: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values that put the band's scores and the sinks' in one softmax; sinks have their own queries.

    The sinks' scores become further elements of a query, and each sink's key picks out its own.
    """
    batch, blocks, kv_heads, _, rows, width = queries.shape
    count = k_sink.size(1)
    scores = torch.einsum("bnkgrd,bskd->bnkgrs", _blocks(q_sink, kv_heads, blocks, rows), k_sink)
    shape = (batch, blocks, kv_heads, count, width + count)
    chosen = F.pad(torch.eye(count, dtype=queries.dtype), (width, 0)).expand(shape)
    first = v_sink.transpose(1, 2)[:, None].expand(*shape[:-1], width)
    keys = torch.cat([F.pad(keys, (0, count)), chosen], 3)
    values = F.pad(torch.cat([values, first], 3), (0, count))
    return torch.cat([queries, scores], -1), keys, values


def _blocks(q: Tensor, kv_heads: int, blocks: int, rows: int) -> Tensor:
    """q [B, T, heads, D] as [B, blocks, kv_heads, group, rows, D]."""
    q = _padded(q, 0, blocks * rows - q.size(1))
    return q.reshape(q.size(0), blocks, rows, kv_heads, -1, q.size(3)).permute(0, 1, 3, 4, 2, 5)


def _overlapping(x: Tensor, blocks: int, rows: int, length: int) -> Tensor:
    """Views [B, blocks, kv_heads, length, D] of x [B, N, kv_heads, D], `rows` places apart."""
    size = (x.size(0), blocks, x.size(2), length, x.size(3))
    return x.as_strided(size, (x.stride(0), rows * x.stride(1), x.stride(2), x.stride(1), x.stride(3)))


def _padded(x: Tensor, before: int, behind: int) -> Tensor:
    return F.pad(x, (0, 0, 0, 0, before, behind)) if before or behind else x
