"""Calibrations of models of other projects: what the file holds, who reads it, and what is no such file."""

import copy
import json
import re
import sys
from importlib import resources

import numpy as np
import pytest
import torch

import slotfast
from bench import calibration as bench
from slotfast.calibrate import main as calibrate
from slotfast.calibrate.program import _split
from slotfast.errors import InputError
from slotfast.eval.__main__ import main as evaluate
from slotfast.eval.inputs import Sources, read_inputs
from slotfast.foreign import StoredCalibration
from tests.json_schema import faults

SCHEMA = json.loads((resources.files("slotfast.foreign") / "calibration.schema.json").read_text())
STYLES = ("the ship sails over the sea", "a king rules his own land", "we walk into the dark wood")

# Knows nothing of text: the logits of a token are a random row
MODULE = """
import torch
from torch import nn

class Rows(nn.Module):
    seq_len = 64

    def __init__(self, vocabulary=1024):
        super().__init__()
        torch.manual_seed(0)
        self.rows = nn.Embedding(vocabulary, vocabulary)

    def forward(self, tokens):
        return self.rows(tokens)

    def stream(self, tokens, state):
        return self.rows(tokens), None

def padded():
    return Rows(1088)
"""


def documents(count, seed):
    """Short ones, of three kinds that come one after the other: a text that is sorted."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(STYLES[3 * n // count].split(), 60)) for n in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibration")
    (folder / "rows_of_theirs.py").write_text(MODULE)
    for name, count, seed in (("like", 48, 0), ("score", 6, 1), ("few", 4, 2)):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in documents(count, seed)))
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    sys.modules.pop("rows_of_theirs", None)


@pytest.fixture(scope="module")
def found(folder):
    """The file of the command."""
    path = folder / "found.json"
    arguments = ["--model", "rows_of_theirs:padded", "--text", str(folder / "like.jsonl"), "--out", str(path)]
    arguments += ["--learn-trials", "2", "--learn-row", "learn+causal"]
    calibrate([*arguments, "--max-tokens", "1500", "--forward", "stream", "--stride", "16"])
    return path


def score(folder, capsys, *arguments, text="score"):
    shared = ["--model", "rows_of_theirs:padded", "--text", str(folder / f"{text}.jsonl"), "--stride", "16"]
    evaluate([*shared, "--json", "-", "--preset", "causal", *map(str, arguments)])
    return json.loads(capsys.readouterr().out)


def test_a_calibration_is_as_its_schema_says(folder, found):
    document = json.loads(found.read_text())
    assert faults(document, SCHEMA) == []
    assert set(SCHEMA["required"]) == set(SCHEMA["properties"]) and document["schema"] == 1
    assert document["vocab_size"] == 1088 and str(folder) not in found.read_text()
    assert StoredCalibration.read(found).model_dump(by_alias=True) == document
    learn = document["calibration"]["learn"]
    assert (learn["row"], learn["trials"], learn["what"]) == ("learn+causal", 2, "all")  # it has no linear layers


def test_it_gains_on_text_that_did_not_choose_it(folder, found, capsys):
    """And what runs is what stands in the file."""
    before, after = score(folder, capsys), score(folder, capsys, "--calibration", found)
    stored = json.loads(found.read_text())["calibration"]
    row = after["resolved_preset"]
    assert (row["scale"], row["decay"]) == (stored["scale"], stored["decay"]) and row["gates"] == stored["gates"]
    assert (before["calibrated"], before["frequencies"]) == (False, False)
    assert (after["calibrated"], after["frequencies"]) == (True, True)
    assert after["base"] == before["base"]
    assert after["adapted"]["gain_bpb"] > before["adapted"]["gain_bpb"] + 0.02
    assert not any("calibrated on" in note for note in after["notes"])
    seen = score(folder, capsys, "--calibration", found, text="like")
    assert any("calibrated on" in note and "no honest score" in note for note in seen["notes"])


def test_adapt_takes_it_and_scores_as_the_command_does(folder, found, capsys):
    rows = folder / "rows.npz"
    score(folder, capsys, "--calibration", found, "--per-token", rows)
    import rows_of_theirs

    from slotfast import shipped
    from slotfast.data import Tokenizer, read_documents
    from slotfast.windows import Plan

    tokenizer = Tokenizer(shipped.TOKENIZER)
    tokens = torch.from_numpy(tokenizer.encode_documents(read_documents(folder / "score.jsonl"))[0].astype(np.int64))
    plan, model = Plan(len(tokens) - 1, 64, 16), rows_of_theirs.padded()
    windows = [plan[index] for index in range(len(plan))]
    padded = torch.cat([tokens, tokens.new_zeros(64)])
    places = torch.tensor([window.start for window in windows])[:, None] + torch.arange(64)
    arguments = (
        model(padded[places]).detach(),
        padded[places + 1],
        torch.tensor([window.context_end for window in windows]),
        torch.tensor([window.scored_end for window in windows]),
    )
    calibration = slotfast.read_calibration(found)
    adapted = slotfast.adapt(*arguments, calibration=calibration, bos_id=tokenizer.bos_id)
    with np.load(rows) as stored:
        expected = torch.from_numpy(stored["adapted_nll"])
    torch.testing.assert_close(adapted.nll[~adapted.nll.isnan()], expected, rtol=1e-4, atol=1e-4)
    more = {"state": adapted.state, "bos_id": tokenizer.bos_id}
    other = slotfast.Calibration(calibration.frequency, 0.25, calibration.decay, calibration.gates)
    for options, message in (
        ({"calibration": other}, "state: it is that of preset .* or of other options|another calibration"),
        ({"calibration": calibration, "frequency": torch.ones(1088)}, "give one of them"),
        ({"calibration": str(found)}, "expected what read_calibration returns, got str"),
    ):
        with pytest.raises(InputError, match=message):
            slotfast.adapt(*arguments, **more, **options)
    with pytest.raises(InputError, match=r"frequency \(1088,\): expected \(1087,\)"):
        slotfast.adapt(arguments[0][..., :-1], *arguments[1:], calibration=calibration)


def test_every_fourth_document_is_held_out_and_all_kinds_are_among_them():
    class Words:
        def encode(self, text):
            return [0, *(1 + STYLES.index(next(s for s in STYLES if word in s.split())) for word in text.split()[:20])]

    texts = [" ".join(style.split()[-2:]) for style in STYLES for _ in range(40)]
    counted, everything = _split(Words(), iter(texts), None)
    assert len(everything) == 3 * 30 and len(counted) == 3 * 90
    _, some = _split(Words(), iter(texts), 26)
    assert len(some) == 26 and {1, 2, 3} <= set(some.tolist())
    assert (np.diff(some[some > 0]) >= 0).all()  # in the text's order


def _changed(*path, value):
    def change(document):
        *way, last = path
        place = document
        for key in way:
            place = place[key]
        place[last] = value
        return document

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda document: [document], "not a calibration: expected"),
        (lambda document: {}, "not a calibration: schema: expected a value"),
        (_changed("schema", value=2), "not a calibration: schema: expected 1"),
        (_changed("more", value=1), "not a calibration: more: "),
        (_changed("calibration", "scale", value=3), "calibration.scale: expected at most 2"),
        (_changed("calibration", "decay", value="x"), "calibration.decay: expected a number"),
        (_changed("calibration", "gates", value=[[0, 0]]), "calibration.gates: "),
        (_changed("frequency", "count", value=[1]), "frequency: .* expected as many"),
        (_changed("frequency", "token", 0, value=-1), "frequency: expected tokens that rise"),
        (_changed("vocab_size", value=5), "token .* of a vocabulary of 5"),
        (_changed("vocab_size", value=1089), "for 1089 logits and the tokenizer .*; the model has 1088"),
        (_changed("tokenizer_sha256", value="0" * 64), "the tokenizer 000000000000; the model has 1088"),
        (_changed("sketch", value="&"), "not a sketch of a text"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_that_does_not_fit_is_one_clear_line(folder, found, capsys, tmp_path, change, message):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(change(copy.deepcopy(json.loads(found.read_text())))))
    with pytest.raises(InputError, match=message) as caught:
        score(folder, capsys, "--calibration", path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_changed("parameters", value=7), "Rows, 7 parameters and .*Rows, 1,183,744 parameters$"),
        (
            _changed("architecture", value="Llama"),
            "another model than this is: Llama, 1,183,744 parameters and .*Rows, ",
        ),
        (dict, None),
    ],
    ids=["size", "class", "the same"],
)
def test_a_calibration_of_another_model_is_said(folder, found, capsys, tmp_path, change, said):
    path = tmp_path / "other.json"
    path.write_text(json.dumps(change(json.loads(found.read_text()))))
    shared = ["--model", "rows_of_theirs:padded", "--text", str(folder / "score.jsonl"), "--max-tokens", "200"]
    evaluate([*shared, "--calibration", str(path)])
    err = capsys.readouterr().err
    assert re.search(f"^warning: --calibration .*{said}", err, re.M) if said else "warning" not in err


@pytest.mark.parametrize(("content", "message"), [(None, "cannot be read: No such file"), (b"\xff{", "expected JSON")])
def test_what_is_no_json_is_one_clear_line(folder, capsys, tmp_path, content, message):
    if content is not None:
        (tmp_path / "x").write_bytes(content)
    with pytest.raises(InputError, match=message):
        score(folder, capsys, "--calibration", tmp_path / "x")


def test_what_the_command_cannot_do_is_one_line_and_nothing_is_written(folder, found):
    out = folder / "never.json"
    model = ["--model", "rows_of_theirs:padded", "--out", str(out)]
    for arguments, message in (
        ([*model], "--text: needed"),
        (
            [*model, "--text", str(folder / "few.jsonl")],
            "held out, one document of 4: 1 document, .* needs 2 and 1,000",
        ),
        ([*model, "--text", "x", "--artifact", "y"], "--model: give one of them"),
        (
            ["--model", "nowhere:x", "--text", str(folder / "like.jsonl"), "--out", str(out)],
            "No module named 'nowhere'",
        ),
    ):
        with pytest.raises(InputError, match=message):
            calibrate(arguments)
    assert not out.exists()
    with pytest.raises(InputError, match="--calibration: goes with --model; an artifact holds its own"):
        evaluate(["--calibration", str(found)])


def test_the_bench_measures_what_the_command_does(folder, found, capsys):
    sources = Sources(
        model="rows_of_theirs:padded", calibration=str(found), text=str(folder / "score.jsonl"), max_tokens=600
    )
    measured = bench.compare(read_inputs(sources), 64, 16)
    arguments = ("--calibration", found, "--forward", "stream", "--max-tokens", "600")
    expected = score(folder, capsys, *arguments)
    assert measured["bpb"]["none"] == pytest.approx(expected["base"]["bpb"], rel=1e-6)
    gains, calibrated = measured["gain_over_none"], expected["adapted"]
    assert gains["calibrated"]["bpb"] == pytest.approx(calibrated["gain_bpb"], rel=1e-6)
    assert gains["calibrated"]["se"] == pytest.approx(calibrated["gain_se"], rel=1e-6)
    paired = measured["calibrated_over_uncalibrated"]["bpb"]
    assert paired == pytest.approx(gains["calibrated"]["bpb"] - gains["uncalibrated"]["bpb"], rel=1e-6)
