"""python -m slotfast.calibrate: fit the few numbers of `causal` to a model, on text like its training text."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from . import config
from .artifact import read_artifact, write_artifact
from .command import run
from .data import ByteTable, Tokenizer, TokenStream, check_writable, read_documents
from .errors import InputError
from .eval.loop import Scored, sliding_pass
from .model import GPT
from .slot import Adapter, Calibration, parse_preset
from .slot.repeats import DEFAULT_GATES, Repeats, fit_gates, mix
from .windows import Plan

SCALES = (0.0, 0.4, 0.7, 1.0, 1.3)  # 0: the rates are of no use to this model
DECAYS = (0.94, 0.97, 0.985)  # of 64 tokens
_CLOSED = [[-30.0, 0.0]] * len(DEFAULT_GATES)


def calibrate(
    model: GPT,
    stream: TokenStream,
    byte_table: ByteTable,
    bos_id: int,
    frequency: torch.Tensor | None,
    *,
    stride: int = 64,
    batch_windows: int = 16,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Strength and decay of the rates from a grid, then the gates of repeats by L-BFGS; any of them may end as off.

    Args:
        model: as it will be evaluated, on `device`.
        stream: documents held out from training; never the text to be scored.
        byte_table, bos_id: of the tokenizer.
        frequency: float [V], training frequencies, or None.
        stride, batch_windows, dtype, device: of the pass.

    Returns:
        scale, decay, gates; and what they gained on these documents, in bits per byte: rates, gain.
    """
    rows = [parse_preset("causal-unigram:scale=0")]
    for decay in DECAYS:
        rows += [parse_preset(f"causal-unigram:scale={scale},decay={decay ** (1 / 64)!r}") for scale in SCALES[1:]]
    adapters = [Adapter(row, Calibration(frequency), bos_id) for row in rows]
    parts: list[Scored] = []
    plan = Plan(len(stream) - 1, min(model.config.seq_len, max(len(stream) - 1, stride)), stride)
    options = {"batch_windows": batch_windows, "dtype": dtype, "device": device, "on_scored": parts.append}
    sliding_pass(model, stream, plan, adapters, byte_table, bos_id, **options)
    nll = np.concatenate([part.nll for part in parts], 1)[1:].astype(np.float64)
    n_bytes = sum(int(part.n_bytes.sum()) for part in parts)
    best = int(nll.sum(1).argmin())
    row = adapters[best].row

    followers = Repeats(row.decay, row.document_decay, bos_id).take(
        np.concatenate([part.token for part in parts]).tolist()
    )
    gates = fit_gates(nll[best], followers)
    mixed = -mix(torch.from_numpy(np.exp(-nll[best])), followers, torch.tensor(gates, dtype=torch.float64)).log()
    mixed_nats = float(mixed.sum())
    if mixed_nats >= nll[best].sum():
        gates, mixed_nats = _CLOSED, float(nll[best].sum())
    bits = np.log(2) * max(n_bytes, 1)
    return {
        "scale": row.scale,
        "decay": row.decay,
        "gates": gates,
        "rates": float(nll[0].sum() - nll[best].sum()) / bits,
        "gain": float(nll[0].sum() - mixed_nats) / bits,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Calibrate a stored model; raises InputError on bad input."""
    settings, sources = config.load(config.CalibrateSettings, "python -m slotfast.calibrate", __doc__, argv)
    config.warn_unread_variables()
    if settings.show_config:
        return print(config.show(settings, sources))
    for name in ("artifact", "tokenizer", "text", "out"):
        if getattr(settings, name) is None:
            raise InputError(f"--{name}: needed")
    check_writable(settings.out)
    artifact, tokenizer = read_artifact(settings.artifact), Tokenizer(settings.tokenizer)
    if tokenizer.vocab_size != artifact.config.vocab_size:
        raise InputError(f"{tokenizer.path}: {tokenizer.vocab_size} pieces, the model has {artifact.config.vocab_size}")
    ids, _ = tokenizer.encode_documents(read_documents(settings.text), settings.max_tokens)
    if len(ids) < 2:
        raise InputError(f"{settings.text}: {len(ids)} tokens; calibration needs at least 2")
    found = calibrate(artifact.model(), TokenStream([ids]), tokenizer.byte_table, tokenizer.bos_id, artifact.unigram)
    artifact.metadata["calibration"] = found
    size = write_artifact(settings.out, artifact)
    print(summary(found, len(ids)))
    print(f"{settings.out}: {size:,} bytes")


def summary(found: dict[str, Any], tokens: int) -> str:
    """What a calibration chose, in a line."""
    strength = (
        "off" if not found["scale"] else f"scale {found['scale']:g}, decay {found['decay'] ** 64:.3g} of 64 tokens"
    )
    repeats = "off" if found["gain"] <= found["rates"] else f"{found['gain'] - found['rates']:+.4f} bpb"
    return f"calibrated on {tokens:,} tokens: rates {strength} ({found['rates']:+.4f} bpb here); repeats {repeats}"


if __name__ == "__main__":
    run(main)
