"""Charges a stream while a model learns from it: runs the loop that a row asks for in one call."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..foreign.models import LanguageModel, language_model
from ..model import GPT
from ..slot import Adaptation
from .charged import Charged, FrozenLoop
from .documents import DocumentLoop
from .loop import LearningLoop
from .presets import parse_row
from .row import Learning
from .top import OnTop


@dataclass(frozen=True)
class Learned:
    """Losses of a stream.

    Args:
        nll, unlearned: float32 (float64 for float64) [N - 1] on the CPU, nats: of tokens 1, 2, ..., with learning and
            without.
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
        model: runs as in evaluation, without dropout; left as it was. Ours; or a causal language model of
            `transformers`; or any module that maps tokens int64 [B, T] to logits [B, T, V] through linear layers. It
            may have `hidden` and `head` apart, and `stream(tokens, state) -> (states, state)`; without, each chunk has
            all of its window forwarded again, keys are those of the newest weights, and gradients reach them.
        tokens: int [N], N >= 2, ids of the model's vocabulary.
        row: how to learn, NAME, NAME:key=value or a row; learn+causal counts on top, uncalibrated.
        window: tokens that one attends to, >= 1; the model's training length where None.
        sinks: first tokens of the stream that stay visible, >= 0.
        bos_id: the token that starts a document, for scope=document.
        dtype: of the forward; the embedding's where None.

    Raises:
        InputError: a row that does not exist or does not fit, tokens, a window or sinks out of range, or losses that
            are no numbers.
    """
    _check(model, tokens, row, window, sinks)
    parsed = parse_row(row) if isinstance(row, str) else row
    if not isinstance(parsed, Learning):
        raise InputError(f"preset {parsed.name!r} learns nothing: slotfast.adapt runs it")
    known, length = language_model(model)
    where = (length if window is None else window, sinks)
    on_top = OnTop.of([parsed], where[0], bos_id=bos_id)
    loop, ids = make_loop(known, parsed, *where, bos_id, dtype, on_top=on_top), tokens.cpu().numpy()
    charged: list[Charged] = []
    plain: list[Charged] = []
    with _evaluating(model):
        loop.run(lambda start, stop: ids[start:stop], len(ids) - 1, charged.append)
    charged.sort(key=lambda part: part.start)
    nll = torch.cat([part.nll if part.on_top is None else part.on_top[0] for part in charged])
    unlearned, seconds = [part.unlearned for part in charged if part.unlearned is not None], loop.seconds
    if unlearned:
        return Learned(nll, torch.cat(unlearned), loop.forwards, seconds)
    frozen = FrozenLoop(known, *where, dtype, parsed.chunk)
    with _evaluating(model):
        frozen.run(lambda start, stop: ids[start:stop], len(ids) - 1, plain.append)
    return Learned(nll, torch.cat([part.nll for part in plain]), loop.forwards, seconds | frozen.seconds)


def _check(model: nn.Module, tokens: Tensor, row: str | Learning, window: int | None, sinks: int) -> None:
    if not isinstance(model, nn.Module):
        raise InputError(f"model of type {type(model).__name__}: expected a torch module")
    if not isinstance(row, str | Learning | Adaptation):
        raise InputError(f"row of type {type(row).__name__}: expected NAME, NAME:key=value or a row that learns")
    if not isinstance(tokens, Tensor):
        raise InputError(f"tokens of type {type(tokens).__name__}: expected a tensor, int [N]")
    if tokens.dim() != 1 or len(tokens) < 2 or tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise InputError(f"tokens {list(tokens.shape)}, {tokens.dtype}: expected int [N] with at least 2 of them")
    least, most = int(tokens.min()), int(tokens.max())
    vocab_size = getattr(getattr(model, "config", None), "vocab_size", None)
    if least < 0 or (isinstance(vocab_size, int) and most >= vocab_size):
        expected = f"0 to {vocab_size - 1}" if isinstance(vocab_size, int) else "0 or more"
        raise InputError(f"tokens {least} to {most}: expected {expected}")
    if window is not None and window < 1:
        raise InputError(f"window {window}: expected at least 1")
    if sinks < 0:
        raise InputError(f"sinks {sinks}: expected at least 0")


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Within, every module is in evaluation mode; afterwards in the one that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def make_loop(
    model: GPT | LanguageModel,
    row: Learning,
    window: int,
    sinks: int = 0,
    bos_id: int | None = None,
    dtype: torch.dtype | None = None,
    keep_logprobs: bool = False,
    unlearned: bool = True,
    on_top: OnTop | None = None,
    rank: int = 0,
    world: int = 1,
) -> LearningLoop | DocumentLoop:
    """The loop that a row asks for; see the loops. Documents with windows of their own have no sinks.

    Args:
        unlearned: of documents with windows of their own, and of a model that keeps nothing, run the same forwards
            without learning too.
        rank, world: of ranks that all read the whole stream, which this is: of rows with phases, which deal documents
            out.

    Raises:
        InputError: see the loops; or the row needs the windows of a run, which `slotfast.eval.WindowsLoop` has.
    """
    if row.keys == "windows":
        raise InputError(f"preset {row.name!r}: keys 'windows' are those of a run: slotfast eval has them")
    if row.apart:
        return DocumentLoop(model, row, window, bos_id, dtype, keep_logprobs, unlearned, on_top, rank, world)
    return LearningLoop(model, row, window, sinks, bos_id, dtype, keep_logprobs, on_top, unlearned)
