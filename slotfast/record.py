"""slotfast record: what several runs of one configuration show, and whether it is a record.

A record must beat the one before by at least 0.005 nats a token, shown at p < 0.01 over several seeds. The test is
Welch's, one-sided, on the runs' mean losses, against the hypothesis that the improvement is no more than 0.005; the
test against no improvement at all, which many entries quote, is printed beside it. Runs that differ in anything but
the seed are refused, for then their spread is not that of a seed.
"""

import datetime
import hashlib
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from . import config
from .command.files import write_json
from .command.run import deliver, run_command
from .contest import CAP_BYTES, LARGEST_P, THRESHOLD_NATS
from .errors import Fault, InputError, reading
from .overlap import MAX_OVERLAP
from .record_page import write_page
from .welch import Comparison, Sample, compare
from .words import counted

_ABOUT = (
    f"Mean, spread and Welch's test of several runs of slotfast eval; a record is {THRESHOLD_NATS} nats a "
    f"token better at p < {LARGEST_P}."
)
# Settings that say where a run reads and writes, or that the result states in another place: text, plan, device.
_STATED = set(
    "artifact model tokens text data_path tokenizer preset batch_windows device allow_noncausal budget "
    "json per_token resume plot report force config".split()
)
# What a training measured, in a model's metadata; what calibration sets of a preset unless its name does.
_MEASURED = {"seed", "steps", "seconds", "tokens", "scale", "calibration", "sketches"}
_CALIBRATED = {"scale", "decay", "gates"}


class _Loss(BaseModel):
    nats: float
    bpb: float


class _Preset(BaseModel):
    preset: str
    resolved_preset: dict[str, Any]
    causal: bool
    why: str
    compliance: dict[str, bool]
    adapted: _Loss


class _Text(BaseModel):
    sha256: str
    documents: int
    seen: dict[str, float] = {}


class Result(BaseModel):
    """The part of an evaluation's JSON that is used."""

    model_config = ConfigDict(protected_namespaces=())

    preset: str
    tokens: int = Field(ge=1)
    bytes: int = Field(ge=1)
    windows: int
    presets: list[_Preset]
    text: _Text
    notes: list[str] = []
    seconds: dict[str, float]
    artifact_bytes: int | None
    model: dict[str, Any]
    backend: str
    device: str
    ranks: int
    plan: dict[str, Any]
    config: dict[str, Any]
    versions: dict[str, str]


@dataclass(frozen=True)
class Run:
    """One run's score under one preset.

    Args:
        path: the JSON file.
        row: the preset's row.
    """

    path: Path
    result: Result
    row: _Preset

    @property
    def seed(self) -> int | None:
        return (self.result.model.get("metadata") or {}).get("seed")

    @property
    def leak(self) -> str:
        """Why its score is not honest; empty where it is."""
        trained = (self.result.model.get("metadata") or {}).get("ttt") or {}
        overlap = trained.get("validation_overlap") or 0
        if trained.get("stream_sha256") == self.result.text.sha256 or overlap > MAX_OVERLAP:
            return f"its weights were trained on {trained.get('stream')}, the text that measures them"
        for name, share in self.result.text.seen.items():
            if share > MAX_OVERLAP and (name != "calibration" or self.row.resolved_preset.get("optimizer") == "rates"):
                return f"its {name} text shares about {share:.1%} with the text that measures it"
        return "" if self.row.causal else self.row.why

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.row.adapted.nats / self.result.tokens

    def identity(self) -> dict[str, Any]:
        """Everything that must agree between runs that differ in their seed alone."""
        result, metadata = self.result, self.result.model.get("metadata") or {}
        return {
            "preset": {key: value for key, value in self.row.resolved_preset.items() if key not in _CALIBRATED},
            "text": result.text.sha256,
            "config": {key: value for key, value in result.config.items() if key not in _STATED},
            "model": {key: value for key, value in result.model.items() if key not in ("metadata", "source")},
            "metadata": {key: value for key, value in metadata.items() if key not in _MEASURED},
            "plan": result.plan,
            "where": {"backend": result.backend, "device": result.device, "ranks": result.ranks},
            "versions": result.versions,
        }


def read_runs(paths: Sequence[str], preset: str | None = None, allow_noncausal: bool = False) -> list[Run]:
    """Runs of one configuration, by seed.

    Args:
        paths: JSON results of slotfast eval, or folders that hold one each.
        preset: the row to take; by default the first that adapts.
        allow_noncausal: take rows whose score has seen its own tokens.

    Raises:
        InputError: unreadable or no result; runs that differ in more than the seed, or not at all; a row that leaks.
    """
    runs = [_read(Path(path), preset) for path in paths]
    first = runs[0]
    for each in runs:
        if each.leak and not allow_noncausal:
            raise InputError(f"{each.path}: {each.row.preset!r} is not causal: {each.leak}; see --allow-noncausal")
        difference = _difference(first.identity(), each.identity())
        if difference:
            raise InputError(f"{first.path} and {each.path} differ in more than the seed: {difference}")
    for number, each in enumerate(runs):
        for other in runs[:number]:
            if each.row.adapted.nats == other.row.adapted.nats or (each.seed is not None and each.seed == other.seed):
                raise InputError(f"{other.path} and {each.path} are the same run: seed {each.seed}")
    return sorted(runs, key=lambda each: (each.seed is None, each.seed or 0, str(each.path)))


def _read(path: Path, preset: str | None) -> Run:
    file = path
    if path.is_dir():
        found = config.results(str(path))[1:]
        if len(found) != 1:
            raise InputError(f"{path}: {len(found)} results of slotfast.eval in this folder, expected one")
        file = Path(found[0])
    try:
        result = Result.model_validate_json(_text(file))
    except pydantic.ValidationError as error:
        fault = Fault.of(error)
        raise InputError(f"{file}: not a result of slotfast.eval: {fault.where or 'JSON'}: {fault.expected}") from None
    name = preset or result.preset
    row = next((row for row in result.presets if row.preset == name), None)
    if row is None:
        known = ", ".join(row.preset for row in result.presets)
        raise InputError(f"{file}: no preset {name!r} there, only {known}")
    if not math.isfinite(row.adapted.nats) or not math.isfinite(row.adapted.bpb):
        raise InputError(f"{file}: {name!r} has no finite loss")
    return Run(file, result, row)


def _text(path: Path) -> str:
    try:
        with reading(path):
            return path.read_text("utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8") from None


def _difference(one: Any, other: Any, where: str = "") -> str:
    """The first difference between two JSON values, in words; empty where they agree."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in {**one, **other}:
            found = _difference(one.get(key), other.get(key), f"{where}.{key}".strip("."))
            if found:
                return found
        return ""
    return "" if one == other else f"{where} is {json.dumps(one)} and {json.dumps(other)}"


def main(argv: Sequence[str] | None = None) -> None:
    """Read the runs, print the table, write submission.json; raises InputError on bad input."""
    argv = sys.argv[1:] if argv is None else list(argv)
    settings, sources = config.load(config.RecordSettings, "slotfast record", _ABOUT, argv)
    if settings.show_config:
        return print(config.show(settings, sources))
    if not settings.run:
        raise InputError("RUN ...: expected results of slotfast eval, as JSON files or folders with one")
    config.check_outputs(settings)
    runs = read_runs(settings.run, settings.preset, settings.allow_noncausal)
    code_bytes = _code_bytes(settings.code, runs)
    comparison = (
        compare(Sample.of([each.loss for each in runs]), _baseline(settings, runs)) if settings.baseline else None
    )
    found = submission(settings, runs, code_bytes, comparison)
    shown = table(runs, code_bytes, comparison)
    why = _no_record(runs, comparison) if comparison else ""
    return deliver(
        shown,
        (settings.submission, lambda path: write_json(path, found)),
        (settings.report, lambda path: write_page(path, found, why, settings.model_dump(by_alias=True), argv)),
    )


def _code_bytes(path: str | None, runs: Sequence[Run]) -> int | None:
    """Size of the code; raises InputError where it and the largest model are above the cap."""
    code_bytes = None
    if path is not None:
        with reading(path):
            code_bytes = Path(path).stat().st_size
    for each in runs:
        total = (each.result.artifact_bytes or 0) + (code_bytes or 0)
        if total > CAP_BYTES:
            raise InputError(f"{each.path}: {total:,} bytes of code and model, {total - CAP_BYTES:,} above the cap")
    return code_bytes


def _baseline(settings: config.RecordSettings, runs: Sequence[Run]) -> Sample:
    """Losses to beat: three numbers, or runs on the same tokens."""
    number = r"([-+.\deE]+)"
    if len(settings.baseline) == 1 and (found := re.fullmatch(rf"{number},{number},(\d+)", settings.baseline[0])):
        try:
            sample = Sample(float(found[1]), float(found[2]), int(found[3]))
        except ValueError:
            sample = None
        if sample is None or not math.isfinite(sample.mean) or not 0 <= sample.std < math.inf or sample.n < 2:
            raise InputError(f"--baseline {settings.baseline[0]}: expected MEAN,STD,N with STD >= 0 and N >= 2")
        return sample
    others = read_runs(settings.baseline, None, settings.allow_noncausal)
    if others[0].result.text.sha256 != runs[0].result.text.sha256:
        raise InputError(
            f"{others[0].path} and {runs[0].path} score different tokens: their nats a token cannot be compared"
        )
    return Sample.of([each.loss for each in others])


def configuration_sha256(runs: Sequence[Run]) -> str:
    """Hash of what all runs have in common."""
    return hashlib.sha256(json.dumps(runs[0].identity(), sort_keys=True).encode()).hexdigest()


def submission(
    settings: config.RecordSettings, runs: Sequence[Run], code_bytes: int | None, comparison: Comparison | None
) -> dict[str, Any]:
    """The contents of submission.json: the contest's keys, then the evidence for them."""
    loss, bpb = Sample.of([each.loss for each in runs]), Sample.of([each.row.adapted.bpb for each in runs])
    sizes = [each.result.artifact_bytes for each in runs]
    total = None if code_bytes is None or None in sizes else code_bytes + max(sizes)
    row = runs[0].row
    return {
        "schema": 1,  # of record.schema.json
        "author": settings.author,
        "github_id": settings.github_id,
        "name": settings.name,
        "blurb": settings.blurb,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "val_loss": loss.mean,
        "val_bpb": bpb.mean,
        "bytes_total": total,
        "bytes_code": code_bytes,
        "val_loss_std": loss.std,
        "val_bpb_std": bpb.std,
        "seeds": [each.seed for each in runs],
        "seed_results": [
            {
                "seed": each.seed,
                "val_loss": each.loss,
                "val_bpb": each.row.adapted.bpb,
                "artifact_bytes": each.result.artifact_bytes,
                "eval_seconds": each.result.seconds.get("total"),
            }
            for each in runs
        ],
        "preset": row.preset,
        "resolved_preset": row.resolved_preset,
        "causal": not _leak(runs),
        "why": _leak(runs) or row.why,
        "compliance": row.compliance,
        "config_sha256": configuration_sha256(runs),
        "text_sha256": runs[0].result.text.sha256,
        "notes": list(dict.fromkeys(note for each in runs for note in each.result.notes)),
        "versions": runs[0].result.versions,
        "comparison": comparison and {**asdict(comparison), "record": not _no_record(runs, comparison)},
    }


def _leak(runs: Sequence[Run]) -> str:
    """Why the score of one of them is not honest; empty where all are."""
    return next(filter(None, (each.leak for each in runs)), "")


def _no_record(runs: Sequence[Run], comparison: Comparison) -> str:
    """Why this is no record; empty where it is one."""
    if _leak(runs):
        return "it is not causal"
    if runs[0].result.config.get("max_tokens") is not None:
        return "only the start of the text was scored"
    return "" if comparison.is_record else "the gain, or what is known of it, does not suffice"


def table(runs: Sequence[Run], code_bytes: int | None, comparison: Comparison | None) -> str:
    """A README's section in Markdown."""
    first = runs[0].result
    loss, bpb = Sample.of([each.loss for each in runs]), Sample.of([each.row.adapted.bpb for each in runs])
    lines = ["| seed | nats/token | bpb | model bytes | seconds |", "|---|---|---|---|---|"]
    for each in runs:
        size = "" if each.result.artifact_bytes is None else f"{each.result.artifact_bytes:,}"
        seed = "" if each.seed is None else each.seed
        lines.append(
            f"| {seed} | {each.loss:.8f} | {each.row.adapted.bpb:.8f} | {size} | {each.result.seconds['total']:.1f} |"
        )
    lines.append(f"| mean of {loss.n} | {loss.mean:.8f} | {bpb.mean:.8f} | | |")
    if loss.std is not None:
        lines.append(f"| standard deviation | {loss.std:.8f} | {bpb.std:.8f} | | |")
    row = runs[0].row
    verdict = f"NOT causal: {_leak(runs)}" if _leak(runs) else "causal"
    lines += [
        "",
        f"Preset `{row.preset}`, {verdict}. {counted(first.tokens, 'token')}, {counted(first.bytes, 'byte')}, "
        f"{counted(first.text.documents, 'document')}; text SHA-256 {first.text.sha256[:12]}, configuration SHA-256 "
        f"{configuration_sha256(runs)[:12]}.",
        f"{first.device}, {', '.join(f'{name} {version}' for name, version in first.versions.items())}.",
    ]
    lines += dict.fromkeys(note[0].upper() + note[1:] + "." for each in runs for note in each.result.notes if note)
    if code_bytes is not None:
        largest = max(each.result.artifact_bytes or 0 for each in runs)
        lines.append(f"Code {code_bytes:,} bytes; with the largest model {code_bytes + largest:,} of {CAP_BYTES:,}.")
    if comparison is not None:
        base = comparison.baseline
        lines += [
            "",
            f"Baseline {base.mean:.8f} ± {base.std:.8f} nats/token ({base.n} runs): "
            f"{'better' if comparison.gain_nats >= 0 else 'worse'} by {abs(comparison.gain_nats):.5f}. "
            f"Welch's test, one-sided: by more than {THRESHOLD_NATS}: "
            f"t = {comparison.t:.2f}, df = {comparison.df:.1f}, p = {comparison.p:.2g}; by more than 0: "
            f"p = {comparison.p_any:.2g}.",
            f"Record (at least {THRESHOLD_NATS} nats/token at p < {LARGEST_P}): "
            + (f"NO: {why}." if (why := _no_record(runs, comparison)) else "yes."),
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
