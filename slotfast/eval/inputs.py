"""What an evaluation reads: a checked model, its tokenizer, a token stream, and rows of adaptations."""

import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import corpus, shipped
from ..artifact import Artifact, is_ours, load_artifact, parse_overrides
from ..config import switch
from ..data import ByteCount, Text, Tokenizer, TokenStream, is_jsonl, open_shards, read_documents
from ..errors import InputError
from ..foreign import ForeignModel, HuggingFaceTokenizer, read_foreign, with_calibration
from ..learn import Learning, given_keys, parse_row
from ..slot import Adaptation, from_environment
from ..words import counted


@dataclass(frozen=True)
class Sources:
    """What an evaluation is asked to read.

    Args:
        artifact: file of the model; the one in this package where None.
        model_config: what the file does not say of its model; see `slotfast.artifact.parse_overrides`.
        model: another project's model, package.module:factory or a folder of Hugging Face.
        tokens: glob of token shards.
        data_path: folder of the contest's shards, used where neither `tokens` nor `text` is given.
        text: file of text; the language reference inside Python where nothing is given.
        tokenizer: SentencePiece model or folder of Hugging Face; the model's own where None.
        max_tokens: read only the start.
        seq_len: length of the windows to come, where it is chosen.
        calibration: file that goes with `model`; see `slotfast.foreign.StoredCalibration`.
    """

    artifact: str | None = None
    model_config: str | None = None
    model: str | None = None
    tokens: str | None = None
    data_path: str | None = None
    text: str | None = None
    tokenizer: str | None = None
    max_tokens: int | None = None
    seq_len: int | None = None
    calibration: str | None = None


@dataclass(frozen=True)
class Inputs:
    """Everything that an evaluation reads.

    Args:
        artifact: the model as stored, with its size on disk; a model of another project has none.
        stream: tokens.
        source: what the tokens are, for people.
        plain: whether it is plain text, in which no document is marked.
        text_bytes: byte counts where the input was text, else None.
    """

    artifact: Artifact | ForeignModel
    artifact_bytes: int | None
    tokenizer: Tokenizer
    stream: TokenStream
    source: str
    plain: bool
    text_bytes: ByteCount | None

    @property
    def text(self) -> Text:
        return Text(self.stream, self.tokenizer.byte_table, self.tokenizer.bos_id)

    @property
    def stored_forward(self) -> Mapping[str, Any] | None:
        """What the calibration found: forward, sinks, and what a stream loses; None where none were compared."""
        return (self.artifact.metadata.get("calibration") or {}).get("forward")


def read_inputs(sources: Sources) -> Inputs:
    """Read and check model, tokenizer and tokens.

    Raises:
        InputError: anything missing, damaged or made for another model.
    """
    artifact, artifact_bytes, tokenizer = read_model(sources)
    tokens, flag, text_bytes = sources.tokens, "--tokens", None
    if tokens is not None and sources.text is not None:
        raise InputError("--tokens and --text: give one of them")
    if tokens is None and sources.text is None and sources.data_path:
        tokens, flag = os.path.join(sources.data_path, "fineweb_val_*.bin"), "--data-path"
    if tokens is not None:
        if sources.tokenizer is None and not isinstance(tokenizer, HuggingFaceTokenizer):
            print("warning: no --tokenizer: the shards are taken for tokens of the shipped one", file=sys.stderr)
        stream, source = open_shards(tokens, sources.max_tokens, flag), tokens
    else:
        if sources.text is None:
            documents = iter(corpus.test_documents())
            source = f"language reference inside Python {platform.python_version()}"
        else:
            documents, source = read_documents(sources.text), sources.text
        ids, text_bytes = tokenizer.encode_documents(documents, sources.max_tokens)
        stream = TokenStream([ids])
    if text_bytes is not None and not text_bytes.raw:
        raise InputError(f"{source}: holds no text")
    if len(stream) < 2:
        raise InputError(f"{source}: {counted(len(stream), 'token')}; scoring needs at least 2")
    stream.check_vocabulary(tokenizer.vocab_size)
    plain = text_bytes is not None and sources.text is not None and not is_jsonl(sources.text)
    return Inputs(artifact, artifact_bytes, tokenizer, stream, source, plain, text_bytes)


def read_model(sources: Sources) -> tuple[Artifact | ForeignModel, int | None, Tokenizer]:
    """Model, its size on disk where it is an artifact, and the tokenizer that goes with it.

    Raises:
        InputError: anything missing, damaged or made for another model.
    """
    if sources.model is not None:
        if sources.artifact is not None:
            raise InputError("--model and --artifact (or ARTIFACT_PATH): give one of them")
        if sources.model_config is not None:
            raise InputError("--model-config: goes with --artifact; a factory makes its model as it likes")
        model, tokenizer = read_foreign(sources.model, sources.tokenizer, sources.seq_len)
        if sources.calibration is not None:
            model = with_calibration(model, tokenizer, sources.calibration)
        return model, None, tokenizer
    if sources.calibration is not None:
        raise InputError("--calibration: goes with --model; an artifact holds its own")
    artifact_path = Path(sources.artifact or shipped.MODEL)
    artifact = load_artifact(artifact_path, parse_overrides(sources.model_config))
    about = {} if is_ours(artifact_path) else artifact.metadata
    if assumed := about.get("assumed"):
        shown = ", ".join(f"{key}={value}" for key, value in assumed.items())
        source = about.get("generation", "pr1019")
        shown += f" (as {source} has it; --model-config overrides)"
        print(f"warning: {artifact_path} does not say, so it is assumed: {shown}", file=sys.stderr)
    if resembles := about.get("resembles"):
        others = " or ".join(resembles)
        print(f"warning: {artifact_path} looks like a file of {others}, not of {source}", file=sys.stderr)
    tokenizer = Tokenizer(sources.tokenizer or shipped.TOKENIZER)
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


def choose_rows(
    presets: Sequence[str], allow_noncausal: bool = False, below: str | None = None
) -> list[Adaptation | Learning]:
    """The rows to run, in order, without `none`, which is always scored.

    Args:
        presets: as they were asked for.
        allow_noncausal: run rows that leak, too.
        below: a row that learns; it is added, and once more under each preset.

    Raises:
        InputError: unknown preset, one given twice, however it is spelt, or one that leaks without --allow-noncausal.
    """
    texts = list(presets) if switch("SLOT_ENABLED", True) else []
    if below is not None:
        texts += [below, *(f"{below}+{text}" for text in texts if parse_row(text).optimizer != "none")]
    rows: list[Adaptation | Learning] = []
    seen: dict[tuple[Adaptation | Learning, frozenset[str]], str] = {}
    for text in texts:
        row = parse_row(text)
        if isinstance(row, Adaptation):
            row = from_environment(row, text)
        elif row.top is not None:
            row = row.model_copy(update={"top": from_environment(row.top, text.rpartition("+")[2])})
        if row.optimizer == "none":
            continue
        key = (row, given_keys(text))  # a calibration may change what a row does not set itself
        if key in seen:
            raise InputError(f"preset {text!r}: given twice" + f", as {seen[key]!r} too" * (seen[key] != text))
        seen[key] = text
        row = row.model_copy(update={"name": text})
        if not row.compliance.causal and not allow_noncausal:
            raise InputError(f"preset {text!r} is not causal: {row.compliance.why}; --allow-noncausal runs it anyway")
        rows.append(row)
    return rows
