"""Phases: SGD trains all weights on the documents charged so far, and learning continues from there.

Source: PR #1610 (one phase), #1626 (three).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..model import GPT, rotary_table, rotate
from .row import Learning

_TOGETHER = 32  # sequences of one step


class PackedAttention:
    """Attention of sequences that hold several documents, each of which sees itself alone; see `Attend`.

    Args:
        tokens: int [B, T].
        model: whose attention it is.
        bos_id: the token that starts a document; None: all is one.
        length: sets the rotary base.
    """

    def __init__(self, tokens: Tensor, model: GPT, bos_id: int | None, length: int):
        positions = torch.arange(tokens.size(1), device=tokens.device)
        self.rope = rotary_table(length, model.config, positions)
        document = (tokens == bos_id).cumsum(1) if bos_id is not None else torch.zeros_like(tokens)
        same = document[:, :, None] == document[:, None, :]
        self.seen = (same & (positions[:, None] >= positions))[:, None]

    def __call__(self, run: int, q: Tensor, k: Tensor, v: Tensor, exclude_own: bool) -> Tensor:
        first = k.size(1) - q.size(1)
        q, k = rotate(q, *(table[first:] for table in self.rope)), rotate(k, *self.rope)
        queries, keys, values = (x.transpose(1, 2) for x in (q, k, v))
        y = F.scaled_dot_product_attention(queries, keys, values, self.seen[:, :, first:], enable_gqa=True)
        y = y.transpose(1, 2)
        return ops.without_own(y, v[:, first:]) if exclude_own else y


def train_phase(model: GPT, row: Learning, tokens: Tensor, window: int, bos_id: int | None, dtype: torch.dtype) -> int:
    """Train a model on documents, in pieces of `row.piece` tokens; the last piece, which may be short, is left out.

    Args:
        model: its weights are changed; no gradient is asked of them afterwards.
        tokens: int64 [N], the documents one after the other.
        window: tokens of a sequence.

    Returns:
        Tokens trained on, epochs counted.
    """
    pieces, trained = math.ceil((len(tokens) - 1) / row.piece), 0
    if pieces < 2:
        return 0
    device = model.tok_emb.weight.device
    model.requires_grad_(True)
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, row.phase_lr, row.phase_momentum)
    for piece in range(pieces - 1):
        optimizer.param_groups[0]["lr"] = row.phase_lr * (1 + math.cos(math.pi * piece / (pieces - 1))) / 2
        begin = piece * row.piece
        for _ in range(row.phase_epochs):
            for start in range(begin, begin + row.piece, _TOGETHER * window):
                stop = min(start + _TOGETHER * window, begin + row.piece)
                for first in range(start, stop, window):
                    sequence = tokens[None, first : min(first + window, stop) + 1].to(device)
                    attend = PackedAttention(sequence[:, :-1], model, bos_id, window)
                    states = model.states(sequence[:, :-1], attend, dtype)
                    (model.losses(states, sequence[:, 1:]).sum() / (stop - start)).backward()
                if row.phase_clip:
                    nn.utils.clip_grad_norm_(parameters, row.phase_clip)
                optimizer.step()
                optimizer.zero_grad()
                trained += stop - start
    model.requires_grad_(False)
    return trained
