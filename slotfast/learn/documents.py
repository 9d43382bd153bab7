"""The loop over documents side by side, each with a window and LoRA factors of its own.

A document is walked in chunks. For each, its window of the last tokens is forwarded with its factors as they stand,
the chunk's tokens are charged, and the same forward's gradient of their mean loss takes one step; a document's last
chunk teaches nobody. Only the chunk's rows go through the head, and through the last layer's queries, attention
output and MLP. A slot whose document has ended takes the next one. In the stream's order charges are handed out in
that order: those of a document that ends before an earlier one does wait for it.

Source: PR #1530 and its successors; theirs computes the whole window's losses, and finished documents with the rest.
"""

import copy
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import ops
from ..errors import InputError
from ..model import GPT
from ..timing import Stopwatch
from .batch import Batch, Slot
from .charged import Charged
from .keys import LOOK_BACK, SlotKeys
from .loop import check
from .phases import train_phase
from .row import Learning
from .schedule import Document, Progress, Read, boundaries, chunk_of, documents, prefix, rounds
from .slots import SlotLora
from .top import OnTop

_ALIKE = 128  # tokens that windows of one batch differ by in length, at most
_FETCHED = 4096  # charges of one document that are brought to the host together
_WAITING = 1 << 22  # charges that wait for an earlier document: beyond, that one alone goes on


class DocumentLoop:
    """Charges documents chunk by chunk, and learns from each chunk once it is charged; runs once.

    Args:
        model: in evaluation mode; left as it was.
        row: how to learn; `row.apart`.
        window: tokens that one attends to, >= 1.
        bos_id: the token that starts a document.
        dtype: of the forward; the embedding's where None.
        keep_logprobs: give the distributions too.
        unlearned: also run the same forwards without learning.
        on_top: rows that adapt what the chunks are charged with; each document has its own.
        rank, world: of ranks that deal the documents out, which this is: it charges its own, and trains in phases on
            what all of them charge, each by itself and all alike.

    Attributes:
        seconds: of forwarding and learning, of the same forwards without learning, and of the rows on top.
        ledger: what was computed: tokens of windows, and rows of the head and the last layer.

    Raises:
        InputError: a chunk longer than the window, documents that nothing starts, weights that cannot learn.
    """

    def __init__(
        self,
        model: nn.Module,
        row: Learning,
        window: int,
        bos_id: int | None = None,
        dtype: torch.dtype | None = None,
        keep_logprobs: bool = False,
        unlearned: bool = True,
        on_top: OnTop | None = None,
        rank: int = 0,
        world: int = 1,
    ):
        check(row, model, window, bos_id)
        if not isinstance(model, GPT):
            raise InputError(f"preset {row.name!r}: slots and keys {row.keys!r} are for models of this package")
        self.model, self.row, self.window, self.keep_logprobs = model, row, window, keep_logprobs
        self.unlearned, self.dtype = unlearned, dtype or model.tok_emb.weight.dtype
        self.on_top, self.rank, self.world = on_top, rank, world
        self.bos_id = bos_id if row.scope == "document" else None
        self.lora = SlotLora(model, row, row.slots or 1)
        self.ledger = dict.fromkeys(("forward", "backward", "rows", "phases", "charged"), 0)
        self._base = model  # what phases have trained, where there are any
        self._slots: list[Slot | None] = [None] * (row.slots or 1)
        self._cold = self.lora.draw(0)
        # By whether they are learned: what is compared with remembers keys of its own
        kept = () if row.keys == "recompute" else (True, False) if self.unlearned else (True,)
        self._keys = {learned: SlotKeys(model, row.slots or 1, window, row.chunk) for learned in kept}
        self._watch = Stopwatch(model.tok_emb.weight.device)
        self._front = rank  # the document whose charges are handed out
        self._waiting: dict[int, list[Charged | None]] = defaultdict(list)  # those of later ones
        self._held = 0
        self._progress = Progress()
        self._trained: Mapping[str, Tensor] | None = None  # weights that phases have trained, to go on from

    @property
    def seconds(self) -> dict[str, float]:
        phases = ("learned", *(["unlearned"] if self.unlearned else []), *(["on top"] if self.on_top else []))
        return dict.fromkeys(phases, 0.0) | self._watch.seconds

    @property
    def forwards(self) -> float:
        """Passes through the model for each token: forward, back, and 3 for each token that a phase trains on."""
        work = self.ledger["forward"] + self.ledger["backward"] + 3 * self.ledger["phases"]
        return work / max(1, self.ledger["charged"])

    def run(
        self,
        read: Read,
        predictions: int | range,
        on_charged: Callable[[Charged], None],
        on_chunk: Callable[[], None] | None = None,
    ) -> None:
        """Charge and learn what is not charged yet.

        Args:
            read: tokens [start, stop) of the stream, integers.
            predictions: tokens of the stream but the first; or, of a stream that is one document, those of a piece of
                it, which learns apart: its windows see what is before it.
            on_charged: called with each chunk; in the order of the stream, or as they are charged where the row has
                another.
            on_chunk: called where `state_dict` may be saved.

        Raises:
            InputError: losses that are no numbers.
        """
        self._read, self._on_charged, self._on_chunk = read, on_charged, on_chunk
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.model.requires_grad_(False)
        try:
            if self.row.phases:
                self._base = copy.deepcopy(self.model)
                if self._trained:
                    self._base.load_state_dict(self._trained)
            with self.lora.hooked(self._base):
                self._run(predictions)
        finally:
            self._base = self.model
            for parameter in trained:
                parameter.requires_grad_(True)

    def state_dict(self) -> dict[str, Any]:
        """All that a loop with the same arguments needs to go on from here."""
        waiting = {
            number: [charged and (charged.start, charged.nll, charged.unlearned, charged.on_top) for charged in parts]
            for number, parts in self._waiting.items()
        }
        trained = self._trained if self._base is self.model else self._base.state_dict()
        return {
            "at": self._progress.state_dict(),
            "slots": [under_way and under_way.state_dict() for under_way in self._slots],
            "lora": self.lora.state_dict(),
            "keys": [keys.state_dict() for keys in self._keys.values()],
            "charges": (self._front, self._held, waiting),
            "ledger": dict(self.ledger),
            "seconds": self._watch.seconds,
            "trained": trained,
        }

    def load_state_dict(self, state: Mapping[str, Any], read: Read) -> None:
        """Go on from what `state_dict` gave.

        Args:
            read: see `run`.

        Raises:
            KeyError, TypeError, ValueError, AttributeError, RuntimeError: it is of another loop.
        """
        device = self.model.tok_emb.weight.device
        self._progress, self._trained = Progress.of(state["at"]), state["trained"]
        self._slots = [
            saved and Slot.of(saved, self.on_top and self.on_top.fresh(), read, device)
            for _, saved in zip(self._slots, state["slots"], strict=True)
        ]
        self.lora.load_state_dict(state["lora"])
        for keys, saved in zip(self._keys.values(), state["keys"], strict=True):
            keys.load_state_dict(saved, device)
        self._front, self._held, waiting = state["charges"]
        for number, parts in waiting.items():
            self._waiting[number] = [part and Charged(part[0], part[1], part[2], None, part[3]) for part in parts]
        self.ledger.update(state["ledger"])
        self._watch.go_on(state["seconds"])

    def _run(self, predictions: int | range) -> None:
        at, borders = self._progress, boundaries(self.row)
        found = documents(self._read, predictions, self.bos_id, self.window)
        charged: list[Document] = []  # by all ranks, which a phase may train on
        for number, each in enumerate(rounds(self.row, found, self.rank, self.world)):
            before = number < at.round  # over in an earlier run
            if before:
                deque(each.own, maxlen=0)
            else:
                self._run_round(each.own)
            if at.phase < len(borders):
                charged += each.everybody
                if not before and len(charged) >= borders[at.phase]:
                    self._train(charged, borders[at.phase])
                    at.phase, at.redraw = at.phase + 1, True
            if not before:
                at.round, at.count = number + 1, 0

    def _run_round(self, own: Iterator[Document]) -> None:
        at, chunk, places = self._progress, self.row.chunk, len(self._slots)
        group: list[Document] = []
        if self.row.order == "longest":
            group = list(own)
            if not group:  # there are fewer of them than ranks
                return
            chunk, places, own = chunk_of(self.row, group[-1].targets + 1), len(group), iter(group)
        if not at.count:
            if self.row.start == "warm" and (at.redraw or places < len(self._slots)):
                self._draw_anew(at.phase, places)
            at.redraw = places < len(self._slots)  # its factors were its own
        self._fill_slots(islice(own, at.count, None), chunk)
        if group and self.row.start == "warm":
            self._shrink_to_the_end(group, chunk)

    def _draw_anew(self, phase: int, places: int) -> None:
        """Factors that no document has moved yet; a group with fewer documents than slots has some of its own."""
        slots = len(self._slots)
        for slot in range(places):
            self.lora.put(slot, self.lora.draw(1 + slot + (2 * phase + (places < slots)) * slots))

    def _shrink_to_the_end(self, group: Sequence[Document], chunk: int) -> None:
        """As published, weight decay goes on where a document has ended, until the longest of its group has."""
        counts = [-(-document.targets // chunk) for document in group]
        for slot, count in enumerate(counts):
            self.lora.shrink(slot, self.row.steps * (max(counts) - count))

    def _train(self, charged: Sequence[Document], border: int) -> None:
        pieces = [self._read(each.start, each.start + each.targets + 1) for each in prefix(self.row, charged, border)]
        tokens = torch.from_numpy(np.concatenate(pieces).astype(np.int64))
        with self._watch("learned"), torch.enable_grad():
            self.ledger["phases"] += train_phase(self._base, self.row, tokens, self.window, self.bos_id, self.dtype)

    # -- a round

    def _fill_slots(self, queue: Iterator[Document], chunk: int) -> None:
        """Charge documents, each in the first slot that is free."""
        left = True
        while True:
            for slot, under_way in enumerate(self._slots):
                if under_way is not None or not left or self._held >= _WAITING:
                    continue
                document = next(queue, None)
                if document is None:
                    left = False
                    break
                self._begin(slot, document, chunk)
                self._progress.count += 1
            live = [slot for slot, under_way in enumerate(self._slots) if under_way is not None]
            if not live:
                return
            if self._held >= _WAITING:
                live = [slot for slot in live if self._at(slot).document.number == self._front]
            for slots in self._alike(live):
                self._step(slots)
            if self._on_chunk:
                for under_way in self._slots:
                    if under_way and under_way.charges:
                        self._hand_out(under_way, False)
                self._on_chunk()

    def _begin(self, slot: int, document: Document, chunk: int) -> None:
        if self.row.start == "cold":
            self.lora.put(slot, self._cold)
        elif self.row.start == "fresh":
            self.lora.put(slot, self.lora.draw(1 + document.number))
        self.lora.begin(slot)
        top = self.on_top and self.on_top.fresh()
        self._slots[slot] = Slot(document, chunk, self.row.order == "longest", top, document.seen)

    def _at(self, slot: int) -> Slot:
        """The document under way in a slot that has one."""
        under_way = self._slots[slot]
        if under_way is None:
            raise ValueError(f"slot {slot} is free")
        return under_way

    def _alike(self, live: Sequence[int]) -> list[list[int]]:
        """Slots whose windows are of about one length, those that learn and those that do not."""
        batches: dict[tuple, list[int]] = defaultdict(list)
        for slot in live:
            at = self._at(slot)
            cached = self._cached(at)
            length = at.chunk if cached else at.end - at.begin(self.window)
            batches[at.goes_on, cached and min(LOOK_BACK, at.done), -(-length // _ALIKE)].append(slot)
        return list(batches.values())

    def _cached(self, at: Slot) -> bool:
        """Whether the next chunk goes on from keys as they are."""
        again = {"stale": False, "refresh": at.number % self.row.every == 0, "recompute": True}[self.row.keys]
        return at.number > 0 and not again

    def _step(self, slots: Sequence[int]) -> None:
        """The next chunk of some documents: charged, and learned from where another one follows."""
        under_way, device = [self._at(slot) for slot in slots], self.model.tok_emb.weight.device
        batch = Batch(under_way, self._read, self.window, device, self._cached(under_way[0]))
        learns = under_way[0].goes_on
        with self._watch("learned"), torch.set_grad_enabled(learns), self.lora.using(slots, self.dtype) as leaf:
            nll, logits = self._losses(self._base, batch, slots, True)
        if self.unlearned:
            with self._watch("unlearned"), torch.no_grad():
                unlearned = self._losses(self.model, batch, slots, False)[0]
        else:
            unlearned = nll.detach()
        losses = torch.stack([nll.detach(), unlearned], 1)
        for slot, own, rows, targets in zip(slots, losses, logits.detach(), batch.targets, strict=True):
            self._charge(slot, own, rows, targets)
        if learns:
            with self._watch("learned"):
                self._learn(slots, batch, leaf, nll)

    def _learn(self, slots: Sequence[int], batch: Batch, leaf: Tensor, nll: Tensor) -> None:
        for step in range(self.row.steps):
            if step:
                with torch.enable_grad(), self.lora.using(slots, self.dtype) as leaf:
                    nll = self._losses(self._base, batch, slots, True, keep=False)[0]
            # A document's own mean; their sum has the gradient of each
            (gradient,) = torch.autograd.grad(nll.mean(1).sum(), leaf)
            self.ledger["backward"] += batch.tokens
            self.lora.step(slots, gradient)

    def _losses(
        self, model: GPT, batch: Batch, slots: Sequence[int], learned: bool, keep: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Losses [B, C] of the chunks' rows, and logits [B, C, V] where those that are charged need them."""
        attend = batch.attend(model, slots, self._keys.get(learned), keep)
        states = model.states(batch.inputs, attend, self.dtype, batch.before, batch.first)
        rows = torch.take_along_dim(states, batch.rows, 1)
        if learned:
            self.ledger["forward"] += batch.tokens
            self.ledger["rows"] += states.size(0) * states.size(1)
        if not (learned and keep and (self.keep_logprobs or self.on_top)):
            return self.lora.losses(model, rows, batch.targets), rows.new_empty(len(rows), 0)
        logits = self.lora.head(model, rows)
        return ops.cross_entropy(logits, batch.targets), logits

    # -- charges on their way out

    def _charge(self, slot: int, losses: Tensor, logits: Tensor, targets: Tensor) -> None:
        at = self._at(slot)
        count = at.end - at.done
        losses, logits = losses[:, :count], logits[:count]
        logprobs = [torch.log_softmax(logits, -1)] if self.keep_logprobs else []
        if at.top:
            with self._watch("on top"):
                top, rows = at.top.charge(logits, targets[:count], self.keep_logprobs)
            losses, logprobs = torch.cat([losses, top]), logprobs + rows
        at.charges.append((at.document.start + at.done, losses, logprobs))
        self.ledger["charged"] += count
        at.done = at.end
        ended = at.done == at.document.targets
        if ended or len(at.charges) * at.chunk >= _FETCHED:
            self._hand_out(at, ended)
        if ended:
            self._slots[slot] = None

    def _hand_out(self, at: Slot, ended: bool) -> None:
        """A document's charges to whoever takes them, or to where they wait for those of an earlier one."""
        losses = torch.cat([own for _, own, _ in at.charges], 1).cpu()  # the one time that the host waits
        self._check(at, losses[0])
        parts = losses.split([own.size(1) for _, own, _ in at.charges], 1)
        number = at.document.number
        for (start, _, logprobs), (nll, unlearned, *top) in zip(at.charges, parts, strict=True):
            on_top = torch.stack(top) if top else None
            own, others = (logprobs[0], logprobs[1:]) if logprobs else (None, ())
            charged = Charged(start, nll, unlearned if self.unlearned else None, own, on_top, others)
            self._waiting[number].append(charged)
            self._held += len(nll)
        at.charges.clear()
        if self.row.order == "longest":
            self._deliver(number)
            return
        if ended:
            self._waiting[number].append(None)
        while self._front in self._waiting:
            ended = self._waiting[self._front][-1] is None
            self._deliver(self._front)
            if not ended:
                return
            self._front += self.world

    def _deliver(self, number: int) -> None:
        for charged in filter(None, self._waiting.pop(number)):
            self._held -= len(charged.nll)
            self._on_charged(charged)

    def _check(self, at: Slot, nll: Tensor) -> None:
        broken = (~nll.isfinite()).nonzero()
        if len(broken):
            first = int(broken[0])
            raise InputError(
                f"preset {self.row.name!r}: a loss of {float(nll[first])} for the token at position "
                f"{at.charges[0][0] + first + 1}: broken weights, or lr={self.row.lr:g} is too high for them"
            )
