"""A stream charged while a model learns from it: the loop that a row asks for, run in one call."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..foreign.models import language_model
from .loop import FrozenLoop, LearningLoop
from .presets import parse_row
from .row import Learning


@dataclass(frozen=True)
class Learned:
    """Losses of a stream.

    Args:
        nll, unlearned: float32 (float64 for float64) [N - 1], nats: of tokens 1, 2, ..., with learning and without.
        forwards: passes through the model for each token; see `LearningLoop`.
        seconds: of forwarding and learning, `learned`, and of the forward without, `unlearned`.
    """

    nll: Tensor
    unlearned: Tensor
    forwards: float
    seconds: dict[str, float]


def learn(
    model: nn.Module,
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
        model: in evaluation mode; left as it was. Ours; or a causal language model of `transformers`; or any module
            that maps tokens int64 [B, T] to logits [B, T, V] through linear layers. It may have `hidden` and `head`
            apart, and `stream(tokens, state) -> (states, state)`; without that, each chunk has all of its window
            forwarded again, keys are those of the newest weights, and gradients reach them.
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
    known, length = language_model(model)
    where = (window or length, sinks)
    loop = LearningLoop(known, parsed, *where, bos_id, dtype)
    frozen = FrozenLoop(known, *where, dtype, parsed.chunk)
    ids, charged, plain = tokens.cpu().numpy(), [], []
    for each, parts in ((frozen, plain), (loop, charged)):
        each.run(lambda start, stop: ids[start:stop], len(ids) - 1, parts.append)
    nll, unlearned = (torch.cat([part.nll for part in parts]) for parts in (charged, plain))
    return Learned(nll, unlearned, loop.forwards, loop.seconds | frozen.seconds)
