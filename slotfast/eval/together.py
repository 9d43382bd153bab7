"""Saved states of ranks that train a model together: all of them behind the same chunk, wherever the run is killed.

Each rank writes its state beside its file, as FILE.next; when all have, each puts its own in the file's place. Killed
in between, some have the newer state in one place and some in the other, or not all have it: so each says what it has,
and all go on from the newest that everybody has. What a rank saves by itself between two such saves is behind the same
chunk.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .. import saved
from ..command import checkpoint
from ..errors import InputError
from ..words import counted
from ..worker import Worker


class Together:
    """The file of one of several ranks.

    Args:
        path: of this rank's file.
        command, run: see `checkpoint.save`.
        worker: this process; every rank makes the same calls.
    """

    def __init__(self, path: str, command: str, run: Mapping[str, Any], worker: Worker):
        self.path, self.command, self.run, self.worker = path, command, run, worker
        self._next = Path(os.path.realpath(path) + ".next")

    def load(self, start: Sequence[int]) -> dict[str, Any] | None:
        """The newest state behind the same chunks on all ranks, or None at their start.

        Args:
            start: chunks of each model that are trained on before anything is.

        Raises:
            InputError: a file of any rank is damaged or another run's, or the ranks have none in common.
        """
        states: dict[tuple[int, ...], tuple[Path, dict[str, Any] | None]] = {}
        fault = None
        try:
            for path in (Path(self.path), self._next):
                state = checkpoint.load(path, self.command, self.run)
                if state is not None:
                    states[tuple(saved.whole(chunks, 0, 1 << 62) for chunks in state["chunks"])] = path, state
                elif path != self._next:
                    states[tuple(start)] = path, None
        except InputError as error:
            fault = str(error)
        except (KeyError, TypeError, ValueError):
            fault = f"{path}: its state does not fit this evaluation: damaged"
        found: list[Any] = [None] * self.worker.world
        dist.all_gather_object(found, (fault, self.path, list(states)))
        for each, _, _ in found:
            if each is not None:
                raise InputError(each)
        common = set.intersection(*(set(chunks) for _, _, chunks in found))
        if not common:
            places = ", ".join(f"{path} behind {counted(sum(max(chunks)), 'chunk')}" for _, path, chunks in found)
            raise InputError(f"{places}: expected files behind the same one; without any, the run starts anew")
        path, state = states[max(common)]
        if path == self._next:
            os.replace(path, os.path.realpath(self.path))
        self._next.unlink(missing_ok=True)
        return state

    def save(self, state: Mapping[str, Any]) -> None:
        """Save the states of all ranks, which are behind the same chunks.

        Args:
            state: its `chunks` says how many of each model are trained on.
        """
        checkpoint.save(self._next, self.command, self.run, state)
        self.agree(0)  # everybody has written
        os.replace(self._next, os.path.realpath(self.path))

    def agree(self, wish: int) -> int:
        """The most that any rank wishes for."""
        most = torch.tensor([wish], device=self.worker.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return int(most)
