"""The result of an evaluation: JSON with stable keys, a table for people, and every token's loss."""

import importlib.metadata
import platform
import resource
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from .. import __version__
from ..command.files import atomic_write
from ..contest import GPUS, LEGEND, VALIDATION_TOKENS, VALIDATION_WINDOWS, projected_seconds
from ..errors import InputError
from ..learn import LEARNING, Learning, parse_row
from ..overlap import seen
from ..score import Score
from ..slot import PRESETS, Adaptation, from_environment
from ..words import counted
from ..worker import Worker
from .inputs import Inputs
from .learning import LearningPass
from .loop import Scored, SlidingPass
from .notes import notes
from .setup import Setup

_COLUMNS = ("position", "token", "n_bytes", "nll")


@dataclass(frozen=True)
class Outcome:
    """What came of an evaluation; on rank 0, of all ranks.

    Args:
        sliding: the pass, its sums those of all rows: `none`, one of each adapter, one of each learner.
        learners: the passes of rows that learn.
        collected: every token's losses, where they are asked for.
        work: what the fits of each adapter took.
        seconds: by phase; `total` since the start of the command.
        peak_memory_bytes: most memory of a rank.
    """

    sliding: SlidingPass
    learners: Sequence[LearningPass]
    collected: "TokenRows"
    work: Sequence[dict[str, Counter]]
    seconds: dict[str, float]
    peak_memory_bytes: int


def report(inputs: Inputs, setup: Setup, outcome: Outcome, config: Mapping[str, Any]) -> dict[str, Any]:
    """The result as JSON-able keys; `adapted` is the first preset other than `none`.

    Args:
        config: all settings of the command.

    Raises:
        InputError: the scored tokens stand for no bytes.
    """
    sliding, plan, worker = outcome.sliding, setup.plan, setup.worker
    meter, compiled = sliding.meter, sliding.compiled
    if not meter.bytes.any():
        raise InputError(f"{inputs.source}: its tokens stand for no bytes, so bits per byte is undefined")
    base, scores = meter.score(0), [meter.score(row + 1) for row in range(len(sliding.adapters))]
    ran = {"forward": setup.forward, "sinks": setup.sinks}
    presets = [_preset(PRESETS["none"], base) | ran]
    for adapter, score, counters, spent in zip(
        sliding.adapters, scores, outcome.work, sliding.row_seconds[1:], strict=True
    ):
        histograms = {name: dict(sorted(counter.items())) for name, counter in counters.items()}
        own = ran | {"seconds": round(spent, 3)}
        presets.append(_preset(adapter.row, score) | own | ({"work": histograms} if histograms else {}))
    for learner in outcome.learners:
        for number, row in enumerate(learner.rows, 1):
            presets.append(_preset(row, meter.score(len(presets))) | _learned(learner, number, worker))
    first = presets[min(1, len(presets) - 1)]
    passed = sum(sliding.seconds.values())
    speed = len(plan) / passed if passed else None
    projected = None
    if speed and worker.on_gpu:
        projected = projected_seconds(VALIDATION_WINDOWS, len(plan), passed, worker.world)
    metadata = inputs.artifact.metadata
    text = {"source": inputs.source, "sha256": inputs.stream.sha256(), "documents": len(meter.tokens)}
    text["seen"] = seen(inputs.stream, metadata)
    text["plain"] = inputs.plain
    if inputs.text_bytes:
        text |= asdict(inputs.text_bytes) | {"exact": inputs.text_bytes.exact}
    return {
        "schema": 1,  # of result.schema.json
        "preset": first["preset"],
        "resolved_preset": first["resolved_preset"],
        "causal": first["causal"],
        "compliance": first["compliance"],
        "tokens": int(meter.tokens.sum()),
        "bytes": int(meter.bytes.sum()),
        "windows": len(plan),
        "forward": setup.forward,
        "sinks": setup.sinks,
        "base": {"nats": base.nats, "bpb": base.bpb},
        "adapted": first["adapted"],
        "presets": presets,
        "stored_forward": inputs.stored_forward,
        "calibrated": metadata.get("calibration") is not None,
        "frequencies": inputs.artifact.unigram is not None,
        "text": text,
        "notes": notes(inputs, setup, text["seen"], int(meter.bytes.sum()))
        + ([f"not compiled as asked: {compiled.why}"] if compiled.why else []),
        "seconds": {key: round(value, 3) for key, value in outcome.seconds.items()},
        "windows_per_second": speed,
        "projected_seconds_8gpu": projected,
        "peak_memory_bytes": outcome.peak_memory_bytes,
        "artifact_bytes": inputs.artifact_bytes,
        "model": inputs.artifact.config.model_dump()
        | {"metadata": None if inputs.artifact_bytes is None else _without_sketches(metadata)},
        "backend": setup.backend,
        "device": worker.device_name,
        "ranks": worker.world,
        "plan": {"seq_len": plan.seq_len, "stride": plan.stride, "batch_windows": setup.batch_windows}
        | {"adapt_windows": setup.adapt_windows}
        | {"block_tokens": setup.block_tokens, "dtype": worker.dtype_name, "weights": setup.weights}
        | {"compile": compiled.mode},
        "config": dict(config),
        "versions": {"slotfast": __version__, "python": platform.python_version(), "torch": torch.__version__}
        | {name: importlib.metadata.version(name) for name in ("numpy", "sentencepiece")}
        | {name: importlib.metadata.version(name) for name in ("transformers", "tokenizers") if name in sys.modules},
    }


def _without_sketches(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata without the sketches, which tell people nothing; what they say about the text is in `text.seen`."""
    return {name: value for name, value in metadata.items() if name != "sketches"}


def merge_work(ranks: Sequence[dict[str, Counter]]) -> dict[str, Counter]:
    """What one adapter's fits took, over all ranks."""
    names = dict.fromkeys(name for counters in ranks for name in counters)
    return {name: sum((counters.get(name, Counter()) for counters in ranks), Counter()) for name in names}


def _learned(learner: LearningPass, number: int, worker: Worker) -> dict[str, Any]:
    """What is also said of a row that learns: its gain over the same forward unlearned, and what it costs."""
    seconds, unlearned, score = learner.seconds, learner.meter.score(0), learner.meter.score(number)
    on_top = {} if learner.rows[number - 1].top is None else {"on_top_seconds": round(seconds["on top"], 3)}
    spent = seconds["learned"] + (seconds["on top"] if on_top else 0.0)
    projected = projected_seconds(VALIDATION_TOKENS, learner.charged, spent, worker.world) if worker.on_gpu else None
    return {
        "forward": learner.loop.row.forward,
        "sinks": learner.loop.sinks if learner.loop.row.forward == "stream" else None,
        "unlearned": {"bpb": unlearned.bpb, "gain_bpb": score.gain_bpb, "gain_se": score.gain_se},
        "cost": {
            "forwards": round(learner.forwards, 3),
            "seconds": round(seconds["learned"], 3),
            "unlearned_seconds": round(seconds["unlearned"], 3),
            **on_top,
            "projected_seconds_8gpu": projected,
        },
    }


def _preset(row: Adaptation | Learning, score: Score) -> dict[str, Any]:
    compliance = asdict(row.compliance)
    return {
        "preset": row.name,
        "resolved_preset": row.summary(),
        "causal": row.compliance.causal,
        "why": compliance.pop("why"),
        "compliance": compliance,
        "adapted": {"nats": score.nats, "bpb": score.bpb, "gain_bpb": score.gain_bpb, "gain_se": score.gain_se},
    }


def peak_memory_bytes(worker: Worker) -> int:
    """The most memory that this process has held: on the GPU, or resident where there is none."""
    if worker.on_gpu:
        return torch.cuda.max_memory_allocated(worker.device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def table(found: dict[str, Any]) -> str:
    """The result for people."""
    text, speed = found["text"], found["windows_per_second"] or 0.0
    size = "" if found["artifact_bytes"] is None else f"{counted(found['artifact_bytes'], 'byte')}; "
    width = max(22, *(len(row["preset"]) for row in found["presets"])) + 2
    costs = any("cost" in row for row in found["presets"])
    cost_heads = f"{'forwards':>10}{'seconds':>9}" if costs else ""
    lines = [
        f"text    {text['source']}{', plain text' * text['plain']}: {counted(text['documents'], 'document')}, "
        f"{counted(found['bytes'], 'byte')}, {counted(found['tokens'], 'token')}, SHA-256 {text['sha256'][:12]}",
        f"model   {size}{counted(found['windows'], 'window')}, {speed:.1f} a second, on {found['device']}",
        f"forward {_forward_line(found)}",
        "",
        f"{'preset':<{width}}{'bpb':>9}{'gain':>10}{'± s.e.':>9}{cost_heads}   causal",
    ]
    if text.get("exact") is False:
        lines.insert(
            1,
            f"bytes   by the rule {text['rule']:,}, normalised {text['normalized']:,}, raw {text['raw']:,}; "
            f"{counted(text['unknown'], 'unknown piece')}: {_inexact(text)}, and bpb counts the rule's bytes",
        )
    for row in found["presets"]:
        adapted = row["adapted"]
        gain, error = "", ""
        if row["resolved_preset"]["optimizer"] != "none":
            gain = f"{adapted['gain_bpb']:+.4f}"
            error = "n/a" if adapted["gain_se"] is None else f"{adapted['gain_se']:.4f}"
        verdict = "yes" if row["causal"] else f"NO: {row['why'].partition(',')[0]}"
        cost = "{:>10.1f}{:>9.1f}".format(*spent(found, row)) if costs else ""
        lines.append(f"{row['preset']:<{width}}{adapted['bpb']:>9.4f}{gain:>10}{error:>9}{cost}   {verdict}")
    if len(found["presets"]) > 1:
        lines.append("gain: bits per byte less than none, the model unadapted, token by token; s.e. by document")
    if costs:
        lines.append("forwards: passes through the model for each token; seconds: of an evaluation with that row alone")
    lines += [_cost_line(row) for row in found["presets"] if "cost" in row]
    rows = [row["resolved_preset"].get("top", row["resolved_preset"]) for row in found["presets"]]
    rates = [row for row in rows if row["optimizer"] == "rates"]
    if not found["calibrated"] and rates:
        scales = ", ".join(f"{scale:g}" for scale in dict.fromkeys(row["scale"] for row in rates))
        k = "from its token frequencies" if found["frequencies"] else "= 2"
        lines.append(f"uncalibrated: nothing was fitted to this model; scale {scales}, k {k}, unless set")
    lines += found["notes"]
    if "budget" in found:
        budget = found["budget"]
        verdict = "within" if budget["within"] else "OVER"
        lines.append(f"budget  {budget['measured']:.1f} s of {budget['seconds']:g} s: {verdict}")
    return "\n".join(lines)


def spent(found: Mapping[str, Any], row: Mapping[str, Any]) -> tuple[float, float]:
    """Passes through the model for each token, and seconds, of an evaluation with one row alone; where rows share work,
    the first one pays for it."""
    if "cost" in row:
        return row["cost"]["forwards"], row["cost"]["seconds"] + row["cost"].get("on_top_seconds", 0.0)
    seconds = sum(found["seconds"].get(phase, 0.0) for phase in ("forward", "score")) + row.get("seconds", 0.0)
    if found["forward"] == "stream":
        return 1.0, seconds
    return found["windows"] * found["plan"]["seq_len"] / max(1, found["tokens"]), seconds


def _cost_line(row: Mapping[str, Any]) -> str:
    own, cost = row["unlearned"], row["cost"]
    error = "" if own["gain_se"] is None else f" ± {own['gain_se']:.4f}"
    eight = cost["projected_seconds_8gpu"]
    return (
        f"{row['preset']}: {own['gain_bpb']:+.4f}{error} over its own forward unlearned, {own['bpb']:.4f}; "
        f"{cost['forwards']:.1f} forwards a token, {cost['seconds'] + cost.get('on_top_seconds', 0):.1f} s instead of "
        f"{cost['unlearned_seconds']:.1f}"
        + ("" if eight is None else f"; the contest's text in {eight:,.0f} s on {GPUS} such GPUs")
    )


def _inexact(text: Mapping[str, Any]) -> str:
    """Why the rule's bytes are not those of the text."""
    if text["altered"] or text["unknown"]:
        return "the tokenizer changes the text"
    return "the rule misjudges the tokenizer's pieces"


def _forward_line(found: dict[str, Any]) -> str:
    compiled = {"off": "", "on": "; compiled", "graphs": "; compiled, as CUDA graphs"}[found["plan"]["compile"]]
    compiled += f" in {found['seconds']['compile']:.1f} s" if "compile" in found["seconds"] else ""
    if found["forward"] == "windows":
        return f"windows, each recomputed{compiled}"
    sinks, stored = found["sinks"], found["stored_forward"]
    line = f"stream: every token once, {counted(sinks, 'sink') if sinks else 'no sinks'}{compiled}"
    if not stored or stored["forward"] != "stream" or stored["sinks"] != sinks:
        return line
    difference = f"{stored['difference_bpb']:+.4f} ± {stored['difference_se']:.4f}"
    return f"{line}; {difference} bpb against windows when calibrated"


def list_presets() -> str:
    """All presets as a table."""
    heads = ("preset", "parameter", "positions", "scope", "optimizer", "causal", "")
    rows = [
        (r.name, r.parameter, r.positions, r.scope, r.optimizer, "yes" if r.compliance.causal else "NO", r.about)
        for r in PRESETS.values()
    ]
    rows += [
        (r.name, r.what, "charged", r.scope, r.optimizer, "yes" if r.compliance.causal else "NO", r.about)
        for r in LEARNING.values()
    ]
    widths = [max(len(row[column]) for row in (heads, *rows)) for column in range(len(heads))]
    lines = ("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in (heads, *rows))
    return "\n".join(line.rstrip() for line in lines)


def show_preset(text: str) -> str:
    """One row, key by key, and its verdict with the reason."""
    row = parse_row(text)
    if isinstance(row, Adaptation):
        row = from_environment(row, text)
    conditions = asdict(row.compliance)
    why = conditions.pop("why")
    top = row.summary().get("top", {})
    lines = [f"{key:<16}{_written(key, value)}" for key, value in row.summary().items() if key != "top"]
    lines += [f"+ {key:<16}{_written(key, value)}" for key, value in top.items()]
    verdict = "causal" if row.compliance.causal else "NOT causal"
    failed = ", ".join(name.upper() for name, holds in conditions.items() if not holds)
    return "\n".join([*lines, f"{verdict}{' (fails ' + failed + ')' if failed else ''}: {why}", LEGEND])


def _written(key: str, value: Any) -> Any:
    """A value as NAME:key=value takes it."""
    if value is None:
        return "none"
    if not isinstance(value, tuple):
        return value
    if value and isinstance(value[0], tuple):
        outer, inner = ("+", "x") if key == "phases" else ("/", "+")
        return outer.join(inner.join(f"{number:g}" for number in part) for part in value) or "none"
    return "/".join(value) if value and isinstance(value[0], str) else "+".join(f"{n:g}" for n in value) or "none"


class TokenRows:
    """Collects every scored token for --per-token."""

    def __init__(self) -> None:
        self.parts: list[Scored] = []

    def add(self, scored: Scored) -> None:
        """Take newly scored tokens in."""
        self.parts.append(scored)

    def append(self, nll: np.ndarray) -> None:
        """Add a row that another pass over the same tokens scored; float [n]."""
        whole = self._whole()
        self.parts = [Scored(**whole | {"nll": np.concatenate([whole["nll"], nll[None]])})]

    def _whole(self) -> dict[str, np.ndarray]:
        return {name: np.concatenate([getattr(part, name) for part in self.parts], -1) for name in _COLUMNS}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All rows so far; empty where there are none."""
        if not self.parts:
            return {}
        whole = self._whole()
        self.parts = [Scored(**whole)]
        return {name: torch.from_numpy(column) for name, column in whole.items()}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Continue from what `state_dict` returned."""
        self.parts = [Scored(**{name: state[name].numpy() for name in _COLUMNS})] if state else []

    def write(self, path: str, names: Sequence[str]) -> None:
        """Write the .npz; under torchrun rank 0 writes for all."""
        nll = [np.concatenate([part.nll[row] for part in self.parts]).astype(np.float32) for row in range(len(names))]
        columns = {
            "position": np.concatenate([part.position for part in self.parts]),
            "token": np.concatenate([part.token for part in self.parts]).astype(np.int32),
            "bytes": np.concatenate([part.n_bytes for part in self.parts]).astype(np.int32),
            "base_nll": nll[0],
            "adapted_nll": nll[min(1, len(nll) - 1)],
            **{f"adapted_nll:{name}": values for name, values in zip(names[2:], nll[2:], strict=True)},
        }
        with atomic_write(path) as file:
            np.savez(file, **columns)
