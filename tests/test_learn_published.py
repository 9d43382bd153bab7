"""Published rows that learn, and ours made of them: in a run, and under the auditor measured as computed."""

import json
from dataclasses import replace
from importlib import resources

import numpy as np
import pytest

from slotfast.audit import Hints, audit_rows
from slotfast.audit.own import OwnLoop
from slotfast.audit.streams import Stream, synthetic
from slotfast.data import ByteTable
from slotfast.errors import InputError
from slotfast.eval.__main__ import main
from slotfast.learn import LEARNING, make_loop, parse_row
from slotfast.learn.schedule import Round
from slotfast.slot import Calibration
from tests.json_schema import faults
from tests.models import write_tiny

SMALL = "rank=2,slots=3,lr=0.01,chunk=8"
ROWS = {
    "lora-doc": f"lora-doc:{SMALL}",
    "lora-1530": f"lora-1530:{SMALL}",
    "lora-1855": f"lora-1855:{SMALL},prefix=3,piece=16",
    "lora-2014": f"lora-2014:{SMALL},prefix=3,piece=16,short=20+4/9+2",
    "ttt-549": "ttt-549:chunk=16,lr=0.05,batch=1,steps=2",
    "ttt-1413": "ttt-1413:chunk=24,lr=0.05,batch=2",
}
MORE = {
    "with old keys": f"lora-doc:{SMALL},keys=stale",
    "with refreshed keys": f"lora-doc:{SMALL},keys=refresh,every=2",
    "phases as they come": f"lora-doc:{SMALL},start=warm,phases=2,prefix=3,piece=16",
}


def _audit(tiny_model, rows, reruns=2):
    table = ByteTable(np.arange(64) % 5, np.arange(64) % 3 == 0, np.arange(64) < 4)
    loop = OwnLoop(tiny_model, rows, Calibration(), table, 1, Hints(32, 8, 4, 1))
    tokens = synthetic(96, 64, 1, np.random.default_rng(0))
    tokens[[17, 28, 40, 80]] = 1
    stream = Stream(tokens, 64, 1)
    return audit_rows(loop, list(rows), stream, byte_rule=loop.byte_rule, hints=loop.hints, seeds=[0], reruns=reruns)


def test_every_row_is_there():
    assert {name for name in LEARNING if name != "learn"} == set(ROWS)


def test_every_row_is_measured_as_it_is_computed(tiny_model):
    rows = {name: parse_row(text).model_copy(update={"name": name}) for name, text in (ROWS | MORE).items()}
    for report in _audit(tiny_model, rows):
        computed = rows[report.name].compliance
        assert report.clean == computed.causal, str(report)
        if not computed.causal:
            assert "C4" in report.failed and "documents in another order" in str(report)


class Ranks:
    """Two ranks of a row with phases, one after the other; what they charge comes in the stream's order."""

    def __init__(self, *arguments, **options):
        self.loops = [make_loop(*arguments, **options, rank=rank, world=2) for rank in range(2)]

    def run(self, read, predictions, on_charged):
        parts = []
        for loop in self.loops:
            loop.run(read, predictions, parts.append)
        for part in sorted(parts, key=lambda part: part.start):
            on_charged(part)


def _contiguous(row, found, rank, world):
    """Each rank has a half of the documents, and both train behind their first one."""
    every = list(found)
    half = len(every) // 2
    own = every[half:] if rank else every[:half]
    own = [replace(each, number=rank + world * number) for number, each in enumerate(own)]
    yield Round(iter(own[:1]), [every[0], every[half]])
    yield Round(iter(own[1:]))


def test_ranks_that_deal_documents_out_are_causal_and_halves_are_not(tiny_model, monkeypatch):
    """As documents come: a phase may train on none that is behind what any rank charges after it."""
    monkeypatch.setattr("slotfast.audit.own.make_loop", Ranks)
    row = f"lora-doc:{SMALL},start=warm,phases=1,prefix=2,piece=8"
    (honest,) = _audit(tiny_model, {"dealt": parse_row(row).model_copy(update={"name": "dealt"})})
    assert honest.clean, str(honest)
    monkeypatch.setattr("slotfast.learn.documents.rounds", _contiguous)
    (broken,) = _audit(tiny_model, {"halves": parse_row(row).model_copy(update={"name": "halves"})})
    assert broken.failed & {"C1", "C3"}, str(broken)


@pytest.fixture
def tiny_run(tmp_path):
    """Flags of a run on a tiny random model and a text of five documents."""
    write_tiny(tmp_path / "m")
    lines = [json.dumps({"text": "The quick brown fox — jumps.\n" * (3 + number % 4)}) for number in range(5)]
    (tmp_path / "t.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return ["--artifact", str(tmp_path / "m"), "--text", str(tmp_path / "t.jsonl"), "--stride", "16"]


def test_a_run_scores_documents_in_slots_beside_its_other_rows(tiny_run, tmp_path, capsys):
    args = tiny_run
    rows = ("lora-doc:chunk=16,lr=0.01", "lora-1530:chunk=16,lr=0.01,start=cold,slots=2")
    with pytest.raises(InputError, match=r"is not causal: documents in another order, .*--allow-noncausal"):
        main([*args, "--preset", rows[1]])
    out = tmp_path / "rows.npz"
    main([*args, "--json", "-", "--preset", *rows, "--allow-noncausal", "--per-token", str(out)])
    found = json.loads(capsys.readouterr().out)
    assert faults(found, json.loads((resources.files("slotfast.eval") / "result.schema.json").read_text())) == []
    none, honest, longest = found["presets"]
    assert honest["causal"] and not longest["causal"] and honest["forward"] == "windows"
    assert honest["unlearned"]["gain_bpb"] > 0.01 and honest["cost"]["forwards"] > 3
    losses, nll = np.load(out), []
    for row in (honest, longest):
        nll.append(losses["adapted_nll" if row is honest else f"adapted_nll:{row['preset']}"])
        assert nll[-1].sum(dtype=np.float64) == pytest.approx(row["adapted"]["nats"])
        assert row["adapted"]["gain_bpb"] == pytest.approx(none["adapted"]["bpb"] - row["adapted"]["bpb"])
        assert row["adapted"]["gain_se"] > 0
    assert np.array_equal(nll[0][:16], nll[1][:16])  # of the first document's first chunk, wherever it was charged
    main(["--list-presets"])
    assert "lora-1855" in (shown := capsys.readouterr().out) and "lora-2014" in shown
    main(["--show-preset", "lora-2014:chunk=32"])
    assert "NOT causal (fails C1, C2, C3, C4): documents in another order" in capsys.readouterr().out


def test_chunked_training_is_a_row_too(tiny_run, capsys):
    """#549's protocol beside untrained rows; with counts on top; and as `--ttt` spells it."""
    how = ["--ttt", "--ttt-chunk", "64", "--ttt-lr", "0.05", "--ttt-epochs", "2"]
    main([*tiny_run, *how, "--preset", "none", "causal", "--json", "-"])
    spelt = json.loads(capsys.readouterr().out)["presets"]
    row = "ttt-549:chunk=64,lr=0.05,steps=2"
    main([*tiny_run, "--preset", row, "causal", f"{row}+causal", "ttt-1413:chunk=64", "--json", "-"])
    found = json.loads(capsys.readouterr().out)
    assert faults(found, json.loads((resources.files("slotfast.eval") / "result.schema.json").read_text())) == []
    none, _, trained, both, other = found["presets"]
    assert [each["adapted"]["nats"] for each in spelt] == [each["adapted"]["nats"] for each in found["presets"][:4]]
    assert (
        trained["adapted"]["nats"] < none["adapted"]["nats"] - 1
        and both["adapted"]["nats"] != trained["adapted"]["nats"]
    )
    assert trained["unlearned"]["bpb"] == none["adapted"]["bpb"] and trained["forward"] == "windows"
    assert trained["causal"] and other["adapted"]["nats"] != none["adapted"]["nats"]
    assert trained["cost"]["forwards"] > 3 + 3  # windows of 64 that go on by 16, and most tokens trained on twice
    with pytest.raises(InputError, match="forwards windows; use --forward windows"):
        main([*tiny_run, "--preset", row, "--forward", "stream"])
    for wrong, words in (("chunk=0", "at least 1"), ("what=lora", "keys 'windows' need"), ("rank=2", "does nothing")):
        with pytest.raises(InputError, match=words):
            parse_row(f"ttt-549:{wrong}")
    with pytest.raises(InputError, match="schedule 'cosine' needs keys 'windows'"):
        parse_row("learn:what=all,schedule=cosine")
