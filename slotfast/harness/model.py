"""The model: requests of the harness to token streams, and one pass over each."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .. import config
from ..command.ranks import join_ranks
from ..data import TokenStream
from ..errors import InputError
from ..eval import Scored, SlidingPass
from ..eval.inputs import Inputs, Sources, choose_rows, read_model
from ..eval.setup import choose_batch, choose_length, choose_streaming, choose_worker
from ..learn import Charged, Learning, OnTop, make_loop
from ..model import GPT
from ..slot import Adaptation, Adapter, Calibration
from ..windows import Plan, Window
from .needed import harness

TemplateLM = harness("lm_eval.api.model").TemplateLM

# Flags of `slotfast eval` that say how a request is scored; the others say what is scored, or what is written.
ARGUMENTS = (
    *("model", "artifact", "model_config", "calibration", "tokenizer", "preset", "forward", "sinks", "block_tokens"),
    *("seq_len", "stride", "batch_windows", "weights", "backend", "device", "dtype", "config"),
)

_THEIR_DEVICE = "cuda:0"  # what the harness's command asks for where nobody asks for anything


class SlotfastLM(TemplateLM):
    """Any model that `slotfast eval` reads, as a model of the harness.

    Args:
        documents: `apart`: each document is a stream of its own, as the harness defines its numbers, and nothing is
            carried from one to the next; `joined`: all documents of a task are one stream, in the task's order, each
            behind a BOS that is charged to none of them; windows, caches and presets go on from one to the next, as
            in `slotfast eval`.
        add_bos_token: whether contexts of `loglikelihood` begin with the tokenizer's BOS, or its EOS where it has none.
        batch_size: windows of one forward; None or `auto`: what fits.
        max_batch_size: not used.
        device: auto, cpu, cuda, cuda:1; None is auto, and so is the harness's own default, cuda:0, without a GPU.
        options: `ARGUMENTS`: flags of `slotfast eval` with underscores, one `preset` among them. The stride is the
            whole window where it is not given, and the preset `none`: the harness's own numbers.

    Raises:
        InputError: an argument that does not exist or does not fit, a model or tokenizer that is missing or damaged,
            a preset that is not causal, or several processes.
    """

    backend = "causal"

    def __init__(
        self,
        documents: str = "apart",
        add_bos_token: bool = True,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **options: Any,
    ):
        super().__init__()
        if documents not in ("apart", "joined"):
            raise InputError(f"documents={documents}: expected apart or joined")
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise InputError("the model slotfast runs on one process; WORLD_SIZE says there are more")
        if batch_size is not None and not str(batch_size).startswith("auto"):
            options["batch_windows"] = batch_size
        if device is not None and (device != _THEIR_DEVICE or torch.cuda.is_available()):
            options["device"] = device
        self.joined, self.add_bos_token = documents == "joined", add_bos_token
        self.settings = _settings(options)
        self.row = _choose_row(self.settings.preset)
        with join_ranks(self.settings.device) as worker:
            self._worker = choose_worker(self.settings, worker)
        self._device = torch.device(self._worker.device)
        self._artifact, self._bytes, self._tokenizer = read_model(self.settings.pick(Sources))
        model = self._artifact.model(self.settings.weights, self._worker.backend).to(self._device)
        if self._worker.dtype == torch.float64:
            model = model.double()
        elif isinstance(model, GPT) and not isinstance(self.row, Learning):
            model.cast_matrices(self._worker.dtype)
        self._model = model
        self._length = choose_length(self.settings, self._artifact, [self.row] if self.row else [])
        self._stride = self.settings.stride if "stride" in self.settings.model_fields_set else self._length

    @property
    def eot_token_id(self) -> int:
        """The token that starts a document, and stands before one."""
        return self._tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        """By which the harness tells caches of requests apart."""
        return self._tokenizer.sha256

    @property
    def max_length(self) -> int:
        """Positions of a window."""
        return self._length

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of a text, with BOS in front where `add_special_tokens`, or `add_bos_token`, says so."""
        bos = self.add_bos_token if add_special_tokens is None else add_special_tokens
        return self._tokenizer.encode(string)[not bos :]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text, in nats: every token charged once, behind a BOS that is not.

        Args:
            requests: of the harness; `args` is (text,).
            disable_tqdm: draw no bar.
        """
        texts = [request.args[0] for request in requests]
        rows = [np.asarray(self._tokenizer.encode(text), np.int64) for text in texts]
        found: list[float] = []
        streams = [rows] if self.joined else [[row] for row in rows]
        for stream in tqdm(streams, "scoring", disable=disable_tqdm or len(streams) < 2):
            charged, _ = self._charge(np.concatenate(stream))
            # what stands at place p of the stream is charged by number p - 1; a document's BOS to nobody
            ends = np.cumsum([len(row) for row in stream])
            found += [
                0.0 - float(charged[end - len(row) : end - 1].sum()) for end, row in zip(ends, stream, strict=True)
            ]
        for text, value in zip(texts, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), value)
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Not built: adaptations of this package change what is scored, and were never meant for text of one's own.

        Raises:
            InputError: always.
        """
        raise InputError("the model slotfast scores texts and generates none: run tasks that ask for likelihoods")

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether each of its tokens is the likeliest."""
        found = []
        for names, context, continuation in tqdm(requests, "scoring", disable=disable_tqdm):
            tokens = np.asarray([*context, *continuation][-(self._length + 1) :], np.int64)
            count = min(len(continuation), len(tokens) - 1)
            nll, logprobs = self._charge(tokens, keep_logprobs=True)
            first = len(nll) - count
            greedy = bool((logprobs[first:].argmax(-1).cpu().numpy() == tokens[1 + first :]).all())
            found.append((-float(nll[first:].sum()), greedy))
            if names is not None:
                self.cache_hook.add_partial("loglikelihood", names, found[-1])
        return found

    def _charge(self, tokens: np.ndarray, keep_logprobs: bool = False) -> tuple[np.ndarray, Tensor | None]:
        """Losses in nats, float64 [N - 1], of tokens [N] but the first, and the distributions [N - 1, V] if kept."""
        if len(tokens) < 2:
            return np.empty(0), None
        stream = TokenStream([tokens])
        inputs = Inputs(self._artifact, self._bytes, self._tokenizer, stream, "request", False, None)
        rows = [self.row] if isinstance(self.row, Adaptation) else []
        plan = Plan(len(tokens) - 1, self._length, self._stride)
        streaming = choose_streaming(self.settings, rows, inputs, plan, self._worker)
        parts: list[Scored] | list[Charged] = []
        if isinstance(self.row, Learning):
            sinks = streaming.sinks if streaming else (inputs.stored_forward or {}).get("sinks", 0)
            calibration = Calibration.stored(inputs.artifact.unigram, inputs.artifact.metadata)
            on_top = OnTop.of([self.row], self._length, calibration, inputs.tokenizer.bos_id)
            how = {"keep_logprobs": keep_logprobs, "unlearned": False, "on_top": on_top}
            where = (sinks, inputs.tokenizer.bos_id, self._worker.dtype)
            loop = make_loop(self._model, self.row, self._length, *where, **how)
            loop.run(stream.read, len(tokens) - 1, parts.append)
            parts.sort(key=lambda part: part.start)
            nll = torch.cat([part.on_top[0] if on_top else part.nll for part in parts]).cpu().numpy()
            rows = [part.on_top_logprobs[0] if on_top else part.logprobs for part in parts] if keep_logprobs else None
            logprobs = rows and torch.cat(rows)
        else:
            plan = plan if streaming or self.joined else TailPlan(plan.predictions, plan.seq_len, plan.stride)
            batch, together = choose_batch(self.settings, rows, plan, inputs.artifact.config.vocab_size, self._worker)
            how = {"batch_windows": batch, "adapt_windows": together, "streaming": streaming, "worker": self._worker}
            calibration = Calibration.stored(inputs.artifact.unigram, inputs.artifact.metadata)
            adapters = [Adapter(row, calibration, inputs.tokenizer.bos_id) for row in rows]
            passed = SlidingPass(self._model, inputs.text, plan, adapters, keep_logprobs=keep_logprobs, **how)
            passed.run(on_scored=parts.append)
            nll = np.concatenate([part.nll[-1] for part in parts])
            logprobs = torch.cat([part.logprobs[-1] for part in parts]) if keep_logprobs else None
        return nll.astype(np.float64), logprobs


class TailPlan(Plan):
    """Windows as the harness lays them: the last one reaches back for a whole window, where the text is long enough."""

    def __getitem__(self, index: int) -> Window:
        window = super().__getitem__(index)
        shift = window.start + self.seq_len - self.predictions if index else 0
        if shift <= 0:
            return window
        return Window(index, window.start - shift, window.context_end + shift, window.scored_end + shift)


def _settings(options: Mapping[str, Any]) -> config.EvalSettings:
    """What `slotfast eval` would read from flags of these names; raises InputError where it would."""
    for name in options:
        if name not in ARGUMENTS:
            raise InputError(f"{name}: no such model argument; expected some of documents, {', '.join(ARGUMENTS)}")
    given = {"preset": "none", **options}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value is not None]
    return config.load(config.EvalSettings, "slotfast harness", "", flags)[0]


def _choose_row(preset: Sequence[str]) -> Adaptation | Learning | None:
    """The one row; None: plain. Raises InputError where there are several, or one that is not causal."""
    rows = choose_rows(preset, allow_noncausal=True)
    if len(preset) != 1:
        raise InputError(f"preset {' '.join(preset)}: the harness has one number for a task: expected one preset")
    for row in rows:
        if not row.compliance.causal:
            raise InputError(f"preset {row.name!r} is not causal: {row.compliance.why}")
    return rows[0] if rows else None
