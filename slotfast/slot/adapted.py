"""`adapt`: scores consecutive windows of somebody else's model, one batch a call."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from .adapters import Adapter
from .batch import Adjusted, WindowBatch
from .presets import parse_preset
from .rates import Calibration

# Fewer tokens than this may recur by chance.
_SHORTEST_REPLAY = 32


@dataclass(frozen=True)
class Adapted:
    """Scores of a batch of windows.

    Args:
        nll: float32 [W, T], adapted; NaN at positions that are not scored.
        base_nll: the same without adaptation.
        state: pass it to the next call of `adapt`.
    """

    nll: Tensor
    base_nll: Tensor
    state: Adapter


@torch.no_grad()
def adapt(
    logits: Tensor,
    targets: Tensor,
    context: int | Tensor,
    scored: int | Tensor | None = None,
    *,
    preset: str = "causal",
    state: Adapter | None = None,
    frequency: Tensor | None = None,
    calibration: Calibration | None = None,
    bos_id: int | None = None,
    hidden: Tensor | None = None,
    head: Callable[..., Tensor] | None = None,
    allow_noncausal: bool = False,
) -> Adapted:
    """Score consecutive windows of any model with a test-time adaptation.

    NumPy arrays and lists are accepted wherever tensors are.

    Args:
        logits: float [W, T, V], of consecutive windows, as the model gives them.
        targets: int [W, T], the token after each position, in 0..V-1 up to `scored`.
        context: positions of each window that earlier windows scored, one number or int [W].
        scored: end of the positions to score, one number or int [W]; T by default.
        preset: NAME or NAME:key=value,...
        state: from the call before with the same preset, for presets that carry something from batch to batch.
        frequency: float [V], how often each token comes in training text, counts or shares; improves `causal`.
        calibration: instead, what was fitted to this model, frequencies included: of `slotfast.read_calibration`.
        bos_id: the token that starts a document, for `causal`; as in the first call where a state is given without it.
        hidden: float [W, T, D], the states behind the logits, for presets that shift them or act before the soft cap.
        head: from hidden states [n, D], and a bias [V] before the soft cap for presets that add one there, to logits.
        allow_noncausal: needed for presets whose score has seen its own tokens.

    Returns:
        Losses with and without the adaptation, float32 [W, T] in nats, NaN where nothing is scored; and the state for
        the next call.

    Raises:
        InputError: unknown preset, a preset that leaks, shapes or tokens that do not fit, a state of another preset or
            of another place in the stream: for presets that carry something, each window's context must be the tokens
            that were scored last.
    """
    logits, targets = _tensor("logits", logits), _tensor("targets", targets)
    if logits.ndim != 3 or targets.shape != logits.shape[:2]:
        raise InputError(f"logits {tuple(logits.shape)}, targets {tuple(targets.shape)}: expected [W, T, V] and [W, T]")
    if not logits.is_floating_point():
        raise InputError(f"logits: expected floating-point numbers, got {logits.dtype}")
    windows, length, vocabulary = logits.shape
    if not _integers(targets) or not (bos_id is None or (_is_integer(bos_id) and 0 <= bos_id < vocabulary)):
        raise InputError(f"targets and bos_id: expected integers, bos_id {bos_id} in 0..{vocabulary - 1}")
    row = parse_preset(preset)
    if not row.compliance.causal and not allow_noncausal:
        raise InputError(f"preset {preset!r} is not causal: {row.compliance.why}")
    calibration = _calibration(calibration, frequency, vocabulary)
    if state is None:
        state = Adapter(row, calibration, bos_id)
    else:
        _check_state(state, preset, vocabulary, calibration, bos_id)
    ends = [_end(end, length, windows, logits.device) for end in (context, scored)]
    if not bool(((ends[0] >= 0) & (ends[0] <= ends[1]) & (ends[1] <= length)).all()):
        raise InputError(f"context and scored: expected 0 <= context <= scored <= {length} in every window")
    targets = targets.long()
    behind = torch.arange(length, device=logits.device) >= ends[1][:, None]
    if bool((((targets < 0) | (targets >= vocabulary)) & ~behind).any()):
        raise InputError(f"targets: expected 0..{vocabulary - 1} at every position before `scored`")
    if state.row.needs_hidden and (hidden is None or head is None):
        raise InputError(f"preset {preset!r} acts before the logits: it needs hidden and head")
    if hidden is not None:
        hidden = _tensor("hidden", hidden)
        if hidden.shape[:2] != logits.shape[:2]:
            raise InputError(f"hidden {tuple(hidden.shape)}: expected {[windows, length]} in front of the width")
    batch = WindowBatch(logits, targets.masked_fill(behind, 0), ends[0], ends[1], hidden=hidden, head=head)
    if row.carries:
        state.past, state.opening = _follow(state.past, state.opening, batch)

    def full(nll: Tensor) -> Tensor:
        result = torch.full((windows, length), math.nan, dtype=nll.dtype, device=nll.device)
        result[batch.scored] = nll
        return result

    nll, base_nll = state.step(batch).nll(), Adjusted(batch).nll()
    if not bool(nll.isfinite().all() & base_nll.isfinite().all()):
        raise InputError("logits: they give NaN or infinite losses at scored positions")
    return Adapted(full(nll), full(base_nll), state)


def _tensor(name: str, value: Any) -> Tensor:
    """A tensor as it is; an array, or lists of numbers, as a tensor."""
    if isinstance(value, Tensor):
        return value
    try:
        # torch refuses arrays of another byte order, and warns about those that are read-only
        array = np.asarray(value)
        array = array.astype(array.dtype.newbyteorder("="), copy=not array.flags.writeable)
        return torch.from_numpy(array)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"{name}: expected a tensor or an array of numbers, got {type(value).__name__}") from None


def _integers(values: Tensor) -> bool:
    return not (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _end(value: Any, length: int, windows: int, device: torch.device) -> Tensor:
    """int64 [W] of one number or W of them; None is the window's length."""
    end = _tensor("context and scored", length if value is None else value)
    if not _integers(end) or end.shape not in ((), (windows,)):
        raise InputError(f"context and scored: expected an integer or {windows} of them")
    return end.to(device).long().expand(windows)


def _calibration(given: Any, frequency: Any, vocabulary: int) -> Calibration:
    """What the closed forms take from the model's training data, frequencies checked; empty where nothing is given."""
    if given is None:
        return Calibration(None if frequency is None else _frequency(frequency, vocabulary))
    if frequency is not None:
        raise InputError("frequency and calibration: give one of them; a calibration has frequencies of its own")
    if not isinstance(given, Calibration):
        raise InputError(f"calibration: expected what read_calibration returns, got {type(given).__name__}")
    return given if given.frequency is None else replace(given, frequency=_frequency(given.frequency, vocabulary))


def _frequency(value: Any, vocabulary: int) -> Tensor:
    """float64 [V], shares that sum to 1."""
    frequency = _tensor("frequency", value)
    if frequency.shape != (vocabulary,):
        raise InputError(f"frequency {tuple(frequency.shape)}: expected {(vocabulary,)}")
    if frequency.is_complex() or not bool(frequency.isfinite().all() & (frequency >= 0).all() & (frequency.sum() > 0)):
        raise InputError("frequency: expected counts or shares of tokens, >= 0 and not all 0")
    return frequency.double() / frequency.double().sum()


def _check_state(state: Any, preset: str, vocabulary: int, given: Calibration, bos_id: int | None) -> None:
    """Raises InputError unless `state` comes from an earlier call with these arguments."""
    if isinstance(state, Adapted):
        raise InputError("state: this is the whole result of the call before; pass its .state")
    if not isinstance(state, Adapter):
        raise InputError(f"state: expected the .state of the call before, got {type(state).__name__}")
    if state.row != state.calibration.resolve(parse_preset(preset)):
        raise InputError(f"state: it is that of preset {state.row.name!r} or of other options, not of {preset!r}")
    if state.vocabulary not in (None, vocabulary):
        raise InputError(f"state: built for a vocabulary of {state.vocabulary}; logits have {vocabulary}")
    if bos_id is not None and bos_id != state.bos_id:
        raise InputError(f"state: built with bos_id {state.bos_id}; this call has bos_id {bos_id}")
    frequency, known = given.frequency, state.calibration.frequency
    if frequency is not None and (known is None or not torch.equal(known.to(frequency), frequency)):
        raise InputError("state: built with another frequency than this call's")
    numbers = (given.scale, given.decay, given.gates)
    if numbers != (None,) * 3 and numbers != (
        state.calibration.scale,
        state.calibration.decay,
        state.calibration.gates,
    ):
        raise InputError("state: built with another calibration than this call's")


def _follow(past: Tensor | None, opening: Tensor | None, batch: WindowBatch) -> tuple[Tensor | None, Tensor | None]:
    """The tokens scored before a batch and those that it scores, int64 [n]: as many as a later call needs.

    And what the very first window scored, int64 [n], by which a second pass over the stream is recognised.

    Raises:
        InputError: a window whose context is not what was scored last, or a batch that was scored before.
    """
    new, count = batch.targets[batch.scored], batch.scored.sum(1)
    if not len(new):
        return past, opening
    first = int(count.nonzero()[0])
    if past is None:  # the first window's context was scored elsewhere
        past = batch.targets[first, : batch.context_end[first]]
    past = past.to(new.device)
    stream, length = torch.cat([past, new]), batch.targets.size(1)
    begin = len(past) + count.cumsum(0) - count  # where each window's scored tokens lie in the stream
    offset = torch.arange(length, device=new.device)
    place = (begin - batch.context_end)[:, None] + offset
    known = (offset < batch.context_end[:, None]) & (place >= 0) & (count > 0)[:, None]
    wrong = (known & (stream[place.clamp(0, len(stream) - 1)] != batch.targets)).any(1)
    if bool(wrong.any()):
        window = int(wrong.nonzero()[0])
        raise InputError(
            f"targets: the context of window {window}, {int(batch.context_end[window])} tokens, is not what was scored "
            f"last before it: expected consecutive windows{' after those of the state' if window == first else ''}"
        )
    scored_before = len(new) >= _SHORTEST_REPLAY and torch.equal(past[-len(new) :], new)
    if scored_before and int(batch.context_end[first]) == 0:
        raise InputError(f"targets: the call before scored the same {len(new)} tokens: each may be scored once")
    fresh = (batch.context_end == 0) & (count > 0)
    if opening is None:
        opening, fresh[first] = batch.targets[first][batch.scored[first]].clone(), False
    if len(opening) >= _SHORTEST_REPLAY:
        for at in begin[fresh].tolist():
            if torch.equal(stream[at : at + len(opening)], opening.to(stream)):
                raise InputError(
                    f"targets: the first {len(opening)} tokens of the stream come again: each may be scored once"
                )
    return stream[-max(length, len(new)) :].clone(), opening
