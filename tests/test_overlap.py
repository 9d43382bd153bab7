"""Streams that share text: by their runs, by a sketch of one of them, and by what commands say of it."""

import json
from importlib import resources

import numpy as np
import pytest

from slotfast import calibrate, overlap, record, train
from slotfast.artifact import read_artifact
from slotfast.data import TokenStream
from slotfast.errors import InputError
from slotfast.eval.__main__ import main as evaluate
from tests.models import write_tiny


def _stream(*parts):
    return TokenStream([np.asarray(part) for part in parts])


def test_overlap_counts_runs_wherever_they_are():
    tokens = np.random.default_rng(0).integers(0, 1000, 32 * 100)
    other = np.random.default_rng(1).integers(0, 1000, 5000)
    assert overlap.overlap(_stream(tokens), _stream(other)) == 0
    assert overlap.overlap(_stream(tokens), _stream(other, tokens)) == 1
    within = np.concatenate([other[:777], tokens[32 * 10 : 32 * 35], other[777:]])  # shifted and cut out
    assert overlap.overlap(_stream(tokens), _stream(within)) == pytest.approx(0.25)
    changed = tokens.copy()
    changed[5::32] += 1  # one token of each run
    assert overlap.overlap(_stream(tokens), _stream(changed)) == 0
    assert overlap.overlap(_stream(tokens[:31]), _stream(tokens)) == overlap.overlap(_stream(tokens), _stream()) == 0
    repeated = np.tile(tokens[:32], 3)
    assert overlap.overlap(_stream(repeated, tokens[32:64]), _stream(repeated)) == pytest.approx(0.75)


def test_overlap_looks_across_its_pieces(monkeypatch):
    tokens = np.random.default_rng(0).integers(0, 1000, 32 * 10)
    pieces = overlap._hashes
    monkeypatch.setattr(overlap, "_hashes", lambda stream: pieces(stream, size=64))
    assert overlap.overlap(_stream(tokens), _stream(tokens[3:])) == pytest.approx(0.9)


def _drawn(seed, count):
    return np.random.default_rng(seed).integers(0, 1024, count)


@pytest.mark.parametrize("size", [64, 1 << 16])
def test_a_sketch_tells_what_share_two_streams_have_in_common(monkeypatch, size):
    pieces = overlap._hashes
    monkeypatch.setattr(overlap, "_hashes", lambda stream: pieces(stream, size=size))
    text, other = _drawn(0, 20_000), _drawn(1, 20_000)
    known = overlap.sketch(_stream(text))
    assert len(known) < 6000 and overlap.sketch(_stream(text[:7000], text[7000:])) == known
    assert overlap.shared(_stream(text), known) == 1 and overlap.shared(_stream(other), known) == 0
    assert overlap.shared(_stream(other[:777], text[10_000:], other[777:10_777]), known) == pytest.approx(0.5, abs=0.1)
    # a piece of it, and a longer text with all of it
    assert overlap.shared(_stream(text[3000:6000]), known) == 1
    assert overlap.shared(_stream(other, text, other + 1), known) == 1
    changed = text.copy()
    changed[::20] += 1  # no run is left as it was
    assert overlap.shared(_stream(changed), known) == 0


def test_hashes_are_those_of_files_that_were_written_before():
    assert list(next(overlap._hashes(_stream(np.arange(33))))) == [5099949788676091214, 17732744949851523519]


def test_streams_shorter_than_a_run_share_nothing():
    assert overlap.sketch(_stream(_drawn(0, 31))) == ""
    assert (
        overlap.shared(_stream(_drawn(0, 500)), "")
        == overlap.shared(_stream([1]), overlap.sketch(_stream(_drawn(0, 99))))
        == 0
    )


@pytest.mark.parametrize(
    "sketches", ["x", {"training": "x"}, {"training": 1}, {"training": "AAAA"}, {"training": "/" * 43 + "="}]
)
def test_a_damaged_sketch_is_one_line(sketches):
    with pytest.raises(InputError, match="sketch"):
        overlap.seen(_stream(_drawn(0, 500)), {"sketches": sketches})


def _write_text(path, words, documents=20):
    rng = np.random.default_rng(len(words))
    texts = [" ".join(rng.choice(words, 60)) for _ in range(documents)]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """Results of a model calibrated on one text, scored on it and on another."""
    folder = tmp_path_factory.mktemp("overlap")
    write_tiny(folder / "m")
    _write_text(folder / "seen.jsonl", "one text that the numbers were fitted to, and again".split())
    _write_text(folder / "other.jsonl", "nobody had ever read these few words before today".split())
    tokenizer = str(resources.files("slotfast") / "demo" / "demo.model")
    names = ["--artifact", str(folder / "m"), "--tokenizer", tokenizer, "--out", str(folder / "c")]
    calibrate.main([*names, "--text", str(folder / "seen.jsonl")])
    found = {}
    for name in ("seen", "other"):
        given = ["--artifact", str(folder / "c"), "--text", str(folder / f"{name}.jsonl"), "--stride", "64"]
        evaluate([*given, "--preset", "none", "causal", "--json", str(folder / f"{name}.json")])
        found[name] = json.loads((folder / f"{name}.json").read_text())
    return folder, found


def test_a_text_that_a_model_was_calibrated_on_is_said_to_be(scored, capsys):
    folder, found = scored
    assert found["other"]["text"]["seen"] == {"calibration": 0.0} and not found["other"]["notes"]
    assert found["seen"]["text"]["seen"] == {"calibration": 1.0}
    assert "calibrated on text that shares about 100.0%" in found["seen"]["notes"][0]
    given = ["--artifact", str(folder / "c"), "--text", str(folder / "seen.jsonl"), "--max-tokens", "500"]
    evaluate([*given, "--preset", "none"])
    assert "warning: `causal` was calibrated on text that shares about" in capsys.readouterr().out


def test_a_record_of_such_a_text_is_refused(scored):
    folder, _ = scored
    record.main([str(folder / "other.json")])
    record.main([str(folder / "seen.json"), "--preset", "none"])  # which calibration does not touch
    with pytest.raises(InputError, match="'causal' is not causal: its calibration text shares about 100.0%"):
        record.main([str(folder / "seen.json")])
    trained = json.loads((folder / "seen.json").read_text())
    trained["text"]["seen"] = {"training": 0.3}
    (folder / "trained.json").write_text(json.dumps(trained))
    with pytest.raises(InputError, match="its training text shares about 30.0%"):
        record.main([str(folder / "trained.json"), "--preset", "none"])


def test_a_trained_model_knows_its_training_text(tmp_path, capsys):
    _write_text(tmp_path / "t.jsonl", "a text to train on that is short and simple enough".split(), 100)
    sizes = "--vocab-size 300 --layers 1 --width 16 --heads 2 --kv-heads 1 --mlp-width 16 --seq-len 32 --steps 1"
    train.main(["--text", str(tmp_path / "t.jsonl"), "--out", str(tmp_path / "m"), *sizes.split()])
    assert set(read_artifact(tmp_path / "m").metadata["sketches"]) == {"training", "calibration"}
    names = {"artifact": "m", "tokenizer": "m.model", "text": "t.jsonl"}
    given = [part for name, path in names.items() for part in (f"--{name}", str(tmp_path / path))]
    given += ["--max-tokens", "2000"]
    calibrate.main([*given, "--out", str(tmp_path / "c")])
    assert "with the one that the model was trained on" in capsys.readouterr().err
    evaluate([*given, "--preset", "none", "--json", str(tmp_path / "r.json")])
    # but for the runs at the ends of documents, which are in another order, and what was held out
    assert json.loads((tmp_path / "r.json").read_text())["text"]["seen"]["training"] > 0.7
