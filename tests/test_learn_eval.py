"""`learn` in the command and under the auditor: paired with the run's `none`, and measured as it is computed."""

import json
from dataclasses import replace
from importlib import resources

import numpy as np
import pytest
import torch

from slotfast.audit import Hints, audit_rows
from slotfast.audit.own import OwnLoop
from slotfast.audit.streams import Stream, synthetic
from slotfast.data import ByteTable
from slotfast.errors import InputError
from slotfast.eval import program
from slotfast.eval.__main__ import main
from slotfast.eval.report import table
from slotfast.learn import LEARNING, LearningLoop, parse_row
from slotfast.slot import PRESETS, Calibration
from slotfast.worker import Worker
from tests.json_schema import faults
from tests.models import write_tiny

ROW = "learn:chunk=16,lr=0.01,rank=4"
SCHEMA = json.loads((resources.files("slotfast.eval") / "result.schema.json").read_text())
DOCUMENTS = "learn:chunk=16,lr=0.01,what=all,scope=document"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A tiny random model, and a text of three documents."""
    folder = tmp_path_factory.mktemp("small")
    write_tiny(folder / "m")
    lines = [json.dumps({"text": "The quick brown fox — jumps.\n" * 5 + str(number)}) for number in range(3)]
    (folder / "t.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def _args(small, *more):
    return ["--artifact", str(small / "m"), "--text", str(small / "t.jsonl"), "--stride", "16", *map(str, more)]


def _run(small, capsys, *more):
    main(_args(small, "--json", "-", *more))
    return json.loads(capsys.readouterr().out)


def test_a_row_that_learns_has_a_forward_of_its_own(small, tmp_path, capsys):
    rows = tmp_path / "rows.npz"
    found = {
        forward: _run(small, capsys, "--preset", ROW, "causal", DOCUMENTS, "--forward", forward, "--per-token", rows)
        for forward in ("windows", "stream")
    }
    losses = np.load(rows)
    for forward, result in found.items():
        assert faults(result, SCHEMA) == []
        none, causal, learned, documents = result["presets"]
        assert [row["preset"] for row in result["presets"]] == ["none", "causal", ROW, DOCUMENTS]
        assert (none["forward"], learned["forward"], learned["sinks"]) == (forward, "stream", 0)
        assert learned["resolved_preset"]["rank"] == 4 and learned["causal"] and "cost" not in causal
        assert learned["adapted"]["gain_bpb"] == pytest.approx(none["adapted"]["bpb"] - learned["adapted"]["bpb"])
        own = learned["unlearned"]
        assert own["gain_bpb"] == pytest.approx(own["bpb"] - learned["adapted"]["bpb"]) and own["gain_bpb"] > 0.01
        assert own["gain_se"] > 0 and 1.9 < learned["cost"]["forwards"] < 2 < documents["cost"]["forwards"] < 3.1
        assert min(learned["cost"]["seconds"], learned["cost"]["unlearned_seconds"], result["seconds"]["learn"]) > 0
    windows, stream = (found[forward]["presets"] for forward in ("windows", "stream"))
    assert windows[2]["adapted"]["nats"] == stream[2]["adapted"]["nats"]
    # in a stream, what it would be unlearned is what `none` is
    assert stream[2]["unlearned"]["bpb"] == pytest.approx(stream[0]["adapted"]["bpb"], abs=1e-6)
    nll = losses[f"adapted_nll:{ROW}"]
    assert nll.sum(dtype=np.float64) == pytest.approx(stream[2]["adapted"]["nats"])


def test_the_table_says_what_it_gains_and_costs(small, capsys):
    main(_args(small, "--preset", ROW))
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith(f"{ROW}:"))
    assert "over its own forward unlearned" in line and "2.0 forwards a token" in line
    heads, none, learned = [line for line in out.splitlines() if "  bpb" in line or line.endswith("   yes")]
    assert heads.split()[-3:] == ["forwards", "seconds", "causal"] and 3 < float(none.split()[2]) < 4  # by 16 of 64
    assert learned.split()[4] == "2.0" and float(learned.split()[5]) > 0
    main(["--list-presets"])
    assert "score a chunk, then learn from it" in capsys.readouterr().out
    main(["--show-preset", ROW])
    shown = capsys.readouterr().out
    assert "causal: each chunk of 16 tokens is charged before anything learns from it" in shown and "lr  " in shown


@pytest.mark.parametrize("row", [*LEARNING, "learn:clip=1,betas=0.5+0.9,projections=q/v"])
def test_a_row_is_shown_as_it_is_written(row, capsys):
    main(["--show-preset", row])
    shown = dict(line.split() for line in capsys.readouterr().out.splitlines() if len(line.split()) == 2)
    name = shown.pop("name").partition(":")[0]
    written = parse_row(f"{name}:{','.join(f'{key}={value}' for key, value in shown.items())}")
    assert written.alone == parse_row(row).alone and "keys" in shown


def test_a_row_on_top_is_shown_line_by_line(capsys):
    main(["--show-preset", "learn+causal:scale=0.5"])
    out = capsys.readouterr().out
    assert "+ optimizer       rates\n" in out and "+ scale           0.5\n" in out and "{" not in out


def test_the_picture_says_what_is_not_causal_and_what_learning_costs(small, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr("slotfast.eval.plot.write_png", lambda path, figure: figures.append(figure))
    longest = f"{ROW},scope=document,slots=2,keys=recompute,order=longest"
    main(_args(small, "--preset", ROW, longest, "--allow-noncausal", "--plot", tmp_path / "p.png"))
    above, below, last = figures[0].axes
    labels = [text.get_text() for text in last.get_legend().get_texts()]
    assert labels[0].startswith("none: ") and labels[1].endswith(" 2.0 forwards") and "NOT" not in labels[1]
    assert labels[2].endswith("forwards, NOT causal")
    assert "seconds" in last.get_ylabel() and "bits per byte" in below.get_ylabel() and last.get_ylim()[0] == 0


def test_on_a_gpu_learning_is_projected_on_the_contests_text(small, monkeypatch, capsys):
    report = program.report

    def on_gpu(inputs, setup, *args):
        # What was measured is then what each of two ranks did side by side
        setup = replace(setup, worker=replace(setup.worker, world=2))
        with monkeypatch.context() as patch:
            patch.setattr(Worker, "on_gpu", property(lambda worker: True))
            patch.setattr(Worker, "device_name", "a GPU")
            return report(inputs, setup, *args)

    counted = f"{ROW}+causal"
    assert _run(small, capsys, "--preset", ROW)["presets"][1]["cost"]["projected_seconds_8gpu"] is None
    monkeypatch.setattr(program, "report", on_gpu)
    found = _run(small, capsys, "--preset", ROW, counted)
    assert faults(found, SCHEMA) == []
    for row in found["presets"][1:]:
        cost = row["cost"]
        spent = cost["seconds"] + cost.get("on_top_seconds", 0.0)
        expected = 64 * 969_057 / found["tokens"] * spent * 2 / 8
        assert cost["projected_seconds_8gpu"] == pytest.approx(expected, rel=0.02)  # seconds are rounded to 1 ms
        assert f"; the contest's text in {cost['projected_seconds_8gpu']:,.0f} s on 8 such GPUs" in table(found)
    windows = 969_057 / found["windows_per_second"] * 2 / 8
    assert found["projected_seconds_8gpu"] == pytest.approx(windows)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--preset", "learn:rank=0"], "rank=0: expected at least 1"),
        (["--preset", "learn:chunk=65"], "chunk=65 is longer than the window of 64"),
        (["--preset", ROW, "--ttt"], "on top learns too"),
        (["--preset", ROW, "--weights", "int6"], "packed weights pass no gradients"),
        (["--preset", ROW, ROW], "given twice"),
    ],
)
def test_runs_that_it_cannot_be_part_of_are_refused(small, tmp_path, monkeypatch, more, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        main(_args(small, *more))
    assert words in str(caught.value) and "\n" not in str(caught.value) and not list(tmp_path.iterdir())


# under audit


class LearnsBeforeTheCharge(LearningLoop):
    """One step on a chunk's own losses before these are charged."""

    def _chunk(self, start, tokens, *rest):
        state = self._cached.state_dict()
        with self._learner.attached():
            self._learn(self._forward(tokens)[0], tokens, None)
        self._cached.load_state_dict(state)
        return super()._chunk(start, tokens, *rest)


class LearnsFromTheNextChunk(LearningLoop):
    """Steps on tokens of the chunk that is still to be charged."""

    def run(self, read, predictions, on_charged):
        self.read = lambda start, stop: torch.from_numpy(read(start, stop))
        super().run(read, predictions, on_charged)

    def _learn(self, losses, tokens, before):
        state = self._cached.state_dict()
        ahead = self.read(self._tokens, self._tokens + len(tokens))
        super()._learn(self._forward(ahead)[0] if len(ahead) > 1 else losses, ahead, before)
        self._cached.load_state_dict(state)


class CutAtTheNextDocument(LearningLoop):
    """What is learned is dropped in the chunk that charges a BOS, before it does."""

    def _chunk(self, start, tokens, *rest):
        if (tokens[1:] == self.bos_id).any():
            self._learner.forget()
        return super()._chunk(start, tokens, *rest)


def test_the_auditor_measures_what_is_computed(tiny_model, monkeypatch):
    """Our rows, and the same loop three times broken, in one audit."""
    documents = parse_row("learn:chunk=16,lr=0.01,scope=document,what=norms")
    broken = {loop.__name__: loop for loop in (LearnsBeforeTheCharge, LearnsFromTheNextChunk, CutAtTheNextDocument)}
    rows = {name: parse_row(ROW).model_copy(update={"name": name}) for name in ("honest", *broken)}
    rows |= {"documents": documents, "none": PRESETS["none"]}
    monkeypatch.setattr(
        "slotfast.audit.own.make_loop",
        lambda model, row, *more, unlearned, **options: broken.get(row.name, LearningLoop)(
            model, row, *more, **options
        ),
    )
    table = ByteTable(np.arange(64) % 5, np.arange(64) % 3 == 0, np.arange(64) < 4)
    loop = OwnLoop(tiny_model, rows, Calibration(), table, 1, Hints(32, 8, 4, 2))
    stream = Stream(synthetic(66, 64, 1, np.random.default_rng(0)), 64, 1)
    reports = audit_rows(loop, list(rows), stream, byte_rule=loop.byte_rule, hints=loop.hints, seeds=[0], reruns=3)
    for report in reports:
        assert report.clean == (report.name not in broken), str(report)
        assert report.clean or report.failed & {"C1", "C2", "C3"}
