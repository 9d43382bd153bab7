"""The command: a model and text like its training text to the few numbers of `causal`."""

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import config
from ..artifact import Artifact, read_artifact, write_artifact
from ..command.ranks import join_ranks
from ..command.run import no_exit
from ..data import Text, Tokenizer, TokenStream, read_documents
from ..errors import InputError
from ..eval.forward import streams
from ..eval.inputs import check_tokenizer
from ..foreign import ForeignModel, StoredCalibration, read_foreign
from ..foreign.calibration import Counts, Found
from ..overlap import MAX_OVERLAP, seen, sketch
from ..slot import Calibration
from ..words import counted
from .fit import calibrate, calibrated, summary
from .learning import calibrate_learning, learning_summary

_FEWEST_TOKENS = 1000
_HELD_OUT = 4  # one document of so many is not counted, but calibrated on


def run(settings: config.CalibrateSettings) -> None:
    """Calibrate a model and write what was found; raises InputError on bad input."""
    config.check_outputs(settings)
    if settings.artifact is not None and settings.model is not None:
        raise InputError("--artifact (or ARTIFACT_PATH) and --model: give one of them")
    if settings.artifact is None and settings.model is None:
        raise InputError("--artifact (with --tokenizer) or --model: one of them is needed")
    needed = ("text", "out") if settings.model is not None else ("tokenizer", "text", "out")
    for name in needed:
        if getattr(settings, name) is None:
            raise InputError(f"--{name}: needed")
    if settings.model is None:
        _calibrate_artifact(settings)
    else:
        with no_exit(f"--model {settings.model}"):
            _calibrate_foreign(settings, settings.model)


def _calibrate_artifact(settings: config.CalibrateSettings) -> None:
    artifact, tokenizer = read_artifact(settings.artifact), Tokenizer(settings.tokenizer)
    check_tokenizer(tokenizer, artifact)
    ids, _ = tokenizer.encode_documents(read_documents(settings.text), settings.max_tokens)
    stream = TokenStream([ids])
    text = Text(stream, tokenizer.byte_table, tokenizer.bos_id)
    _check_enough(f"{settings.text}", text)
    if (share := seen(stream, artifact.metadata).get("training", 0.0)) > MAX_OVERLAP:
        print(
            f"warning: the text shares about {share:.1%} with the one that the model was trained on",
            file=sys.stderr,
        )
    found = _fit(settings, artifact, text, artifact.unigram)
    size = write_artifact(settings.out, calibrated(artifact, found, stream))
    print(f"{settings.out}: {size:,} bytes")


def _calibrate_foreign(settings: config.CalibrateSettings, name: str) -> None:
    model, tokenizer = read_foreign(name, settings.tokenizer, settings.seq_len)
    counted_ids, calibrated_on = _split(tokenizer, read_documents(settings.text), settings.max_tokens)
    text = Text(TokenStream([calibrated_on]), tokenizer.byte_table, tokenizer.bos_id)
    _check_enough(f"{settings.text}: held out, one document of {_HELD_OUT}", text)
    counts = np.bincount(counted_ids, minlength=model.config.vocab_size)
    token = counts.nonzero()[0]
    found = _fit(settings, model, text, torch.from_numpy(counts / counts.sum()))
    stored = StoredCalibration(
        schema=1,
        architecture=model.config.architecture,
        parameters=model.config.parameters,
        vocab_size=model.config.vocab_size,
        tokenizer_sha256=tokenizer.sha256,
        calibration=Found.model_validate(found),
        frequency=Counts(token=token.tolist(), count=counts[token].tolist()),
        sketch=sketch(TokenStream([counted_ids, calibrated_on])),
    )
    print(f"{settings.out}: {stored.write(settings.out):,} bytes, for --calibration")


def _split(tokenizer: Tokenizer, documents: Iterator[str], max_tokens: int | None) -> tuple[np.ndarray, np.ndarray]:
    """The tokens to count, and those of every fourth document, which is held out from the count.

    Where the documents held out have more than `max_tokens`, some that lie far apart are kept, so that every part of
    the text is represented, however it is sorted; the last one is cut.
    """
    parts: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for number, document in enumerate(documents, 1):
        try:
            parts[number % _HELD_OUT == 0].append(np.asarray(tokenizer.encode(document), np.int32))
        except InputError as error:
            raise InputError(f"document {number}: {error}") from None
    chosen: dict[int, np.ndarray] = {}
    room = sum(map(len, parts[1])) if max_tokens is None else max_tokens
    for number in sorted(range(len(parts[1])), key=lambda number: f"{number:032b}"[::-1]):
        chosen[number] = parts[1][number][:room]
        room -= len(chosen[number])
        if not room:
            break
    nothing = np.empty(0, np.int32)
    return np.concatenate([nothing, *parts[0]]), np.concatenate([nothing, *(chosen[n] for n in sorted(chosen))])


def _check_enough(where: str, text: Text) -> None:
    if text.documents < 2 or len(text.stream) < _FEWEST_TOKENS:
        raise InputError(
            f"{where}: {counted(text.documents, 'document')}, {counted(len(text.stream), 'token')}; calibration needs "
            f"2 and {_FEWEST_TOKENS:,}"
        )


def _fit(
    settings: config.CalibrateSettings, stored: Artifact | ForeignModel, text: Text, frequency: Tensor | None
) -> dict[str, Any]:
    """What was found, said in a line too."""
    with join_ranks(settings.device) as worker:
        if worker.world > 1:
            raise InputError(f"calibration runs on one process; WORLD_SIZE says {worker.world}")
        model: nn.Module = stored.model().to(worker.device)
        length, stride, forward = settings.seq_len or stored.config.seq_len, settings.stride or 64, settings.forward
        longest = stored.module.stream_window if isinstance(stored, ForeignModel) else None
        if longest and longest < length and forward == "stream" and settings.seq_len is None:
            length = longest
        elif longest and longest < length and forward == "auto":
            forward = "windows"  # no stream has windows so long
        how: dict[str, Any] = {"seq_len": length, "stride": min(stride, length), "forward": forward}
        said = f"calibrating on {counted(len(text.stream), 'token')} of {settings.text}, on {worker.device_name}: "
        compared = "windows and streams, then " * (forward == "auto" and streams(model))
        print(f"{said}{compared}rates and repeats", file=sys.stderr, flush=True)
        found = calibrate(model, text, frequency, **how, worker=worker, shown=True)
        if settings.learn_trials:
            sinks = (found["forward"] or {"sinks": 0})["sinks"]
            where: dict[str, Any] = {"window": min(length, len(text.stream) - 1), "sinks": sinks, "worker": worker}
            where |= {"row": settings.learn_row, "calibration": Calibration.stored(frequency, {"calibration": found})}
            found["learn"] = calibrate_learning(model, text, trials=settings.learn_trials, **where, shown=True)
    if length != stored.config.seq_len:
        found["forward"] = None  # what was found at another length says nothing of the model's own
    print(summary(found), flush=True)
    if settings.learn_trials:
        print(learning_summary(found["learn"]), flush=True)
    return found
