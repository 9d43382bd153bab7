"""The executable specification in plain torch, and the path that CPUs take."""

import torch
import torch.nn.functional as F
from torch import Tensor

Sinks = tuple[Tensor, Tensor, Tensor]

_ROWS = 128  # queries that the reference takes at a time


def banded_attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    position: Tensor | None = None,
    sinks: Sinks | None = None,
    exclude_own: bool = False,
) -> Tensor:
    """`banded_attention` in plain torch, any floating dtype; a block of queries at a time, against the keys it sees."""
    T, past, wide = q.size(1), k.size(1) - q.size(1), torch.promote_types(q.dtype, torch.float32)
    parts = []
    for first in range(0, max(T, 1), _ROWS):
        last = min(first + _ROWS, T)
        oldest = max(0, past + first - (window - 1))
        query, key = (torch.arange(*ends, device=q.device) for ends in ((first, last), (oldest, past + last)))
        own = past + query[:, None]
        visible = ((key <= own) & (key > own - window))[None]  # (1, rows, keys)
        keys, values = k[:, oldest : past + last], v[:, oldest : past + last]
        if position is not None:
            exists = key >= past - position[:, None]  # (B, keys)
            visible = visible & exists[:, None]
            keys, values = (x.masked_fill(~exists[..., None, None], 0.0) for x in (keys, values))
        scores = _scores_ref(q[:, first:last], keys, visible, wide)
        if sinks is not None:
            q_sink, k_sink, v_sink = sinks
            sink = torch.arange(k_sink.size(1), device=q.device)
            left = position[:, None] + query - (window - 1)  # sinks that have left the band, (B, rows)
            visible = sink < left[..., None]  # (B, rows, S)
            unused = ~visible.any(1)[..., None, None]
            k_sink, v_sink = (x.masked_fill(unused, 0.0) for x in (k_sink, v_sink))
            q_sink = q_sink[:, first:last].masked_fill(left[..., None, None] <= 0, 0.0)
            scores = torch.cat([scores, _scores_ref(q_sink, k_sink, visible, wide)], -1)
            values = torch.cat([values, v_sink], 1)
        out = scores.softmax(-1) @ values.to(wide).transpose(1, 2)[:, :, None]  # (B, Hkv, group, rows, D)
        if exclude_own:
            n = F.normalize(v[:, past + first : past + last].to(wide), dim=-1).transpose(1, 2)[:, :, None]
            out = out - (out * n).sum(-1, keepdim=True) * n
        parts.append(out.flatten(1, 2).transpose(1, 2).to(q.dtype))
    return torch.cat(parts, 1)


def _scores_ref(q, k, visible, wide):
    """Scores of q [B, rows, H, D] and k [B, keys, Hkv, D], -inf where not visible: [B, Hkv, H / Hkv, rows, keys]."""
    q = q.to(wide).transpose(1, 2).unflatten(1, (k.size(2), -1))
    scores = (q * q.size(-1) ** -0.5) @ k.to(wide).transpose(1, 2)[:, :, None].mT
    return scores.masked_fill(~visible[:, None, None], -torch.inf)
