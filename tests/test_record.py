"""Several runs: their mean, Welch's test against published figures and closed forms, and what is refused."""

import copy
import json
import math
from importlib import resources
from pathlib import Path

import pytest

from slotfast.errors import InputError
from slotfast.record import main, read_runs
from slotfast.welch import Sample, compare, upper_tail

RESULT = Path(__file__).parents[1] / "bench" / "results" / "amd-epyc-2-threads" / "eval.json"
# PR #1307 of openai/parameter-golf: losses of its four seeds, and what it states against PR #1019
SEEDS = {42: 1.87679853, 1337: 1.87239786, 2025: 1.87233216, 7: 1.87531400}


def _result(seed, loss, edit=None):
    """A real result with another seed and another loss for its second preset."""
    result = copy.deepcopy(_TEMPLATE)
    result["model"]["metadata"] |= {"seed": seed, "steps": 1000 + seed}
    result["artifact_bytes"] += seed
    nats = loss * result["tokens"]
    for row in (result["presets"][1]["adapted"], result["adapted"]):
        row |= {"nats": nats, "bpb": nats / math.log(2) / result["bytes"]}
    if edit:
        edit(result)
    return result


_TEMPLATE = json.loads(RESULT.read_text())


def _write(folder, losses=SEEDS, edit=None):
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{number}.json" for number in range(len(losses))]
    for path, (seed, loss) in zip(paths, losses.items(), strict=True):
        path.write_text(json.dumps(_result(seed, loss, edit if path is paths[-1] else None)))
    return [str(path) for path in paths]


def test_a_tail_of_students_t_is_that_of_the_closed_forms_and_the_tables():
    for t in (-3.0, 0.0, 0.5, 2.0, 40.0):
        assert upper_tail(t, 1) == pytest.approx(0.5 - math.atan(t) / math.pi, rel=1e-9)
        assert upper_tail(t, 2) == pytest.approx(0.5 - t / 2 / math.sqrt(2 + t * t), rel=1e-9)
    for t, df, p in ((6.965, 2, 0.01), (3.747, 4, 0.01), (2.764, 10, 0.01), (31.821, 1, 0.01), (2.326, 1e5, 0.01)):
        assert upper_tail(t, df) == pytest.approx(p, rel=2e-3)


def test_a_tail_of_students_t_is_scipys():
    scipy = pytest.importorskip("scipy.stats", reason="a second opinion")
    for df in (1.2, 1.9, 3.3, 250.0):
        assert upper_tail(1.7, df) == pytest.approx(scipy.t.sf(1.7, df), rel=1e-6)


def test_welchs_test_repeats_a_published_one():
    ours = Sample.of(list(SEEDS.values()))
    assert ours.mean == pytest.approx(1.87421064, abs=5e-9)
    # the standard deviation of PR #1019's three seeds is what the stated t implies
    baseline = Sample(1.87421064 + 0.00796789, 0.000597537, 3)
    found = compare(ours, baseline)
    assert found.gain_nats == pytest.approx(0.00796789, abs=1e-8)
    assert (found.gain_nats / (found.gain_nats - 0.005)) * found.t == pytest.approx(6.8667, abs=2e-4)
    assert found.p_any == pytest.approx(0.001785, abs=2e-6)
    # significant, and more than the threshold on average, but the threshold itself is not shown
    assert found.gain_nats > 0.005 and found.p == pytest.approx(upper_tail(found.t, found.df)) and found.p > 0.01
    assert not found.is_record
    assert compare(ours, Sample(1.89, 0.0006, 3)).is_record
    assert not compare(Sample(1.89, 0.0006, 3), ours).is_record


def test_runs_make_a_table_and_a_submission(tmp_path, capsys):
    (tmp_path / "train_gpt.py").write_bytes(b"x" * 1000)
    paths = _write(tmp_path / "runs")
    arguments = ["--code", tmp_path / "train_gpt.py", "--submission", tmp_path / "s.json", "--author", "A. Author"]
    main([*paths, "--baseline", "1.89,0.0006,3", *map(str, arguments)])
    out = capsys.readouterr().out
    assert "| 7 | 1.87531400 |" in out and "| mean of 4 | 1.87421064 |" in out and out.rstrip().endswith("yes.")
    found = json.loads((tmp_path / "s.json").read_text())
    assert found["val_loss"] == pytest.approx(1.87421064, abs=5e-9) and found["author"] == "A. Author"
    assert found["val_bpb"] == pytest.approx(found["val_loss"] * 61047 / math.log(2) / 138781)
    assert found["seeds"] == sorted(SEEDS) and found["comparison"]["record"] is True
    assert found["val_loss_std"] == pytest.approx(0.0022158, abs=1e-7)
    assert (found["bytes_code"], found["bytes_total"]) == (1000, 1000 + _TEMPLATE["artifact_bytes"] + 2025)
    assert found["text_sha256"] == _TEMPLATE["text"]["sha256"] and len(found["config_sha256"]) == 64


def test_a_folder_of_one_result_is_a_run_and_one_run_has_no_spread(tmp_path, capsys):
    (tmp_path / "other.json").write_text("{}")
    (path,) = _write(tmp_path, {5: 1.9})
    main([str(tmp_path), "--submission", str(tmp_path / "s.txt")])
    assert "standard deviation" not in capsys.readouterr().out
    found = json.loads((tmp_path / "s.txt").read_text())
    assert (found["val_loss_std"], found["bytes_total"], found["comparison"]) == (None, None, None)
    with pytest.raises(InputError, match="1 run against 3: a test needs at least 2"):
        main([path, "--baseline", "1.9,0.001,3"])


def test_runs_may_be_the_baseline_where_they_score_the_same_tokens(tmp_path, capsys):
    ours = _write(tmp_path / "ours")
    theirs = _write(tmp_path / "theirs", {1: 1.8900, 2: 1.8910, 3: 1.8905})
    main([*ours, "--baseline", *theirs])
    assert "Baseline 1.89050000 ± 0.00050000 nats/token (3 runs): better by 0.01629" in capsys.readouterr().out
    for path in theirs:
        result = json.loads(Path(path).read_text())
        result["text"]["sha256"] = "f" * 64
        Path(path).write_text(json.dumps(result))
    with pytest.raises(InputError, match="score different tokens"):
        main([*ours, "--baseline", *theirs])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda r: r["plan"].update(stride=32), "plan.stride is 64 and 32"),
        (lambda r: r["text"].update(sha256="0"), "text is .* and .0"),
        (lambda r: r["model"].update(layers=7), "model.layers is 6 and 7"),
        (lambda r: r["model"]["metadata"].update(preset="other"), "metadata.preset is .demo. and .other."),
        (lambda r: r["presets"][1]["resolved_preset"].update(clamp=3.0), "preset.clamp is 5.0 and 3.0"),
        (lambda r: r["versions"].update(torch="1.0"), "versions.torch is "),
        (lambda r: r.update(device="NVIDIA H100"), "where.device is .cpu. and .NVIDIA H100."),
        (lambda r: r["config"].update(dtype="float64"), "config.dtype is .auto. and .float64."),
    ],
)
def test_runs_that_differ_in_more_than_the_seed_are_refused(tmp_path, edit, message):
    with pytest.raises(InputError, match=f"0.json and .*3.json differ in more than the seed: {message}") as caught:
        read_runs(_write(tmp_path, edit=edit))
    assert "\n" not in str(caught.value)


def test_places_and_measurements_may_differ(tmp_path):
    def edit(result):
        result["config"] |= {"artifact": "elsewhere", "json": "x", "preset": ["causal"], "device": "cpu"}
        result["model"]["metadata"] |= {"scale": 0.7, "seconds": 1.0}
        result["presets"][1]["resolved_preset"]["scale"] = 0.7

    assert [each.seed for each in read_runs(_write(tmp_path, edit=edit))] == sorted(SEEDS)


def _shares(result):
    result["presets"][1] |= {"causal": False, "why": "32 windows share one parameter"}


def _trained_on_the_stream(result):
    result["model"]["metadata"]["ttt"] = {"stream": "val.txt", "stream_sha256": result["text"]["sha256"]}


def _trained_on_much_of_the_text(result):
    result["model"]["metadata"]["ttt"] = {"stream": "val.txt", "stream_sha256": "0", "validation_overlap": 0.9}


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (_shares, "32 windows share one parameter"),
        (_trained_on_the_stream, "its weights were trained on val.txt"),
        (_trained_on_much_of_the_text, "its weights were trained on val.txt"),
    ],
)
def test_a_leak_needs_a_word_and_is_marked(tmp_path, capsys, edit, why):
    paths = _write(tmp_path, {1: 1.9}, edit)
    with pytest.raises(InputError, match=f"'causal' is not causal: {why}.*--allow-noncausal"):
        main(paths)
    main([*paths, "--allow-noncausal", "--submission", str(tmp_path / "s.json")])
    assert f"NOT causal: {why}" in capsys.readouterr().out
    assert json.loads((tmp_path / "s.json").read_text())["causal"] is False


def _damaged(folder, text):
    path = folder / "bad.json"
    path.write_text(text)
    return [str(path)]


def _too_big(result):
    result["artifact_bytes"] = 16_000_001


WRONG = {
    "nothing": (lambda t: [], "RUN ...: expected results"),
    "no such file": (lambda t: [str(t / "no.json")], "no.json: cannot be read: No such file"),
    "no JSON": (lambda t: _damaged(t, "{"), "bad.json: not a result of slotfast.eval: JSON: Invalid JSON"),
    "other JSON": (lambda t: _damaged(t, "{}"), "not a result of slotfast.eval: preset: expected a value"),
    "NaN": (
        lambda t: _damaged(t, json.dumps(_result(1, math.nan)).replace("NaN", "null")),
        "not a result .*nats: expected a number",
    ),
    "an empty folder": (lambda t: [str(t)], "0 results of slotfast.eval in this folder"),
    "a folder of two": (lambda t: [str(Path(_write(t / "f", {1: 1.0, 2: 2.0})[0]).parent)], "2 results"),
    "a run twice": (lambda t: _write(t / "f", {1: 1.0}) * 2, "are the same run: seed 1"),
    "a seed twice": (
        lambda t: [*_write(t / "f", {1: 1.0}), *_write(t / "g", {1: 1.1})],
        "are the same run: seed 1",
    ),
    "an unknown preset": (
        lambda t: [*_write(t / "f", {1: 1.0}), "--preset", "x"],
        "no preset 'x' there, only none, causal, causal-lbfgs",
    ),
    "too many bytes": (lambda t: _write(t / "f", {1: 1.0}, _too_big), "16,000,001 bytes of code and model, 1 above"),
    "a baseline of one": (
        lambda t: [*_write(t / "f", {1: 1.0, 2: 1.1}), "--baseline", "1.2,0.1,1"],
        "--baseline 1.2,0.1,1: expected MEAN,STD,N",
    ),
    "a baseline of nonsense": (
        lambda t: [*_write(t / "f", {1: 1.0, 2: 1.1}), "--baseline", "1.2.3,0.1,3"],
        "expected MEAN,STD,N",
    ),
    "a misspelt flag": (lambda t: ["x", "--base", "1"], "--base: no such flag; the nearest is --baseline"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_input_is_one_clear_line(tmp_path, arguments, message):
    with pytest.raises(InputError, match=message) as caught:
        main(arguments(tmp_path))
    assert "\n" not in str(caught.value)


def test_one_run_that_leaks_makes_all_of_them_no_record(tmp_path, capsys):
    paths = _write(tmp_path, {1: 1.7, 2: 1.71, 3: 1.72}, lambda result: result["text"].update(seen={"training": 0.5}))
    main([*paths, "--allow-noncausal", "--baseline", "1.9,0.001,3", "--submission", str(tmp_path / "s.json")])
    out, found = capsys.readouterr().out, json.loads((tmp_path / "s.json").read_text())
    assert "NOT causal: its training text shares" in out and "NO: it is not causal." in out
    assert found["causal"] is False and found["comparison"]["record"] is False


def test_what_a_run_says_of_itself_stands_in_the_record(tmp_path, capsys):
    note = "warning: the byte rule counts 12 bytes more than the pieces spell"
    paths = _write(tmp_path, {1: 1.9, 2: 1.91}, lambda result: result.update(notes=[note]))
    main([*paths, "--submission", str(tmp_path / "s.json")])
    assert note[1:] in capsys.readouterr().out
    assert json.loads((tmp_path / "s.json").read_text())["notes"] == [note]


def test_results_of_this_evaluation_are_read(tmp_path, capsys):
    import torch

    from slotfast.artifact import Artifact, write_artifact
    from slotfast.data import Tokenizer
    from slotfast.eval.__main__ import main as evaluate
    from slotfast.model import GPT, GPTConfig

    tokenizer = Tokenizer(str(resources.files("slotfast") / "demo" / "demo.model"))
    sizes = {"layers": 1, "width": 8, "heads": 1, "kv_heads": 1, "mlp_width": 8, "rope_dims": 4, "seq_len": 64}
    paths = []
    for seed in (1, 2, 3):
        torch.manual_seed(seed)
        model = GPT(GPTConfig(**sizes, vocab_size=tokenizer.vocab_size, bigram_buckets=0, value_width=0))
        write_artifact(tmp_path / f"m{seed}", Artifact.from_model(model, {"seed": seed}))
        paths.append(str(tmp_path / f"r{seed}.json"))
        evaluate(["--artifact", str(tmp_path / f"m{seed}"), "--max-tokens", "300", "--json", paths[-1]])
    capsys.readouterr()
    main([*paths, "--preset", "none"])
    out = capsys.readouterr().out
    assert [f"| {seed} |" in out for seed in (1, 2, 3)] == [True] * 3 and "Only the first 300 tokens were read" in out
    bpb = [json.loads(Path(path).read_text())["base"]["bpb"] for path in paths]
    assert f"{sum(bpb) / 3:.8f}" in out
