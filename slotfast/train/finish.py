"""What becomes of trained weights: rounded, pruned to a size, and their adaptation calibrated."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..artifact import Artifact, artifact_bytes
from ..calibrate import calibrate, calibrated, summary
from ..data import Text, TokenStream
from ..generate import sample
from ..loader import open_loader
from ..model import GPT
from ..quantize import TensorReport, quantize_model
from ..worker import Worker
from .inputs import Inputs

_CALIBRATION_BYTES = 8192  # more than a calibration's numbers and its sketch take in the header
_CALIBRATION_TOKENS = 100_000


@dataclass(frozen=True)
class Quantization:
    """How weights are rounded.

    Args:
        quantize: "rows", each row for itself, or "gptq".
        quantize_clip: how a row's range is chosen, "percentile" or "sdclip".
        quantize_on, quantize_windows: GPTQ's calibration: text that the model writes ("self") or training "data".
        target_bytes: prune until the artifact is this small; None: it is not pruned.
        reserve: seconds that it may take; 0: as many as it needs.
        seed: of what is sampled.
        calibrate: fit the adaptation to the documents that are held out, if there are any.
    """

    quantize: str
    quantize_clip: str
    quantize_on: str
    quantize_windows: int
    target_bytes: int | None
    reserve: float
    seed: int
    calibrate: bool


def quantize(
    how: Quantization, inputs: Inputs, model: GPT, metadata: dict[str, Any], unigram: Tensor
) -> tuple[Artifact, list[TensorReport]]:
    """The artifact, and what became of each tensor."""
    windows = None
    if how.quantize == "gptq" and how.quantize_on == "self":
        windows = sample(model, how.quantize_windows, model.config.seq_len, seed=how.seed)
    elif how.quantize == "gptq":
        loader = open_loader("shuffle", inputs.names, inputs.shards, model.config.seq_len, 1, how.seed, 1)
        device = model.tok_emb.weight.device
        windows = (loader.next_batch()[:, :-1].to(device) for _ in range(how.quantize_windows))

    will_calibrate = how.calibrate and inputs.held_out is not None
    target = how.target_bytes and how.target_bytes - _CALIBRATION_BYTES * will_calibrate

    def size(tensors: Mapping[str, Any]) -> int:
        return artifact_bytes(Artifact(model.config, tensors, metadata, unigram))

    found = quantize_model(
        model,
        windows,
        method=how.quantize,
        clip=how.quantize_clip,
        target_bytes=target,
        size=size if target else None,
        budget_seconds=how.reserve or None,
    )
    return Artifact(model.config, found.tensors, metadata, unigram), found.report


def calibrate_artifact(inputs: Inputs, artifact: Artifact, worker: Worker, log: Callable[[str], None]) -> Artifact:
    """The artifact with its adaptation calibrated on the documents held out."""
    tokenizer = inputs.tokenizer
    stream = TokenStream([inputs.held_out.read(0, min(len(inputs.held_out), _CALIBRATION_TOKENS))])
    text = Text(stream, tokenizer.byte_table, tokenizer.bos_id)
    # by rank 0 alone, in float32
    found = calibrate(artifact.model().to(worker.device), text, artifact.unigram, worker=Worker(worker.device))
    log(summary(found))
    return calibrated(artifact, found, stream)
