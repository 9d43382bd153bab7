"""--resume: what a rank has scored, saved every few seconds, so that a killed evaluation ends with the same bits."""

import hashlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from .. import __version__
from ..command import checkpoint
from ..command.interrupt import Interrupt
from ..errors import InputError
from ..words import counted
from ..worker import ALONE, Worker
from .inputs import Inputs
from .learning import LearningPass
from .loop import SlidingPass
from .report import TokenRows
from .setup import Setup
from .together import Together

_COMMAND = "slotfast.eval"
_SECONDS = 5.0  # between two saves
_SHARE = 20  # and at least this many times as long as a save takes
_SAVE, _STOP = 1, 2  # what a rank wishes for


def rank_path(path: str, rank: int) -> str:
    """Where a rank saves its part."""
    return path if rank == 0 else f"{path}.rank{rank}"


def describe(inputs: Inputs, setup: Setup, model: nn.Module, per_token: bool) -> dict[str, Any]:
    """All that an evaluation's bits depend on, in which it must agree with the saved one.

    Args:
        model: on the device, before it is trained.
        per_token: whether every token's loss is kept.
    """
    table = inputs.tokenizer.byte_table
    unigram = inputs.artifact.unigram
    rows = [row.summary() for row in (*setup.rows, *setup.learning)]
    worker = setup.worker
    return {
        "version": __version__,
        "torch": str(torch.__version__),  # a class of torch's own otherwise
        "threads": torch.get_num_threads(),
        "model": _sha256(*model.state_dict().values(), *([] if unigram is None else [unigram])),
        "model_config": _sha256_json(inputs.artifact.config.model_dump()),
        "calibration": _sha256_json(inputs.artifact.metadata.get("calibration")),
        "text": inputs.stream.sha256(),
        "tokenizer": _sha256(table.base, table.leading_space, table.boundary),
        "seq_len": setup.plan.seq_len,
        "stride": setup.plan.stride,
        "preset": [row["name"] for row in rows],
        "preset options": _sha256_json(rows),
        "per_token": per_token,
        "weights": setup.weights,
        "device": worker.device_name,
        "backend": setup.backend,
        "ranks": worker.world,
        "batch_windows": setup.batch_windows,
        "adapt_windows": setup.adapt_windows,
        "forward": setup.forward,
        "sinks": setup.learning_sinks if setup.learning else setup.sinks,
        "block_tokens": setup.block_tokens,
        "dtype": worker.dtype_name,
        "compile": worker.compile,
    }


class Saver:
    """Saves a pass and the rows collected of it, and the passes of the rows that learn.

    Ctrl-C takes effect behind the batch that is under way, which is saved first, where `interrupt` is entered. Where
    ranks train one model together, they save it together: behind a chunk, if any of them wants to, and at its end.

    Args:
        path: of this rank's part.
        run: see `describe`.
        sliding: fresh.
        collected: every token's losses; empty where they are not asked for.
        learners: fresh.
        worker: this process.

    Raises:
        InputError: a file is there, and it is damaged or belongs to another evaluation, or does not go with those of
            the other ranks.
    """

    def __init__(
        self,
        path: str,
        run: Mapping[str, Any],
        sliding: SlidingPass,
        collected: TokenRows,
        learners: Sequence[LearningPass] = (),
        worker: Worker = ALONE,
    ):
        self.path, self.run, self.sliding, self.collected, self.learners = path, run, sliding, collected, learners
        self.seconds = 0.0  # that the passes took before they were saved
        shared = [learner for learner in learners if learner.together]
        self._together = Together(path, _COMMAND, run, worker) if shared else None
        state = self._together.load(self._chunks()) if self._together else checkpoint.load(path, _COMMAND, run)
        if state is not None:
            try:
                sliding.load_state_dict(state["pass"])
                collected.load_state_dict(state["rows"])
                for learner, saved in zip(learners, state["learners"], strict=True):
                    learner.load_state_dict(saved)
            except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError):
                raise InputError(f"{path}: its state does not fit this evaluation: damaged") from None
            parts = (sliding.seconds, *(learner.loop.seconds for learner in learners))
            self.seconds = sum(sum(part.values()) for part in parts)
            print(f"{path}: going on behind {counted(sliding.windows, 'window')}", file=sys.stderr, flush=True)
        self._due = time.perf_counter() + _SECONDS
        self.interrupt = Interrupt(path)

    def _chunks(self) -> list[int]:
        """How many chunks of each model that ranks train together are behind this one."""
        return [learner.loop.chunks for learner in self.learners if learner.together]

    def _state(self) -> dict[str, Any]:
        learners, chunks = [learner.state_dict() for learner in self.learners], self._chunks()
        parts = {"pass": self.sliding.state_dict(), "rows": self.collected.state_dict()}
        return {**parts, "learners": learners, "chunks": chunks}

    def save(self) -> None:
        """Save the state as it is."""
        checkpoint.save(self.path, _COMMAND, self.run, self._state())

    def save_when_due(self, learner: LearningPass | None = None) -> None:
        """Save every few seconds, less often where saving takes long, and before an interrupt ends it.

        Args:
            learner: the pass that is under way, of a row that learns.
        """
        together = learner is not None and learner.together
        start = time.perf_counter()
        wish = _STOP if self.interrupt.asked else _SAVE if start >= self._due else 0
        if together:
            # Behind its end each rank goes on by itself, and saves by itself
            wish = self._together.agree(max(wish, _SAVE if learner.loop.ended else 0))
        if wish:
            if together:
                self._together.save(self._state())
            else:
                self.save()
            now = time.perf_counter()
            self._due = now + max(_SECONDS, _SHARE * (now - start))
        if wish == _STOP:
            raise KeyboardInterrupt


def _sha256_json(document: Any) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _sha256(*arrays: torch.Tensor | np.ndarray) -> str:
    found = hashlib.sha256()
    for array in arrays:
        array = torch.as_tensor(array).detach().cpu().contiguous()
        found.update(f"{array.dtype} {list(array.shape)}".encode())
        found.update(array.reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()
