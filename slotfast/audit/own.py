"""Our own evaluation as a loop under audit: the real sliding pass, all presets out of one forward, rank after rank."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from ..data import ByteTable, Text, TokenStream
from ..eval import Scored, SlidingPass, Streaming, WindowsLoop
from ..learn import Charged, Learning, OnTop, make_loop
from ..model import GPT
from ..slot import Adaptation, Adapter, Calibration
from ..windows import Plan
from ..worker import ALONE, Worker
from .log import Log, Record, read_log
from .places import Hints


@dataclass(frozen=True)
class OwnLoop:
    """Scores a stream as `slotfast eval` does, with any of its rows.

    Args:
        model: in evaluation mode, on the worker's device.
        rows: by name; that of `none` is the unadapted model. Those that learn run on one rank.
        calibration: what the closed form takes from the model's training data.
        byte_table: bytes of each token.
        bos_id: the token that starts a document.
        hints: window length, stride, windows of a batch, and the ranks that run one after the other.
        worker: where and how each rank computes.
        streaming: every token is forwarded once; None: windows.
    """

    model: GPT
    rows: dict[str, Adaptation | Learning]
    calibration: Calibration
    byte_table: ByteTable
    bos_id: int
    hints: Hints
    worker: Worker = ALONE
    streaming: Streaming | None = None

    def __call__(self, tokens: Tensor, names: Sequence[str]) -> dict[str, Record]:
        """One run of the named rows on a stream, int64 [N]."""
        logs = {name: Log() for name in names}
        learning = [name for name in names if isinstance(self.rows[name], Learning)]
        adapted = [name for name in names if name not in learning and self.rows[name].optimizer != "none"]
        index = {name: adapted.index(name) + 1 if name in adapted else 0 for name in names}

        def report(scored: Scored) -> None:
            for name, log in logs.items():
                if name in learning:
                    continue
                log.score(scored.position, scored.nll[index[name]], scored.n_bytes, scored.logprobs[index[name]])

        stream = TokenStream([tokens.numpy()])
        text = Text(stream, self.byte_table, self.bos_id)
        plan = Plan(len(stream) - 1, self.hints.seq_len, self.hints.stride)
        for name in learning:
            self._learn(self.rows[name], text, logs[name])
        for rank in range(self.hints.ranks) if len(learning) < len(names) else ():
            if not plan.owned(rank, self.hints.ranks):
                continue
            SlidingPass(
                self.model,
                text,
                plan,
                [Adapter(self.rows[name], self.calibration, self.bos_id) for name in adapted],
                batch_windows=self.hints.batch_windows,
                streaming=self.streaming,
                worker=replace(self.worker, rank=rank, world=self.hints.ranks),
                keep_logprobs=True,
            ).run(on_scored=report)
        return {name: read_log(log, tokens, self.model.config.vocab_size) for name, log in logs.items()}

    def _learn(self, row: Learning, text: Text, log: Log) -> None:
        sinks = self.streaming.sinks if self.streaming else 0

        def report(charged: Charged) -> None:
            position = charged.start + 1 + np.arange(len(charged.nll))
            tokens = text.stream.read(charged.start, charged.start + len(position) + 1)
            nll, logprobs = charged.nll, charged.logprobs
            if on_top:
                (nll,), (logprobs,) = charged.on_top, charged.on_top_logprobs
            log.score(position, nll, text.bytes_of(tokens), logprobs)
            log.update(position)

        model = self.model
        if row.apart and not self.worker.on_gpu:
            # Of documents side by side the lengths of others set how sums round, and AdamW makes a step of the least
            # bit of a gradient: in float64 what is left of that is nothing that an audit sees
            model = copy.deepcopy(model).double()
        on_top = OnTop.of([row], self.hints.seq_len, self.calibration, self.bos_id)
        if row.keys == "windows":
            plan = Plan(len(text.stream) - 1, self.hints.seq_len, self.hints.stride)
            tops = [Adapter(row.top, self.calibration, self.bos_id)] if row.top else []
            how = {"batch_windows": self.hints.batch_windows, "worker": self.worker, "keep_logprobs": True}
            loop = WindowsLoop(model, row, text, plan, tops, **how)
        else:
            how = {"keep_logprobs": True, "unlearned": False, "on_top": on_top}
            loop = make_loop(model, row, self.hints.seq_len, sinks, self.bos_id, **how)
        loop.run(text.stream.read, len(text.stream) - 1, report)

    def byte_rule(self, tokens: np.ndarray) -> np.ndarray:
        """Bytes of every token of a stream; none for the first, which is never charged."""
        return np.concatenate([[0], self.byte_table.count(tokens[1:], tokens[:-1])])
