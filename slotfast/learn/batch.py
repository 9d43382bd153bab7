"""A document under way in a slot, and what some of them forward next."""

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ..model import GPT, Attend, WindowAttention
from ..worker import upload
from .keys import LOOK_BACK, SlotAttention, SlotKeys
from .schedule import Document, Read
from .top import OnTop


@dataclass
class Slot:
    """A document under way.

    Args:
        chunk: tokens of its chunks.
        early: whether the last window begins earlier where the document ends before its last chunk is full.
        done: of its targets that are charged, here or elsewhere.
        top: rows on top, or None.
        charges: those not handed out yet: the first prediction; losses learned, unlearned and of the rows on top, [2 +
            rows, n]; log-probabilities of all but the unlearned, or none.
    """

    document: Document
    chunk: int
    early: bool
    top: OnTop | None = None
    done: int = 0
    charges: list[tuple[int, Tensor, Sequence[Tensor]]] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        """All of it once its charges are handed out, in plain types."""
        top = self.top and self.top.state_dict()
        return {"document": astuple(self.document), "how": (self.chunk, self.early, self.done), "top": top}

    @classmethod
    def of(cls, state: Mapping[str, Any], top: OnTop | None, read: Read, device: torch.device) -> Self:
        """What `state_dict` gave; `top` is fresh."""
        document, (chunk, early, done) = Document(*state["document"]), state["how"]
        if top:
            top.load_state_dict(
                state["top"], read(document.start + document.seen + 1, document.start + done + 1), device
            )
        return cls(document, chunk, early, top, done)

    @property
    def end(self) -> int:
        """Targets charged after the next chunk."""
        return min(self.done + self.chunk, self.document.targets)

    def begin(self, window: int) -> int:
        """The next window's first token, counted from the document's.

        As published, windows end where their chunk does, so that how long a document is moves its last one. Ours end
        where a whole chunk would.
        """
        return max(0, (self.end if self.early else self.done + self.chunk) - window)

    @property
    def number(self) -> int:
        """Of the next chunk, among those that are charged here."""
        return (self.done - self.document.seen) // self.chunk

    @property
    def goes_on(self) -> bool:
        """Whether another chunk follows the next one, and so anything is learned from that."""
        return self.end < self.document.targets


class Batch:
    """What some documents forward next, left-aligned: what stands behind a shorter row is seen by nobody.

    Args:
        cached: rows are chunks that go on from keys that are kept, not windows.

    Attributes:
        inputs: int64 [B, before + T].
        before: leading tokens that only smear gate and bigram hash look at.
        first: of the T positions, the first whose state is wanted.
        rows: int64 [B, C, 1], the chunks' positions counted from there.
        targets: int64 [B, C]; 0 where a chunk is shorter.
        spans: of each row the first position in its document, that of its chunk, and the end.
    """

    def __init__(self, under_way: Sequence[Slot], read: Read, window: int, device: torch.device, cached: bool):
        self.before = min(LOOK_BACK, under_way[0].done) if cached else 0
        self.spans = spans = [(at.done if cached else at.begin(window), at.done, at.end) for at in under_way]
        length = max(end - begin for begin, _, end in spans)
        count = max(end - done for _, done, end in spans)
        self.first = min(done - begin for begin, done, _ in spans)
        inputs = np.zeros((len(spans), self.before + length), np.int64)
        targets, rows = np.zeros((len(spans), count), np.int64), np.zeros((len(spans), count, 1), np.int64)
        for number, (at, (begin, done, end)) in enumerate(zip(under_way, spans, strict=True)):
            tokens = read(at.document.start + begin - self.before, at.document.start + end + 1)
            inputs[number, : len(tokens) - 1] = tokens[:-1]
            targets[number, : end - done] = tokens[1 + self.before + done - begin :]
            rows[number, :, 0] = np.minimum(np.arange(count) + done - begin, length - 1) - self.first
        arrays = (upload(torch.from_numpy(array), device) for array in (inputs, rows, targets))
        self.inputs, self.rows, self.targets = arrays
        self.cached, self.window = cached, window

    @property
    def tokens(self) -> int:
        """Positions that are forwarded."""
        return self.inputs.size(0) * (self.inputs.size(1) - self.before)

    def attend(self, model: GPT, slots: Sequence[int], keys: SlotKeys | None, keep: bool) -> Attend:
        """Every position sees those before it in its window, and takes its key and value in where some are kept."""
        length, device = self.inputs.size(1) - self.before, self.inputs.device
        if keys is None:
            return WindowAttention(length, model.config, device, self.window)
        begins, ends = ([span[place] for span in self.spans] for place in (0, 2))
        return SlotAttention(keys, slots, begins, ends, length, device, self.cached, keep)
