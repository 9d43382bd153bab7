"""A stream charged while a model learns from it: the loop that a row asks for, run in one call."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from ..model import GPT
from .loop import LearningLoop
from .presets import parse_row
from .row import Learning


@dataclass(frozen=True)
class Learned:
    """Losses of a stream.

    Args:
        nll, unlearned: float32 (float64 for float64) [N - 1], nats: of tokens 1, 2, ..., with learning and without.
        forwards: passes through the model for each token; see `LearningLoop`.
        seconds: of learning and of the same forwards without.
    """

    nll: Tensor
    unlearned: Tensor
    forwards: float
    seconds: dict[str, float]


def learn(
    model: GPT,
    tokens: Tensor,
    row: str | Learning = "learn",
    *,
    window: int | None = None,
    sinks: int = 0,
    bos_id: int | None = None,
    dtype: torch.dtype | None = None,
) -> Learned:
    """Charge a stream while learning from it, each chunk only once it is charged.

    Args:
        model: in evaluation mode; left as it was.
        tokens: int [N], N >= 2.
        row: how to learn, NAME, NAME:key=value or a row.
        window: tokens that one attends to; the model's training length where None.
        sinks: first tokens of the stream that stay visible, >= 0.
        bos_id: the token that starts a document, for scope=document.
        dtype: of the forward; the embedding's where None.

    Raises:
        InputError: a row that does not exist or does not fit, fewer than 2 tokens, or losses that are no numbers.
    """
    if tokens.dim() != 1 or len(tokens) < 2:
        raise InputError(f"tokens {list(tokens.shape)}: expected [N] with at least 2 of them")
    parsed = parse_row(row) if isinstance(row, str) else row
    if not isinstance(parsed, Learning):
        raise InputError(f"preset {parsed.name!r} learns nothing: slotfast.adapt runs it")
    loop = LearningLoop(model, parsed, window or model.config.seq_len, sinks, bos_id, dtype)
    ids, charged = tokens.cpu().numpy(), []
    loop.run(lambda start, stop: ids[start:stop], len(ids) - 1, charged.append)
    nll, unlearned = (torch.cat([getattr(part, name) for part in charged]) for name in ("nll", "unlearned"))
    return Learned(nll, unlearned, loop.forwards, loop.seconds)
