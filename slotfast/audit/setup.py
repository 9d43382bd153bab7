"""What is audited, and on what: the command's settings, read once."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import shipped
from ..config import AuditSettings
from ..data import ByteCount, Tokenizer, TokenStream, open_shards, read_documents
from ..errors import InputError
from ..eval import Streaming
from ..eval.inputs import Sources, choose_rows, read_inputs
from ..learn import LEARNING, Learning, calibrated_row
from ..slot import PRESETS, Adaptation, Calibration
from ..worker import Worker
from .checks import ByteRule
from .engine import Runs
from .inputs import checked_rule, code_hashes, excerpt, load_function, sha256
from .log import run_loop
from .own import OwnLoop
from .places import Hints
from .streams import Stream, synthetic

DRAWN = "drawn tokens"


@dataclass(frozen=True)
class Subject:
    """What is audited, and on what.

    Args:
        run: gives a record of each named loop on a stream.
        names: of the loops.
        computed: our own rows, whose verdicts are compared with what is measured.
        audited: these rows with the numbers that they were audited with; see `_reaching`.
        files: what the verdict depends on: name -> SHA-256.
        stream: what they are run on.
        whole: the stream that it is cut from, where there is one, and its bytes if it was text.
    """

    run: Runs
    names: list[str]
    stream: Stream
    hints: Hints
    byte_rule: ByteRule | None
    source: str
    computed: dict[str, Adaptation | Learning]
    files: dict[str, str]
    audited: dict[str, Adaptation | Learning] = field(default_factory=dict)
    whole: TokenStream | None = None
    text_bytes: ByteCount | None = None


def read_subject(settings: AuditSettings, rng: np.random.Generator) -> Subject:
    """Everything that the command audits.

    Raises:
        InputError: anything missing, damaged, or that does not go together.
    """
    return _anybodys(settings, rng) if settings.score else _own(settings)


def _own(settings: AuditSettings) -> Subject:
    anybodys = {"vocab_size": settings.vocab_size, "bos_id": settings.bos_id, "byte_rule": settings.byte_rule}
    for name, value in anybodys.items():
        flag = "--" + name.replace("_", "-")
        if value is not None:
            raise InputError(f"{flag}: is for --score; the model has its own")
    if settings.sinks and settings.forward == "windows":
        raise InputError(f"--sinks {settings.sinks}: is for a stream; add --forward stream")
    presets = [name for preset in settings.preset for name in ([*PRESETS, *LEARNING] if preset == "all" else [preset])]
    rows = {"none": PRESETS["none"]} if "none" in presets else {}
    rows |= {row.name: row for row in choose_rows(presets, allow_noncausal=True)}
    if not rows:
        raise InputError("--preset: SLOT_ENABLED is off: nothing is left to audit")
    inputs = read_inputs(
        Sources(
            settings.artifact, settings.model_config_, None, settings.tokens, None, settings.text, settings.tokenizer
        )
    )
    rows = {name: _as_evaluated(row, inputs.artifact.metadata) for name, row in rows.items()}
    unit = math.lcm(*(row.unit for row in rows.values() if isinstance(row, Adaptation)))
    chunks = (row.chunk for row in rows.values() if isinstance(row, Learning) and row.keys != "windows")
    hints = _hints(settings, min(max([64, *chunks]), inputs.artifact.config.seq_len), 8, max(unit, 8 // unit * unit), 2)
    if hints.batch_windows % unit:
        raise InputError(f"--batch-windows {hints.batch_windows}: expected a multiple of {unit}, fitted together")
    fewest = hints.seq_len + hints.stride * hints.batch_windows
    if settings.max_tokens is not None and settings.max_tokens < fewest:
        raise InputError(f"--max-tokens {settings.max_tokens}: two batches of these windows need {fewest}")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if settings.device == "auto" else settings.device
    tokenizer, artifact = inputs.tokenizer, inputs.artifact
    tokens = excerpt(inputs.stream, tokenizer.bos_id, settings.max_tokens or _enough(hints))
    audited = {name: _reaching(row, tokens, tokenizer.bos_id) for name, row in rows.items()}
    loop = OwnLoop(
        artifact.model(backend=settings.backend).to(device),
        audited,
        Calibration.stored(artifact.unigram, artifact.metadata),
        tokenizer.byte_table,
        tokenizer.bos_id,
        hints,
        Worker(device, backend=settings.backend, compile=settings.compile),
        # Blocks of another size than the windows' batches, so that their borders can be told apart
        Streaming(settings.sinks, 3 * hints.stride) if settings.forward == "stream" else None,
    )
    artifact_path = Path(settings.artifact or shipped.MODEL)
    files = code_hashes(None) | {"artifact": sha256(artifact_path), "tokenizer": tokenizer.sha256}
    return Subject(
        loop, list(rows), Stream(tokens, artifact.config.vocab_size, tokenizer.bos_id), hints, loop.byte_rule,
        inputs.source, rows, files, audited, inputs.stream, inputs.text_bytes,
    )  # fmt: skip


def _as_evaluated(row: Adaptation | Learning, metadata: Mapping[str, Any]) -> Adaptation | Learning:
    """The row with the numbers that the model's calibration chose, which an evaluation would use."""
    return calibrated_row(row, metadata) if isinstance(row, Learning) else row


def _reaching(row: Adaptation | Learning, tokens: Tensor, bos_id: int) -> Adaptation | Learning:
    """The row with numbers that let a short stream reach all that it does: learning from a chunk, a slot's second
    document, keys forwarded again, a phase. Whether a row is causal follows from none of them."""
    if not isinstance(row, Learning):
        return row
    documents, most = 1 + int((tokens[1:] == bos_id).sum()), {}
    if row.keys == "windows":
        most["chunk"] = len(tokens) // 4
    if row.keys == "refresh":
        most["every"] = 2
    if row.slots:
        most["slots"] = documents // 2
    if row.phases:
        most |= {"prefix": max(row.phases, documents // 2), "piece": len(tokens) // 16}
    return row.model_copy(update={key: max(1, value) for key, value in most.items() if value < getattr(row, key)})


def _anybodys(settings: AuditSettings, rng: np.random.Generator) -> Subject:
    if settings.model_config_ is not None:
        raise InputError("--model-config: goes with --artifact; a loop given with --score makes its model as it likes")
    if settings.artifact is not None:
        raise InputError("--artifact: is for our own presets; a loop given with --score loads its own model")
    if settings.forward == "stream" or settings.sinks:
        raise InputError(
            "--forward and --sinks: are for our own presets; a loop given with --score forwards as it likes"
        )
    score, name = load_function("--score", settings.score), settings.score
    tokenizer = Tokenizer(settings.tokenizer) if settings.tokenizer else None
    vocab_size = settings.vocab_size or (tokenizer and tokenizer.vocab_size)
    if vocab_size is None:
        raise InputError("--score: expected --vocab-size or --tokenizer beside it")
    if tokenizer and tokenizer.vocab_size != vocab_size:
        raise InputError(f"--vocab-size {vocab_size}: {tokenizer.path} has {tokenizer.vocab_size} pieces")
    bos_id = settings.bos_id if settings.bos_id is not None else tokenizer and tokenizer.bos_id
    if bos_id is not None and bos_id >= vocab_size:
        raise InputError(f"--bos-id {bos_id}: expected 0 to {vocab_size - 1}")
    if settings.tokens and settings.text:
        raise InputError("--tokens and --text: give one of them")
    hints = _hints(settings, None, None, None, None)
    n = settings.max_tokens or _enough(hints)
    whole, text_bytes = None, None
    if settings.text:
        if tokenizer is None:
            raise InputError("--text: expected --tokenizer beside it")
        ids, text_bytes = tokenizer.encode_documents(read_documents(settings.text))
        whole = TokenStream([ids])
    elif settings.tokens:
        whole = open_shards(settings.tokens)
    if whole is None:
        tokens, source = synthetic(n, vocab_size, bos_id, rng), DRAWN
    else:
        tokens, source = excerpt(whole, bos_id, n), settings.text or settings.tokens
        whole.check_vocabulary(vocab_size)
    byte_rule = None
    if tokenizer:
        table = tokenizer.byte_table

        def byte_rule(ids: np.ndarray) -> np.ndarray:
            return np.concatenate([[0], table.count(ids[1:], ids[:-1])])

    if settings.byte_rule:
        if tokenizer:
            raise InputError("--byte-rule: the rule of --tokenizer is known; give one of them")
        byte_rule = checked_rule(settings.byte_rule)

    def run(ids: Tensor, names: Any) -> dict:
        return {name: run_loop(score, ids, vocab_size)}

    files = code_hashes(score) | ({"tokenizer": tokenizer.sha256} if tokenizer else {})
    return Subject(
        run, [name], Stream.checked(tokens, vocab_size, bos_id), hints, byte_rule, source, {}, files,
        whole=whole, text_bytes=text_bytes,
    )  # fmt: skip


def _hints(
    settings: AuditSettings, seq_len: int | None, stride: int | None, batch_windows: int | None, ranks: int | None
) -> Hints:
    hints = Hints(seq_len, stride, batch_windows, ranks)
    given = {name: getattr(settings, name) for name in ("seq_len", "stride", "batch_windows", "ranks")}
    hints = replace(hints, **{name: value for name, value in given.items() if value is not None})
    if hints.seq_len and hints.stride and hints.stride > hints.seq_len:
        raise InputError(f"--stride {hints.stride}: expected at most the window length {hints.seq_len}")
    return hints


def _enough(hints: Hints) -> int:
    """Tokens for two batches of every rank."""
    if not hints.stride:
        return 1024
    batch = hints.stride * (hints.batch_windows or 8)
    return max(256, 1 + (hints.seq_len or hints.stride) + 2 * batch * (hints.ranks or 2))
