"""Fits the few numbers of `causal` to a model, on text like its training text, and chooses the model's forward."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch

from ..artifact import Artifact
from ..command.progress import Progress
from ..data import Text, TokenStream
from ..errors import InputError
from ..eval.forward import Streaming, block_that_fits, streams, windows_that_fit
from ..eval.loop import Scored, SlidingPass
from ..foreign import LanguageModel
from ..model import GPT
from ..overlap import sketch
from ..score import Meter
from ..slot import Adapter, Calibration, parse_preset
from ..slot.repeats import CONTEXTS, DEFAULT_GATES, Followers, Repeats, fit_gates, mix
from ..windows import Plan
from ..words import counted
from ..worker import ALONE, Worker

SCALES = (0.0, 0.4, 0.7, 1.0, 1.3)  # 0: the rates are of no use to this model
DECAYS = (0.94, 0.97, 0.985)  # of 64 tokens
SINKS = (0, 4)  # tried in a stream; four are enough for models that need any
TOLERANCE_BPB = 0.001  # so much worse a stream may be than windows, which cost 8 to 32 times its arithmetic
CLOSED_GATES = [[-30.0, 0.0]] * len(CONTEXTS)


def calibrate(
    model: GPT | LanguageModel,
    text: Text,
    frequency: torch.Tensor | None,
    *,
    seq_len: int | None = None,
    stride: int = 64,
    batch_windows: int = 16,
    forward: Literal["auto", "windows", "stream"] = "auto",
    worker: Worker = ALONE,
    shown: bool = False,
) -> dict[str, Any]:
    """Strength and decay of the rates from a grid, then the gates of repeats by L-BFGS; any of them may end up off.

    Args:
        model: as it will be evaluated, on the worker's device.
        text: documents held out from training; never the text to be scored.
        frequency: float [V], training frequencies, or None.
        seq_len: of the pass; the model's own where None and it says so.
        stride, batch_windows, worker: of the pass.
        forward: windows, or a stream without sinks; auto: what `compare_forwards` finds.
        shown: say on standard error how far it is, pass by pass.

    Returns:
        forward, see `compare_forwards`, or None where they were not compared; scale, decay, gates; the number of
        tokens; and what was gained, in bits per byte: by the rates on these very documents, by repeats on top of them
        in cross-validation over documents, with its standard error.
    """
    rows = [parse_preset("causal-unigram:scale=0")]
    for decay in DECAYS:
        rows += [parse_preset(f"causal-unigram:scale={scale},decay={decay ** (1 / 64)!r}") for scale in SCALES[1:]]
    adapters = [Adapter(row, Calibration(frequency), text.bos_id) for row in rows]
    length = min(seq_len or model.config.seq_len, max(len(text.stream) - 1, 1))
    plan = Plan(len(text.stream) - 1, length, min(stride, length))
    vocab_size = len(text.byte_table.base)
    batch_windows = max(1, min(batch_windows, windows_that_fit(length, vocab_size)))
    options: dict[str, Any] = {"batch_windows": batch_windows, "worker": worker, "shown": shown}
    compared = compare_forwards(model, text, plan, **options) if forward == "auto" else None
    chosen = compared or {"forward": forward, "sinks": 0}
    if chosen["forward"] == "stream":
        options["streaming"] = _streaming(chosen["sinks"], text, worker)
    parts = _scored(model, text, plan, adapters, "windows with rates", **options)
    nll = np.concatenate([part.nll for part in parts], 1)[1:].astype(np.float64)
    tokens = np.concatenate([part.token for part in parts])
    n_bytes = np.concatenate([part.n_bytes for part in parts])
    if not n_bytes.sum():
        raise InputError("the calibration text stands for no bytes")

    # Rates are chosen with repeats at their default gates, or without repeats where these turn out to be useless
    decays = {adapter.row.decay for adapter in adapters}
    repeats = {d: Repeats(d, rows[0].document_decay, text.bos_id).take(torch.from_numpy(tokens)) for d in decays}
    both = [_mixed(each, repeats[a.row.decay], DEFAULT_GATES).sum() for each, a in zip(nll, adapters, strict=True)]
    best = int(np.argmin(both))
    followers = repeats[adapters[best].row.decay]
    gates, gain, error = _fit_gates(nll[best], followers, np.cumsum(tokens == text.bos_id), n_bytes)
    if gates == CLOSED_GATES:
        best = int(nll.sum(1).argmin())
    row = adapters[best].row
    bits = np.log(2) * max(int(n_bytes.sum()), 1)
    return {
        "forward": compared,
        "scale": row.scale,
        "decay": row.decay,
        "gates": gates,
        "tokens": len(tokens),
        "rates_gain_bpb": float(nll[0].sum() - nll[best].sum()) / bits,
        "repeats_gain_bpb": gain,
        "repeats_gain_se": error,
    }


def calibrated(artifact: Artifact, found: dict[str, Any], stream: TokenStream) -> Artifact:
    """The artifact with what `calibrate` found, and a sketch of the stream that it was found on."""
    sketches = {**artifact.metadata.get("sketches", {}), "calibration": sketch(stream)}
    return replace(artifact, metadata={**artifact.metadata, "calibration": found, "sketches": sketches})


def compare_forwards(
    model: GPT | LanguageModel,
    text: Text,
    plan: Plan,
    *,
    batch_windows: int,
    worker: Worker = ALONE,
    shown: bool = False,
) -> dict[str, Any]:
    """Windows, or a stream with no sinks or with four: the better stream, unless it is clearly worse than windows.

    Args:
        model, text, plan, batch_windows, worker: of the passes.
        shown: as in `calibrate`.

    Returns:
        forward, "stream" or "windows"; sinks; difference_bpb, of the better stream less windows, and difference_se, its
        standard error clustered by document; both are None where the model has no stream. A stream is not chosen where
        it is worse by more than `TOLERANCE_BPB` and two standard errors, nor where no standard error is known.
    """
    if not streams(model):
        return {"forward": "windows", "sinks": 0, "difference_bpb": None, "difference_se": None}
    ways = [None, *(_streaming(sinks, text, worker) for sinks in SINKS)]
    options: dict[str, Any] = {"batch_windows": batch_windows, "worker": worker, "shown": shown}
    runs = []
    for way in ways:
        unit = "windows" if way is None else f"windows as a stream with {counted(way.sinks, 'sink')}"
        runs.append(_scored(model, text, plan, [], unit, streaming=way, **options))
    token, n_bytes = (np.concatenate([getattr(part, name) for part in runs[0]]) for name in ("token", "n_bytes"))
    nll = np.stack([np.concatenate([part.nll[0] for part in parts]) for parts in runs])
    _, document = np.unique(np.cumsum(token == text.bos_id), return_inverse=True)
    meter = Meter(["windows", *map(str, SINKS)], int(document[-1]) + 1)
    meter.add(document, n_bytes, nll)
    scores = {sinks: meter.score(row) for row, sinks in enumerate(SINKS, 1)}
    sinks, best = max(scores.items(), key=lambda item: item[1].gain_bpb)
    holds = best.gain_se is not None and -best.gain_bpb <= TOLERANCE_BPB + 2 * best.gain_se
    found = {"difference_bpb": -best.gain_bpb, "difference_se": best.gain_se}
    return {"forward": "stream" if holds else "windows", "sinks": sinks if holds else 0, **found}


def _scored(
    model: GPT | LanguageModel,
    text: Text,
    plan: Plan,
    adapters: Sequence[Adapter],
    unit: str,
    *,
    shown: bool,
    **options: Any,
) -> list[Scored]:
    """All that one pass scores."""
    parts: list[Scored] = []
    with Progress(len(plan), 0, unit, silent=not shown) as progress:
        SlidingPass(model, text, plan, adapters, **options).run(on_scored=parts.append, on_windows=progress)
    return parts


def _streaming(sinks: int, text: Text, worker: Worker) -> Streaming:
    return Streaming(sinks, block_that_fits(len(text.byte_table.base), worker.on_gpu))


def _fit_gates(
    nll: np.ndarray, followers: Followers, document: np.ndarray, n_bytes: np.ndarray
) -> tuple[list[list[float]], float, float | None]:
    """The gates, closed unless two-fold cross-validation over documents gains more than two standard errors."""
    documents, number = np.unique(document, return_inverse=True)
    meter, crossed = Meter(["rates", "repeats"], len(documents)), nll.copy()
    if len(documents) > 1:
        for fold in (0, 1):
            mine = number % 2 == fold
            gates = fit_gates(nll[~mine], followers.of(~mine))
            crossed[mine] = _mixed(nll[mine], followers.of(mine), gates)
    meter.add(number, n_bytes, np.stack([nll, crossed]))
    score = meter.score(1)
    if score.gain_se is None or not score.gain_bpb > 2 * score.gain_se:
        return CLOSED_GATES, score.gain_bpb, score.gain_se
    return fit_gates(nll, followers), score.gain_bpb, score.gain_se


def _mixed(nll: np.ndarray, followers: Followers, gates: Sequence[Sequence[float]]) -> np.ndarray:
    return -mix(torch.from_numpy(np.exp(-nll)), followers, torch.tensor(gates, dtype=torch.float64)).log().numpy()


def summary(found: dict[str, Any]) -> str:
    """What a calibration chose, in a line."""
    forward = found["forward"]
    way = f"forward {forward['forward']}, {counted(forward['sinks'], 'sink')}" if forward else "forwards not compared"
    if forward and forward["difference_bpb"] is not None:
        spread = "" if forward["difference_se"] is None else f" ± {forward['difference_se']:.4f}"
        way += f", a stream less windows {forward['difference_bpb']:+.4f}{spread} bpb"
    rates, repeats, error = found["rates_gain_bpb"], found["repeats_gain_bpb"], found["repeats_gain_se"]
    strength = f"scale {found['scale']:g}, decay {found['decay'] ** 64:.3g} in 64 tokens, {rates:+.4f} bpb here"
    spread = "n/a" if error is None else f"{error:.4f}"
    return (
        f"calibrated on {found['tokens']:,} tokens: rates {strength if found['scale'] else 'off'}; repeats "
        f"{'off' if found['gates'] == CLOSED_GATES else 'on'}, {repeats:+.4f} ± {spread} bpb in cross-validation; "
        f"{way}"
    )
