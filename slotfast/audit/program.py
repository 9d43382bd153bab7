"""The command: settings to loops, their audit, a certificate."""

import contextlib
import importlib.metadata
import math
import platform
import shlex
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from .. import __version__, config
from ..command.files import json_text, write_json
from ..command.progress import Progress
from ..command.run import deliver
from ..contest import VALIDATION_BYTES, VALIDATION_DOCUMENTS
from ..data import TokenStream
from ..errors import InputError
from ..words import counted
from .api import RERUNS, audit_rows
from .checks import Test, Verdict
from .engine import Runs
from .first_runs import with_first_runs
from .fresh_process import run_in_process
from .log import Record
from .page import write_page
from .report import LEGEND, Report
from .setup import DRAWN, Subject, read_subject

_OWN_RERUNS, _OWN_SECONDS = 32, 20.0  # a round; of each row


def run(settings: config.AuditSettings, argv: Sequence[str]) -> None:
    """Audit, print the report and write the certificate; raises InputError on bad input, exits with 1 on a leak.

    Args:
        settings: of the command.
        argv: the arguments that gave them, for the certificate.
    """
    if settings.fresh_process and not settings.score:
        raise InputError("--fresh-process: is for --score; our own loop keeps nothing between calls")
    config.check_outputs(settings)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what a loop prints is not our result
            subject = read_subject(settings, np.random.default_rng(settings.seed))
            print(_intent(subject, settings.seed, settings.reruns, settings.budget), file=sys.stderr, flush=True)
            reports = _audit(subject, settings.seed, settings.reruns, settings.budget)
            if settings.fresh_process:
                reports = [_in_fresh_processes(each, subject, settings.score, settings.seed) for each in reports]
            reports = [_completed(report, subject) for report in reports]
    except InputError as error:
        if settings.traceback and error.__cause__:
            traceback.print_exception(error.__cause__)
        raise
    spent = max((report.seconds for report in reports), default=0.0)
    if settings.budget and spent > 1.5 * settings.budget + 0.5:
        runs = max(report.runs for report in reports)
        print(
            f"--budget {settings.budget:g}: the least that is asked, {runs} runs, took {spent:.0f} s", file=sys.stderr
        )
    disagreements = [line for report in reports for line in _disagreement(report, subject)]
    result = _result(subject, reports, disagreements, argv, settings.model_dump(by_alias=True))
    shown = "\n".join(["\n\n".join(map(Report.table, reports)), "", LEGEND, *disagreements, result["summary"]])
    deliver(
        json_text(result, allow_nan=True) if settings.json_ == "-" else shown,
        (settings.certificate, lambda path: write_json(path, result, allow_nan=True)),
        (settings.json_, lambda path: write_json(path, result, allow_nan=True)),
        (settings.report, lambda path: write_page(path, result)),
    )
    if result["verdict"] != "clean":
        sys.exit(1)


def _intent(subject: Subject, seeds: Sequence[int], reruns: int | None, budget: float | None) -> str:
    """What will be done, and how long that may take, in a line."""
    names = counted(len(subject.names), "row") if len(subject.names) > 4 else ", ".join(subject.names)
    if budget:
        spent = f"for about {budget:g} s"
    elif reruns:
        spent = f"some {counted(reruns * len(seeds), 'run')}"
    elif subject.computed:
        limit = _OWN_SECONDS * len(subject.names) * len(seeds)
        spent = f"some {_OWN_RERUNS * len(seeds)} runs, {limit:.0f} s at most, and more where something leaks"
    else:
        spent = f"some {RERUNS * len(seeds)} runs, more of a quick loop"
    tokens = counted(len(subject.stream.tokens), "token")
    return f"auditing {names} on altered copies of {subject.source}, {tokens}: {spent}"


def _audit(subject: Subject, seeds: Sequence[int], reruns: int | None, budget: float | None) -> list[Report]:
    own = bool(subject.computed)
    return audit_rows(
        _counted_runs(subject.run),
        subject.names,
        subject.stream,
        byte_rule=subject.byte_rule,
        hints=subject.hints,
        seeds=seeds,
        reruns=reruns or (_OWN_RERUNS if own else None),
        seconds=budget,
        limit=_OWN_SECONDS * len(subject.names) if own and not reruns else math.inf,
    )


def _in_fresh_processes(report: Report, subject: Subject, score: str, seeds: Sequence[int]) -> Report:
    """The report with runs of the loop in processes of their own, where it has nothing to remember."""
    return with_first_runs(
        report,
        "fresh processes",
        lambda tokens: run_in_process(score, tokens, subject.stream.vocab_size),
        subject.stream,
        np.random.default_rng([*seeds, 1]),
    )


def _completed(report: Report, subject: Subject) -> Report:
    """The report with what is known of the stream's bytes, and what drawn tokens and few of them cannot show."""
    real = [] if subject.source != DRAWN else ["choices that are close on real text only (--tokens, --text)"]
    few = _too_few(report, subject)
    return replace(report, tests=[*report.tests, *_denominator(subject)], unreached=[*report.unreached, *few, *real])


def _too_few(report: Report, subject: Subject) -> list[str]:
    """A line where a preset has numbers that the stream is too short for, and was audited with others."""
    row = subject.computed.get(report.name)
    if row is None:
        return []
    own, audited = row.summary(), subject.audited[report.name].summary()
    changed = [key for key in own if own[key] != audited[key]]
    if not changed:
        return []
    theirs, ours = (", ".join(f"{key}={each[key]}" for key in changed) for each in (own, audited))
    return [f"{theirs}, for which {report.tokens:,} tokens are too few: audited with {ours} (--max-tokens)"]


def _counted_runs(run: Runs) -> Runs:
    """Runs that are counted on standard error."""
    progress = Progress(None, 0, "runs")

    def counted_run(tokens: Tensor, names: Sequence[str]) -> dict[str, Record]:
        records = run(tokens, names)
        progress(1, f"now of {counted(len(names), 'loop')}")
        return records

    return counted_run


def _denominator(subject: Subject) -> list[Test]:
    """The bytes of the whole stream, where something is known about what they must be."""
    if subject.whole is None or subject.byte_rule is None:
        return []
    documents = subject.whole.count(subject.stream.bos_id)
    if subject.text_bytes is None and documents != VALIDATION_DOCUMENTS:
        return []
    verdict: Verdict
    if subject.text_bytes:
        bytes_ = subject.text_bytes
        verdict = "PASS" if bytes_.exact else "UNTESTED"
        detail = f"the rule counts {bytes_.rule:,} for a text of {bytes_.raw:,}"
        return [Test("denominator", verdict, ("bytes",), f"{documents:,} documents", detail)]
    total, last = 0, subject.whole.read(0, 1)
    for chunk in subject.whole.chunks():
        total += int(subject.byte_rule(np.concatenate([last, chunk]))[1:].sum())
        last = chunk[-1:]
    low, high = VALIDATION_BYTES
    verdict = "PASS" if low <= total <= high else "FAIL"
    detail = f"{total:,} bytes; the contest's validation set has {low:,} to {high:,}"
    return [Test("denominator", verdict, ("bytes",), f"{documents:,} documents", detail)]


def _disagreement(report: Report, subject: Subject) -> list[str]:
    """A line where a preset's verdict, as computed from its choices, is not what was measured."""
    row = subject.computed.get(report.name)
    if row is None or row.compliance.causal == report.clean:
        return []
    computed, measured = ("causal", "it leaks") if row.compliance.causal else ("a leak", "nothing leaks")
    return [f"ERROR: preset {report.name!r}: its choices say {computed} ({row.compliance.why}); measured, {measured}"]


def _result(
    subject: Subject,
    reports: list[Report],
    disagreements: list[str],
    argv: Sequence[str],
    config: dict[str, Any],
) -> dict[str, Any]:
    """The audit as JSON, which is also its certificate: what was covered, of what, and how to do it again."""
    leaking = [report.name for report in reports if not report.clean]
    untested = sorted({name for r in reports for name, verdict in r.conditions.items() if verdict == "UNTESTED"})
    summary = f"LEAK in {', '.join(leaking)}" if leaking else "no leak found"
    summary += f"; UNTESTED: {', '.join(untested)}" if untested else ""
    return {
        "schema": 1,  # of result.schema.json
        "verdict": "leak" if leaking else "disagreement" if disagreements else "clean",
        "summary": summary,
        "disagreements": disagreements,
        "loops": [
            report.as_dict() | ({"computed_causal": row.compliance.causal, "row": row.summary()} if row else {})
            for report in reports
            for row in [subject.computed.get(report.name)]
        ],
        "stream": {
            "source": subject.source,
            "tokens": len(subject.stream.tokens),
            "sha256": TokenStream([subject.stream.tokens.numpy()]).sha256(),
        },
        "sha256": subject.files,
        "hints": {name: getattr(subject.hints, name) for name in ("seq_len", "stride", "batch_windows", "ranks")},
        "command": shlex.join(["python", "-m", "slotfast.audit", *argv]),
        "config": config,
        "versions": {"slotfast": __version__, "python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("torch", "numpy")},
    }
