"""What an evaluation reads: settings to a checked model, tokenizer, token stream, and rows of adaptations."""

import math
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from .. import corpus
from ..artifact import Artifact, load_artifact, parse_overrides
from ..config import EvalSettings
from ..data import ByteCount, Tokenizer, TokenStream, open_shards, read_documents
from ..errors import InputError
from ..slot import Adaptation, from_environment, parse_preset
from ..windows import Plan

_MAX_BATCH_WINDOWS = 32
_LOGIT_BYTES = 1 << 28  # of one batch's float32 logits, which set the default batch


@dataclass(frozen=True)
class Inputs:
    """Everything that an evaluation reads.

    Args:
        artifact: the model as stored, with its size on disk.
        stream: tokens.
        source: what the tokens are, for people.
        text_bytes: byte counts where the input was text, else None.
    """

    artifact: Artifact
    artifact_bytes: int
    tokenizer: Tokenizer
    stream: TokenStream
    source: str
    text_bytes: ByteCount | None


def read_inputs(settings: EvalSettings) -> Inputs:
    """Read and check model, tokenizer and tokens.

    Raises:
        InputError: anything missing, damaged or made for another model.
    """
    shipped = resources.files("slotfast") / "demo"
    artifact_path = Path(settings.artifact or str(shipped / "demo.slotfast"))
    artifact = load_artifact(artifact_path, parse_overrides(settings.model_config_))
    if assumed := artifact.metadata.get("assumed"):
        shown = ", ".join(f"{key}={value}" for key, value in assumed.items())
        print(f"warning: {artifact_path} does not say, so it is assumed: {shown} (--model-config)", file=sys.stderr)
    tokenizer = Tokenizer(settings.tokenizer or str(shipped / "demo.model"))
    expected = artifact.metadata.get("tokenizer_sha256")
    if tokenizer.vocab_size != artifact.config.vocab_size or expected not in (None, tokenizer.sha256):
        raise InputError(
            f"{tokenizer.path}: {tokenizer.vocab_size} pieces, SHA-256 {tokenizer.sha256[:12]}; the model needs "
            f"{artifact.config.vocab_size} pieces, SHA-256 {(expected or 'unknown')[:12]}: pass its own --tokenizer"
        )
    tokens, text_bytes = settings.tokens, None
    if tokens is not None and settings.text is not None:
        raise InputError("--tokens and --text: give one of them")
    if tokens is None and settings.text is None and settings.data_path:
        tokens = os.path.join(settings.data_path, "fineweb_val_*.bin")
    if tokens is not None:
        if settings.tokenizer is None:
            print("warning: no --tokenizer: the shards are taken for tokens of the shipped one", file=sys.stderr)
        stream, source = open_shards(tokens, settings.max_tokens), tokens
    else:
        if settings.text is None:
            documents = iter(corpus.test_documents())
            source = f"language reference inside Python {platform.python_version()}"
        else:
            documents, source = read_documents(settings.text), settings.text
        ids, text_bytes = tokenizer.encode_documents(documents, settings.max_tokens)
        stream = TokenStream([ids])
    if len(stream) < 2:
        raise InputError(f"{source}: {len(stream)} tokens; scoring needs at least 2")
    stream.check_vocabulary(artifact.config.vocab_size)
    return Inputs(artifact, artifact_path.stat().st_size, tokenizer, stream, source, text_bytes)


def choose_rows(settings: EvalSettings) -> list[Adaptation]:
    """The adaptations to run, in order, without `none`, which is always scored.

    Raises:
        InputError: unknown preset, one given twice, or one that leaks without --allow-noncausal.
    """
    rows = []
    enabled = os.environ.get("SLOT_ENABLED", "1").lower() not in ("0", "false", "no", "off")
    for text in settings.preset if enabled else []:
        row = from_environment(parse_preset(text), text)
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
    """Windows of the training length, shorter where the whole stream is."""
    predictions = len(inputs.stream) - 1
    length = min(inputs.artifact.config.seq_len, max(predictions, settings.stride))
    return Plan(predictions, settings.seq_len or length, settings.stride)


def choose_batch(settings: EvalSettings, rows: Sequence[Adaptation], plan: Plan, vocab_size: int) -> int:
    """Windows of one forward: what fits, a multiple of every batch that a row adapts together."""
    unit = math.lcm(*(row.batch for row in rows if row.scope == "batch"))
    fits = _LOGIT_BYTES // (4 * plan.seq_len * vocab_size)
    chosen = settings.batch_windows or max(unit, min(fits, _MAX_BATCH_WINDOWS) // unit * unit)
    if chosen % unit:
        raise InputError(
            f"--batch-windows {chosen}: expected a multiple of {unit}, the windows that a preset fits together"
        )
    return chosen if chosen <= len(plan) or settings.batch_windows else max(len(plan), 1)
