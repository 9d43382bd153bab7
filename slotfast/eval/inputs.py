"""What an evaluation reads: settings to a checked model, tokenizer, token stream, and rows of adaptations."""

import math
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from .. import corpus
from ..artifact import Artifact, is_ours, load_artifact, parse_overrides
from ..config import EvalSettings, switch
from ..data import ByteCount, Text, Tokenizer, TokenStream, open_shards, read_documents
from ..errors import InputError
from ..foreign import ForeignModel, HuggingFaceTokenizer, read_foreign
from ..learn import Learning, parse_row
from ..slot import Adaptation, first_position, from_environment, is_published
from ..ttt import ScoreFirst
from ..windows import Plan
from ..words import counted
from ..worker import Worker
from .forward import Streaming, streams

_MAX_BATCH_WINDOWS = 32
_MAX_ADAPT_WINDOWS = 8192  # more would fill no GPU better
_BLOCK_TOKENS = {"cpu": 1024, "cuda": 16384}  # on two CPUs 512 to 4096 are within a tenth of each other
_LOGIT_BYTES = 1 << 28  # of one batch's float32 logits, which set the default batch


@dataclass(frozen=True)
class Inputs:
    """Everything that an evaluation reads.

    Args:
        artifact: the model as stored, with its size on disk; a model of another project has none.
        stream: tokens.
        source: what the tokens are, for people.
        text_bytes: byte counts where the input was text, else None.
    """

    artifact: Artifact | ForeignModel
    artifact_bytes: int | None
    tokenizer: Tokenizer
    stream: TokenStream
    source: str
    text_bytes: ByteCount | None

    @property
    def text(self) -> Text:
        return Text(self.stream, self.tokenizer.byte_table, self.tokenizer.bos_id)


def read_inputs(settings: EvalSettings) -> Inputs:
    """Read and check model, tokenizer and tokens.

    Raises:
        InputError: anything missing, damaged or made for another model.
    """
    artifact, artifact_bytes, tokenizer = _read_model(settings)
    tokens, flag, text_bytes = settings.tokens, "--tokens", None
    if tokens is not None and settings.text is not None:
        raise InputError("--tokens and --text: give one of them")
    if tokens is None and settings.text is None and settings.data_path:
        tokens, flag = os.path.join(settings.data_path, "fineweb_val_*.bin"), "--data-path"
    if tokens is not None:
        if settings.tokenizer is None and not isinstance(tokenizer, HuggingFaceTokenizer):
            print("warning: no --tokenizer: the shards are taken for tokens of the shipped one", file=sys.stderr)
        stream, source = open_shards(tokens, settings.max_tokens, flag), tokens
    else:
        if settings.text is None:
            documents = iter(corpus.test_documents())
            source = f"language reference inside Python {platform.python_version()}"
        else:
            documents, source = read_documents(settings.text), settings.text
        ids, text_bytes = tokenizer.encode_documents(documents, settings.max_tokens)
        stream = TokenStream([ids])
    if len(stream) < 2:
        raise InputError(f"{source}: {counted(len(stream), 'token')}; scoring needs at least 2")
    stream.check_vocabulary(tokenizer.vocab_size)
    return Inputs(artifact, artifact_bytes, tokenizer, stream, source, text_bytes)


def _read_model(settings: EvalSettings) -> tuple[Artifact | ForeignModel, int | None, Tokenizer]:
    """Model, its size on disk where it is an artifact, and the tokenizer that goes with it."""
    if settings.model is not None:
        if settings.artifact is not None:
            raise InputError("--model and --artifact (or ARTIFACT_PATH): give one of them")
        if settings.model_config_ is not None:
            raise InputError("--model-config: goes with --artifact; a factory makes its model as it likes")
        model, tokenizer = read_foreign(settings)
        return model, None, tokenizer
    shipped = resources.files("slotfast") / "demo"
    artifact_path = Path(settings.artifact or str(shipped / "demo.slotfast"))
    artifact = load_artifact(artifact_path, parse_overrides(settings.model_config_))
    about = {} if is_ours(artifact_path) else artifact.metadata
    if assumed := about.get("assumed"):
        shown = ", ".join(f"{key}={value}" for key, value in assumed.items())
        source = about.get("generation", "pr1019")
        shown += f" (as {source} has it; --model-config overrides)"
        print(f"warning: {artifact_path} does not say, so it is assumed: {shown}", file=sys.stderr)
    if resembles := about.get("resembles"):
        others = " or ".join(resembles)
        print(f"warning: {artifact_path} looks like a file of {others}, not of {source}", file=sys.stderr)
    tokenizer = Tokenizer(settings.tokenizer or str(shipped / "demo.model"))
    check_tokenizer(tokenizer, artifact)
    return artifact, artifact_path.stat().st_size, tokenizer


def check_tokenizer(tokenizer: Tokenizer, artifact: Artifact) -> None:
    """Raise InputError where a tokenizer is not the one that a model was trained with."""
    expected = artifact.metadata.get("tokenizer_sha256")
    if tokenizer.vocab_size != artifact.config.vocab_size or expected not in (None, tokenizer.sha256):
        raise InputError(
            f"{tokenizer.path}: {tokenizer.vocab_size} pieces, SHA-256 {tokenizer.sha256[:12]}; the model needs "
            f"{artifact.config.vocab_size} pieces, SHA-256 {(expected or 'unknown')[:12]}: pass its own --tokenizer"
        )


def choose_rows(settings: EvalSettings) -> list[Adaptation | Learning]:
    """The rows to run, in order, without `none`, which is always scored.

    Raises:
        InputError: unknown preset, one given twice, or one that leaks without --allow-noncausal.
    """
    rows = []
    for text in settings.preset if switch("SLOT_ENABLED", True) else []:
        row = parse_row(text)
        if isinstance(row, Adaptation):
            row = from_environment(row, text)
        if row.optimizer == "none":
            continue
        row = row.model_copy(update={"name": text})
        if any(other.name == row.name for other in rows):
            raise InputError(f"preset {text!r}: given twice")
        if not row.compliance.causal and not settings.allow_noncausal:
            raise InputError(f"preset {text!r} is not causal: {row.compliance.why}; --allow-noncausal runs it anyway")
        rows.append(row)
    return rows


def choose_plan(settings: EvalSettings, inputs: Inputs) -> Plan:
    """Windows of the training length, and of new positions that are no more than that, unless the settings say so."""
    length = settings.seq_len or inputs.artifact.config.seq_len
    chosen = "stride" in settings.model_fields_set
    return Plan(len(inputs.stream) - 1, length, settings.stride if chosen else min(settings.stride, length))


def windows_that_fit(seq_len: int, vocab_size: int) -> int:
    """Windows whose float32 logits a batch may hold; 0 where even one is too large."""
    return _LOGIT_BYTES // (4 * seq_len * vocab_size)


def choose_batch(
    settings: EvalSettings, rows: Sequence[Adaptation], plan: Plan, vocab_size: int, worker: Worker
) -> tuple[int, int]:
    """Windows of one forward, and windows that are adapted at once: what fits, in multiples of what a row needs.

    A GPU solves a window on each of its processors, and wants many times what one forward gives; a CPU does not.
    """
    unit = math.lcm(*(row.unit for row in rows))
    fits = windows_that_fit(plan.seq_len, vocab_size)
    chosen = settings.batch_windows or max(unit, min(fits, _MAX_BATCH_WINDOWS) // unit * unit)
    if chosen % unit:
        raise InputError(
            f"--batch-windows {chosen}: expected a multiple of {unit}, the windows that a preset fits together"
        )
    batch = chosen if chosen <= len(plan) or settings.batch_windows else max(len(plan), 1)
    needed = plan.seq_len - min((first_position(row, plan.seq_len, plan.stride) for row in rows), default=0)
    memory = torch.cuda.mem_get_info(worker.device)[0] // 8 if worker.on_gpu else 0
    fits = min(memory // (4 * needed * vocab_size), _MAX_ADAPT_WINDOWS)
    together = settings.adapt_windows or max(batch, fits // batch * batch)
    if together % chosen and together % batch:
        raise InputError(f"--adapt-windows {together}: expected a multiple of {chosen}, the windows of one forward")
    return batch, max(batch, together // batch * batch)


def choose_streaming(
    settings: EvalSettings, rows: Sequence[Adaptation], inputs: Inputs, plan: Plan, worker: Worker
) -> Streaming | None:
    """How every token is forwarded once; None: windows.

    Raises:
        InputError: a stream is asked for and the model or the training has none, or its settings without it.
    """
    stored = stored_forward(inputs.artifact)
    chosen = settings.forward
    if chosen == "auto":
        # Published numbers are windows' numbers, and what was found at another length says nothing of this one
        suits = stored is not None and plan.seq_len <= inputs.artifact.config.seq_len and not settings.ttt
        trained_length = settings.seq_len in (None, inputs.artifact.config.seq_len)
        published = any(is_published(row) for row in rows)
        chosen = stored["forward"] if suits and trained_length and not published else "windows"
    if chosen == "windows":
        for flag, value in (("--sinks", settings.sinks), ("--block-tokens", settings.block_tokens)):
            if value is not None:
                raise InputError(
                    f"{flag} {value}: is for a stream, and this run forwards windows; add --forward stream"
                )
        return None
    if isinstance(inputs.artifact, ForeignModel) and not streams(inputs.artifact.module):
        raise InputError(
            f"--forward stream: {settings.model} has no stream(tokens, state) -> (states, state); use --forward windows"
        )
    if settings.ttt and (world := worker.world) > 1:
        raise InputError(
            f"--forward stream with --ttt on {world} processes: keys would come from weights of another process; "
            "run one, or --forward windows"
        )
    sinks = settings.sinks if settings.sinks is not None else (stored or {}).get("sinks", 0)
    return Streaming(sinks, settings.block_tokens or block_that_fits(inputs.artifact.config.vocab_size, worker.on_gpu))


def block_that_fits(vocab_size: int, on_gpu: bool = False) -> int:
    """Tokens of a stream's block: what a device does well, as far as their float32 logits fit."""
    fits = _LOGIT_BYTES // (4 * vocab_size)
    return max(1, min(_BLOCK_TOKENS["cuda" if on_gpu else "cpu"], fits))


def stored_forward(artifact: Artifact | ForeignModel) -> Mapping[str, Any] | None:
    """What the calibration found of windows and streams: forward, sinks, and the difference; None where it did not."""
    return (artifact.metadata.get("calibration") or {}).get("forward")


def choose_learning(
    settings: EvalSettings, rows: Sequence[Adaptation | Learning], world: int
) -> tuple[list[Adaptation], list[Learning]]:
    """The rows that share the run's forward, and those that learn, each with a forward of its own.

    Raises:
        InputError: a row that learns, in a run that it cannot be part of.
    """
    learning = [row for row in rows if isinstance(row, Learning)]
    for row in learning:
        where = f"preset {row.name!r}: "
        if world > 1:
            raise InputError(f"{where}on {world} processes is not built: its stream has one order; run one process")
        if settings.resume:
            raise InputError(f"{where}with --resume is not built: what it learned is not saved; leave out --resume")
        if settings.ttt:
            raise InputError(f"{where}with --ttt: both change the model; give one of them")
        if settings.weights == "int6":
            raise InputError(f"{where}with --weights int6: packed weights pass no gradients on; leave out --weights")
        if settings.model is not None:
            raise InputError(f"{where}with --model is not built: it learns with this package's own models")
    return [row for row in rows if isinstance(row, Adaptation)], learning


def choose_training(settings: EvalSettings, rows: Sequence[Adaptation], world: int) -> ScoreFirst | None:
    """The test-time training that --ttt asks for.

    Raises:
        InputError: it does not go together with packed weights, or with a streaming preset on several ranks.
    """
    if not settings.ttt:
        return None
    if settings.weights == "int6":
        raise InputError("--ttt with --weights int6: packed weights cannot be trained; leave out --weights")
    if world > 1 and settings.resume:
        raise InputError(f"--resume with --ttt on {world} processes: their weights cannot be saved apart; run one")
    streaming = [row.name for row in rows if row.scope == "prefix"]
    if world > 1 and streaming:
        raise InputError(
            f"--ttt on {world} processes: preset {streaming[0]!r} needs the stream in order; run one process"
        )
    names = ("chunk", "lr", "epochs", "batch", "momentum", "clip")
    return ScoreFirst(**{name: getattr(settings, f"ttt_{name}") for name in names})
