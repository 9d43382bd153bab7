"""Our own evaluation under the auditor: every preset is measured as its choices say."""

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from slotfast.artifact import Artifact, write_artifact
from slotfast.audit import Hints, audit_rows
from slotfast.audit.budget import Budget
from slotfast.audit.engine import Auditor
from slotfast.audit.own import OwnLoop
from slotfast.audit.report import judge
from slotfast.audit.setup import read_subject
from slotfast.audit.streams import Stream, synthetic
from slotfast.config import AuditSettings
from slotfast.data import ByteTable, Tokenizer
from slotfast.learn import DocumentLoop
from slotfast.model import GPT, GPTConfig
from slotfast.shipped import TOKENIZER
from slotfast.slot import PRESETS, Adaptation, Calibration
from slotfast.ttt import ScoreFirst


def test_every_preset_is_measured_as_it_is_computed(tiny_model):
    """All rows of one forward, two ranks, batches of 32 windows; few steps, as the verdict is not about numbers."""
    hints = Hints(32, 2, 32, 2)
    table = ByteTable(np.arange(64) % 5, np.arange(64) % 3 == 0, np.arange(64) < 4)
    few = {"steps": 1, "phases": ((1, 2),)}
    loop = OwnLoop(
        tiny_model, {name: row.model_copy(update=few) for name, row in PRESETS.items()}, Calibration(), table, 1, hints
    )
    rng = np.random.default_rng(0)
    auditor = Auditor(
        loop, list(PRESETS), Stream(synthetic(176, 64, 1, rng), 64, 1),
        hints=hints, byte_rule=loop.byte_rule, budget=Budget(10, 0.01),
    )  # fmt: skip
    found = auditor.audit([0])
    reports = [judge(each, seeds=[0], runs=auditor.runs, seconds=1.0, ranks=2) for each in found]
    assert {report.name: report.clean for report in reports} == {
        name: row.compliance.causal for name, row in PRESETS.items()
    }, "\n".join(map(str, reports))
    for report in reports:
        assert report.conditions["C4"] == report.conditions["bytes"] == "PASS"
        assert {"C1", "C3"} <= report.failed or report.conditions["C1"] == report.conditions["C3"] == "PASS"


def _combinations(rng):
    """A row for every combination of the four choices that goes together, its numbers drawn; steps that show."""
    four = (
        ("bias", "bias+temperature", "hidden", "hidden+bias", "lowrank", "bigram", "bias+repeats"),
        ("context", "focal", "scored"),
        ("window", "batch", "joint", "prefix"),
        ("lbfgs", "adamw", "mm", "rates"),
    )
    drawn = {
        "softcap": ("after", "before"),
        "clamp": (None, 5.0, 1.0),
        "focal": (6, 12, 40),
        "batch": (2, 4, 8),
        "warm_start": ("no", "mean", "place"),
        "importance": (0.0, 0.5),
        "ridge": (0.0, 0.3, 3.0),
        "phases": (((2, 4),), ((1, 1), (2, 3))),
        "steps": (1, 2),
        "lr": (0.05, 0.2),
        "lr_end": (None, 0.01),
        "weight_decay": (0.0, 0.1),
        "start": ("zero", "random"),
        "decay": (0.9, 0.99),
        "document_decay": (0.0, 0.5),
        "scale": (0.5, 1.0),
        "k": (None, 0.5),
    }
    for choices in itertools.product(*four):
        named = dict(zip(("parameter", "positions", "scope", "optimizer"), choices, strict=True))
        for _ in range(20):  # numbers, too, may not go together
            numbers = {name: values[rng.integers(len(values))] for name, values in drawn.items()}
            try:
                yield Adaptation(name="/".join(choices), **named, **numbers)
                break
            except ValidationError:
                continue


def test_every_combination_is_measured_as_it_is_computed(tiny_model):
    rng = np.random.default_rng(1)
    rows = {row.name: row for row in _combinations(rng)}
    assert len(rows) > 50
    hints = Hints(32, 4, 8, 1)  # two batches
    table = ByteTable(np.arange(64) % 5, np.arange(64) % 3 == 0, np.arange(64) < 4)
    loop = OwnLoop(tiny_model, rows, Calibration(), table, 1, hints)
    reports = audit_rows(
        loop, list(rows), Stream(synthetic(93, 64, 1, rng), 64, 1),
        byte_rule=loop.byte_rule, hints=hints, seeds=[0], reruns=4,
    )  # fmt: skip
    wrong = [report for report in reports if report.clean != rows[report.name].compliance.causal]
    assert not wrong, "\n".join(f"{rows[report.name].summary()}\n{report}" for report in wrong)
    assert {True, False} == {report.clean for report in reports}


def test_distributions_of_our_own_pass_are_checked_where_it_keeps_them(tiny_model, monkeypatch):
    def uniform_pass(model, text, plan, adapters, *, worker, keep_logprobs=False, **_):
        def run(on_scored):
            owned, rows = plan.owned(worker.rank, worker.world), len(adapters) + 1
            for window in (plan[index] for index in owned):
                position = window.start + 1 + np.arange(window.context_end, window.scored_end)
                token = text.stream.read(int(position[0]), int(position[-1]) + 1)
                logprobs = np.full((rows, len(token), 64), -math.log(64)) if keep_logprobs else None
                nll = np.full((rows, len(token)), math.log(64))
                on_scored(SimpleNamespace(position=position, nll=nll, n_bytes=token % 5, logprobs=logprobs))

        return SimpleNamespace(run=run)

    monkeypatch.setattr("slotfast.audit.own.SlidingPass", uniform_pass)
    table = ByteTable(np.arange(64) % 5, np.zeros(64, bool), np.zeros(64, bool))
    loop = OwnLoop(tiny_model, PRESETS, Calibration(), table, 1, Hints(32, 8, 8, 2))
    tokens = synthetic(120, 64, 1, np.random.default_rng(0))
    records = loop(tokens, ["none", "causal"])
    assert all(record.rows.shape == (120, 64) and (record.charges[1:] == 1).all() for record in records.values())
    options = {"hints": loop.hints, "byte_rule": loop.byte_rule, "seeds": [0]}
    for report in audit_rows(loop, ["none", "causal"], Stream(tokens, 64, 1), **options, seconds=0.1):
        assert report.clean and set(report.conditions.values()) == {"PASS"}


@pytest.fixture(scope="module")
def tiny_artifact(tmp_path_factory):
    tokenizer = Tokenizer(str(TOKENIZER))
    sizes = {"seq_len": 64, "layers": 1, "width": 8, "heads": 1, "kv_heads": 1, "mlp_width": 8, "rope_dims": 4}
    config = GPTConfig(**sizes, bigram_buckets=0, value_width=0, value_layers=(), vocab_size=tokenizer.vocab_size)
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("tiny") / "a"
    write_artifact(path, Artifact.from_model(GPT(config), {"tokenizer_sha256": tokenizer.sha256}))
    return str(path)


ALL_OF_IT = DocumentLoop._train


def _trained_on_the_next_chunk(self, model, stream, plan, chunk, worker):
    ScoreFirst.ahead(self, model, stream, plan, min(chunk + 1, len(self.chunks(plan)) - 2), worker)


def _phases_see_the_next_document(self, charged, border):
    last = charged[-1]
    ALL_OF_IT(self, [*charged[:-1], replace(last, targets=last.targets + 40)], border)


@pytest.mark.parametrize(
    ("row", "audited", "broken"),
    [
        ("ttt-549:steps=1,lr=0.1", {"chunk": 80}, (ScoreFirst, "train", _trained_on_the_next_chunk)),
        (
            "lora-doc:phases=1,rank=1,phase_lr=0.1",
            {"slots": 3, "prefix": 3, "piece": 20},
            (DocumentLoop, "_train", _phases_see_the_next_document),
        ),
        ("lora-doc:rank=1,keys=refresh", {"slots": 3, "every": 2}, None),
    ],
)
def test_a_row_is_audited_with_numbers_that_the_stream_reaches(tiny_artifact, monkeypatch, row, audited, broken):
    """With its own it would learn from no chunk and in no phase of an audit: a leak there would go unseen."""
    settings = AuditSettings(artifact=tiny_artifact, preset=[row])
    subject = read_subject(settings, np.random.default_rng(0))
    found = subject.audited[row]
    assert {key: getattr(found, key) for key in audited} == audited
    assert found.compliance.causal and found == subject.computed[row].model_copy(update=audited)
    if broken is None:
        return

    def audit():
        how = {"byte_rule": None, "hints": subject.hints, "seeds": [0], "reruns": 2}
        return audit_rows(subject.run, [row], subject.stream, **how)[0]

    assert audit().clean
    monkeypatch.setattr(ScoreFirst, "ahead", ScoreFirst.train, raising=False)
    monkeypatch.setattr(*broken)
    assert "C1" in audit().failed


def test_learn_is_audited_with_the_numbers_that_it_would_be_evaluated_with(tmp_path):
    tokenizer = Tokenizer(str(TOKENIZER))
    sizes = {"seq_len": 256, "layers": 1, "width": 8, "heads": 1, "kv_heads": 1, "mlp_width": 8, "rope_dims": 4}
    config = GPTConfig(**sizes, bigram_buckets=0, value_width=0, value_layers=(), vocab_size=tokenizer.vocab_size)
    learned = {"what": "norms", "chunk": 128, "optimizer": "sgd", "lr": 0.01, "decay": 0.0, "steps": 1}
    found = {"scale": 1.0, "decay": 0.9, "gates": [[0.0, 0.0]] * 6, "learn": learned}
    metadata = {"tokenizer_sha256": tokenizer.sha256, "calibration": found}
    write_artifact(tmp_path / "a", Artifact.from_model(GPT(config), metadata))
    row = "learn:lr=0.02"
    subject = read_subject(AuditSettings(artifact=str(tmp_path / "a"), preset=[row]), np.random.default_rng(0))
    audited = subject.computed[row]
    assert (audited.what, audited.chunk, audited.lr, subject.hints.seq_len) == ("norms", 128, 0.02, 128)
