"""The command: results, files, exit codes, and one clear line for every kind of wrong input."""

import json
import math
import os
import shlex
import subprocess
import sys
import threading
from importlib import resources

import numpy as np
import pytest

from slotfast.command.run import run_command
from slotfast.data import Tokenizer, write_shard
from slotfast.errors import InputError
from slotfast.eval.__main__ import main
from tests.arguments import changed
from tests.models import write_tiny

DEMO = resources.files("slotfast") / "demo"
TEXT = "The quick brown fox — naïve, 日本 — jumps.\n" * 12
KEYS = (
    "preset resolved_preset causal compliance tokens bytes windows base adapted presets seconds windows_per_second "
    "projected_seconds_8gpu peak_memory_bytes artifact_bytes backend device config versions"
).split()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with a tiny random model of the demo tokenizer, and a text of three documents."""
    folder = tmp_path_factory.mktemp("small")
    write_tiny(folder / "m")
    lines = [json.dumps({"text": TEXT + str(number)}) for number in range(3)]
    (folder / "t.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def _args(small, *more):
    return changed(["--artifact", small / "m", "--text", small / "t.jsonl", "--stride", "16"], more)


def test_json_has_the_stable_keys(small, capsys):
    main(_args(small, "--preset", "none", "causal", "pr1350", "--allow-noncausal", "--json", "-", "--budget", "600"))
    found = json.loads(capsys.readouterr().out)
    assert set(KEYS) <= set(found)
    assert [row["preset"] for row in found["presets"]] == ["none", "causal", "pr1350"]
    assert [row["causal"] for row in found["presets"]] == [True, True, False]
    assert found["preset"] == "causal" and found["adapted"]["bpb"] == found["presets"][1]["adapted"]["bpb"]
    assert found["compliance"] == {"c1": True, "c2": True, "c3": True, "c4": True}
    assert found["bytes"] == 3 * len((TEXT + "0").encode()) == found["text"]["raw"] and found["text"]["exact"]
    assert found["base"]["bpb"] == pytest.approx(found["base"]["nats"] / math.log(2) / found["bytes"])
    assert found["resolved_preset"]["scale"] == 0.7 and found["calibrated"] is False
    assert set(found["seconds"]) == {"load", "forward", "adapt", "score", "total"}
    assert found["projected_seconds_8gpu"] is None or found["device"] != "cpu"
    assert found["budget"]["within"] is True
    work = found["presets"][2]["work"]
    assert sum(work["iterations"].values()) == sum(work["status"].values()) == -(-found["windows"] // 32)
    assert max(map(int, work["iterations"])) <= 25 and "work" not in found["presets"][1]


def test_table_says_what_leaks_and_what_is_uncalibrated(small, capsys):
    main(_args(small, "--preset", "pr1350:clamp=3", "causal", "--allow-noncausal"))
    out = capsys.readouterr().out
    assert "pr1350:clamp=3" in out and "NO: 32 windows share one parameter" in out and "uncalibrated" in out


def test_per_token_rows_add_up(small, tmp_path, capsys):
    path = tmp_path / "t.npz"
    main(_args(small, "--preset", "causal", "causal-window", "--per-token", str(path), "--json", str(tmp_path / "j")))
    found, rows = json.loads((tmp_path / "j").read_text()), np.load(path)
    assert rows["base_nll"].dtype == rows["adapted_nll"].dtype == np.float32
    np.testing.assert_array_equal(rows["position"], np.arange(1, found["tokens"] + 1))
    assert rows["bytes"].sum() == found["bytes"]
    assert rows["base_nll"].sum(dtype=np.float64) == pytest.approx(found["base"]["nats"], rel=1e-9)
    assert rows["adapted_nll"].sum(dtype=np.float64) == pytest.approx(found["adapted"]["nats"], rel=1e-9)
    last = found["presets"][2]["adapted"]["nats"]
    assert rows["adapted_nll:causal-window"].sum(dtype=np.float64) == pytest.approx(last, rel=1e-9)
    assert {p.name for p in tmp_path.iterdir()} == {"t.npz", "j"}


def test_shards_score_like_their_text(small, tmp_path, capsys):
    tokenizer = Tokenizer(str(DEMO / "demo.model"))
    tokens, _ = tokenizer.encode_documents([TEXT + str(number) for number in range(3)])
    for number, part in enumerate(np.array_split(tokens, 3)):
        write_shard(tmp_path / f"fineweb_val_{number:06}.bin", part)
    main(_args(small, "--json", "-", "--preset", "none"))
    text = json.loads(capsys.readouterr().out)
    shards = ["--artifact", str(small / "m"), "--stride", "16", "--preset", "none", "--json", "-"]
    main([*shards, "--tokens", str(tmp_path / "fineweb_val_*.bin")])
    found = json.loads(capsys.readouterr().out)
    assert found["base"] == text["base"] and found["bytes"] == text["bytes"]
    assert found["text"]["sha256"] == text["text"]["sha256"]


def test_packed_weights_score_like_dequantised_ones(small, capsys):
    found = []
    for weights in ("dequantized", "int6"):
        main(_args(small, "--weights", weights, "--preset", "causal", "--json", "-"))
        found.append(json.loads(capsys.readouterr().out))
    for row in (0, 1):
        dense, packed = (f["presets"][row]["adapted"]["nats"] for f in found)
        assert packed == pytest.approx(dense, rel=1e-6)


def test_training_on_what_was_scored_composes_with_presets(small, capsys):
    """--ttt adds the row that its numbers spell, and it under every other row; untrained rows stay what they are."""
    main(_args(small, "--preset", "none", "causal", "--json", "-"))
    plain = json.loads(capsys.readouterr().out)["presets"]
    main(_args(small, "--ttt", "--ttt-chunk", "200", "--ttt-lr", "0.1", "--preset", "none", "causal", "--json", "-"))
    found = json.loads(capsys.readouterr().out)
    row = "ttt-549:chunk=200,lr=0.1"
    assert [each["preset"] for each in found["presets"]] == ["none", "causal", row, f"{row}+causal"]
    none, causal, trained, both = [each["adapted"]["nats"] for each in found["presets"]]
    assert [none, causal] == [each["adapted"]["nats"] for each in plain]
    assert trained < none - 1 and both != trained and found["config"]["ttt_chunk"] == 200
    with pytest.raises(InputError, match="'ttt-549': with --weights int6: packed weights pass no gradients"):
        main(_args(small, "--ttt", "--weights", "int6"))


def test_data_path_variable_names_the_shards(small, tmp_path, capsys, monkeypatch):
    write_shard(tmp_path / "fineweb_val_000000.bin", [1, 400, 401, 402])
    monkeypatch.setenv("DATA_PATH", str(tmp_path))
    main(["--artifact", str(small / "m"), "--stride", "16", "--preset", "none", "--json", "-"])
    assert json.loads(capsys.readouterr().out)["tokens"] == 3


def test_slot_enabled_leaves_plain_windows(small, capsys, monkeypatch):
    monkeypatch.setenv("SLOT_ENABLED", "0")
    main(_args(small, "--json", "-"))
    assert [row["preset"] for row in json.loads(capsys.readouterr().out)["presets"]] == ["none"]


def test_lists(capsys):
    main(["--list-presets"])
    assert "pr1350-window" in capsys.readouterr().out
    main(["--show-preset", "pr1350:ridge=2"])
    out = capsys.readouterr().out
    assert "NOT causal (fails C1, C2, C3): 32 windows share" in out and "ridge           2.0" in out
    assert "C1: only earlier tokens matter; C2: " in out
    main(["--show-config"])
    assert "--stride" in capsys.readouterr().out


def _broken_artifact(small, tmp_path):
    (tmp_path / "m").write_bytes((small / "m").read_bytes()[:-3])
    return ["--artifact", str(tmp_path / "m")]


def _foreign_tokens(small, tmp_path):
    write_shard(tmp_path / "a.bin", [1, 2, 5000])
    return ["--artifact", str(small / "m"), "--tokens", str(tmp_path / "a.bin")]


def _no_bytes(small, tmp_path):
    write_shard(tmp_path / "a.bin", [1, 1, 1, 1])
    return ["--artifact", str(small / "m"), "--tokens", str(tmp_path / "a.bin"), "--preset", "none"]


WRONG = {
    "a leaking preset": (
        lambda s, t: _args(s, "--preset", "pr1350"),
        "not causal: 32 windows share .* --allow-noncausal",
    ),
    "an unknown preset": (lambda s, t: _args(s, "--preset", "casual"), "the nearest is causal"),
    "a preset twice": (lambda s, t: _args(s, "--preset", "causal", "causal"), "given twice"),
    "a preset twice, in two spellings": (
        lambda s, t: _args(s, "--preset", "causal:decay=0.5,clamp=4", "causal:clamp=4.0,decay=.5"),
        "'causal:clamp=4.0,decay=.5': given twice, as 'causal:decay=0.5,clamp=4' too",
    ),
    "a learning preset twice, in two spellings": (
        lambda s, t: _args(s, "--preset", "learn:lr=1e-4,rank=8+causal", "learn:rank=8,lr=0.0001+causal"),
        "given twice, as 'learn:lr=1e-4,rank=8[+]causal' too",
    ),
    "no options behind a colon": (lambda s, t: _args(s, "--preset", "causal:"), "'' is not of the form key=value"),
    "no options of what learns": (lambda s, t: _args(s, "--preset", "learn:"), "'' is not of the form key=value"),
    "no options on top": (lambda s, t: _args(s, "--preset", "learn+causal:"), "'' is not of the form key=value"),
    "a comma too many": (lambda s, t: _args(s, "--preset", "causal:clamp=4,"), "'' is not of the form key=value"),
    "a key twice": (lambda s, t: _args(s, "--preset", "causal:clamp=4,clamp=5"), "'clamp' is given twice"),
    "a misspelt flag": (lambda s, t: _args(s, "--per-tokens", "x"), "the nearest is --per-token"),
    "no such text": (lambda s, t: ["--text", str(t / "no.txt")], "no such file"),
    "no such shards": (lambda s, t: ["--tokens", str(t / "*.bin")], "--tokens .*: no such file"),
    "no shards in the folder": (lambda s, t: ["--data-path", str(t)], "--data-path .*fineweb_val_.*: no such file"),
    "text and shards": (lambda s, t: _args(s, "--tokens", "x"), "give one of them"),
    "no such artifact": (lambda s, t: ["--artifact", str(t / "no")], "cannot be read: No such file"),
    "a truncated artifact": (_broken_artifact, "truncated or damaged"),
    "tokens of another vocabulary": (_foreign_tokens, "token id 5000 at position 2"),
    "a stride beyond the window": (lambda s, t: _args(s, "--stride", "65"), "stride 65: expected 1 to"),
    "a batch that splits a preset's": (
        lambda s, t: _args(s, "--preset", "pr1350", "--allow-noncausal", "--batch-windows", "31"),
        "expected a multiple of 32",
    ),
    "an unknown device": (lambda s, t: _args(s, "--device", "abacus"), "--device abacus"),
    "nowhere to write": (
        lambda s, t: _args(s, "--json", str(t / "no" / "x.json")),
        "does not exist or cannot be written",
    ),
    "nothing to score": (lambda s, t: ["--text", os.devnull], "/dev/null: holds no text$"),
    "one token": (lambda s, t: _args(s, "--max-tokens", "1"), "--max-tokens"),
    "a name that is too long": (
        lambda s, t: _args(s, "--json", str(t / ("x" * 250))),
        "x: cannot be written: File name",
    ),
    "progress under no name": (
        lambda s, t: _args(s, "--resume", str(t / ("x" * 300))),
        "x: cannot be written: File name",
    ),
    "a device of another kind": (lambda s, t: _args(s, "--device", "meta"), "--device meta: expected auto, cpu, cuda"),
    "one file for two results": (
        lambda s, t: _args(s, "--json", str(t / "x"), "--per-token", str(t / "x")),
        "both are",
    ),
    "rows to standard output": (lambda s, t: _args(s, "--per-token", "-"), "expected a file"),
    "a folder to write to": (lambda s, t: _args(s, "--json", str(t)), "is a folder"),
    "an empty path": (lambda s, t: _args(s, "--json", ""), "--json '': expected at least 1 character"),
    "a batch of a billion": (lambda s, t: _args(s, "--batch-windows", "1000000000"), "expected at most 65536"),
    "documents of no bytes": (_no_bytes, "stand for no bytes"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_input_is_one_clear_line(small, tmp_path, arguments, message):
    with pytest.raises(InputError, match=message) as caught:
        main(arguments(small, tmp_path))
    assert "\n" not in str(caught.value)


def test_triton_without_a_gpu_is_refused_not_replaced(small, capsys):
    with pytest.raises(InputError, match="--backend triton: needs a GPU"):
        main(_args(small, "--backend", "triton", "--device", "cpu"))
    assert capsys.readouterr().err == ""  # before it says that anything is scored


def test_another_tokenizer_is_refused(small, tmp_path):
    from slotfast.train import train_tokenizer

    (tmp_path / "t.model").write_bytes(train_tokenizer([TEXT * 20], 300))
    with pytest.raises(InputError, match="300 pieces.*the model needs 1024 pieces.*--tokenizer"):
        main(_args(small, "--tokenizer", str(tmp_path / "t.model")))


def test_exit_codes_and_no_traceback(small, tmp_path):
    def command(*argv):
        return subprocess.run(
            [sys.executable, "-m", "slotfast.eval", *argv], capture_output=True, text=True, cwd=tmp_path, env=ENV
        )

    good = command(*_args(small, "--preset", "none", "--json", "-"))
    assert good.returncode == 0 and json.loads(good.stdout)
    bad = command(*_args(small, "--preset", "pr1350", "--json", "r.json"))
    assert bad.returncode == 2 and bad.stdout == "" and list(tmp_path.iterdir()) == []
    assert bad.stderr.startswith("error: preset 'pr1350' is not causal") and bad.stderr.count("\n") == 1


ENV = {**os.environ, "PYTHONPATH": str(resources.files("slotfast").joinpath(".."))}


@pytest.mark.parametrize(
    "way", [["windows"], ["stream", "--sinks", "2", "--block-tokens", "48"]], ids=["windows", "stream"]
)
def test_torchrun_sums_equal_one_process(small, tmp_path, way):
    arguments = _args(small, "--batch-windows", "4", "--preset", "none", "causal", "--forward", *way)
    arguments += ["--json", "r.json", "--per-token", "t.npz"]
    results = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        launcher = (
            ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
        )
        command = [sys.executable, *launcher, "-m", "slotfast.eval", *arguments]
        environment = {**ENV, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        results.append((json.loads((folder / "r.json").read_text()), np.load(folder / "t.npz")))
    (one, one_rows), (two, two_rows) = results
    for key in ("tokens", "bytes", "windows"):
        assert one[key] == two[key]
    for row in (0, 1):
        assert two["presets"][row]["adapted"]["nats"] == pytest.approx(one["presets"][row]["adapted"]["nats"], rel=1e-9)
    np.testing.assert_array_equal(one_rows["position"], two_rows["position"])
    np.testing.assert_allclose(one_rows["adapted_nll"], two_rows["adapted_nll"], atol=1e-5)


@pytest.mark.parametrize(
    ("way", "counts"),
    # `causal` remembers up to 120,000 tokens, and windows take eight times as long
    [
        (["stream", "--sinks", "2", "--preset", "causal"], (40_000, 160_000)),
        (["windows", "--preset", "none"], (10_000, 40_000)),
    ],
    ids=["stream", "windows"],
)
def test_memory_does_not_grow_with_the_stream(small, tmp_path, way, counts):
    """Peak of a run over 4 times the tokens; shards are memory-mapped, so only the page cache may grow."""
    tokens = np.random.default_rng(0).integers(4, 1024, counts[-1])
    tokens[::900] = 1
    options = ["--artifact", str(small / "m"), "--tokens", str(tmp_path / "a.bin"), "--json", "-"]
    options += ["--stride", "64", "--batch-windows", "32", "--forward", *way]
    peaks = []
    for count in counts:
        write_shard(tmp_path / "a.bin", tokens[:count])
        done = subprocess.run(
            [sys.executable, "-m", "slotfast.eval", *options], check=True, capture_output=True, env=ENV
        )
        peaks.append(json.loads(done.stdout)["peak_memory_bytes"])
    assert peaks[1] - peaks[0] < 40 << 20


@pytest.mark.parametrize("variables", [{"WORLD_SIZE": "2"}, {"WORLD_SIZE": "x", "RANK": "0"}])
def test_half_an_environment_of_ranks_is_refused(small, monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="several processes need all of these"):
        main(_args(small, "--preset", "none"))


def test_a_rank_without_others_is_the_only_one(small, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    main(_args(small, "--preset", "none", "--json", "-"))
    assert json.loads(capsys.readouterr().out)["ranks"] == 1


def test_a_pipe_stays_a_pipe(small, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    read = []
    thread = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    thread.start()
    main(_args(small, "--preset", "none", "--json", str(tmp_path / "pipe")))
    thread.join()
    assert json.loads(read[0])["windows"] > 0 and not (tmp_path / "pipe").is_file()


def _start(arguments, redirect="", **variables):
    command = f"{shlex.join([sys.executable, '-m', 'slotfast.eval', *arguments])} {redirect}"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, shell=True, text=True, env={**ENV, "OMP_NUM_THREADS": "1", **variables}, **pipes)


def test_a_finished_evaluation_is_not_lost(small, tmp_path):
    """Whatever fails at the end, the table comes, and every other file."""
    arguments = _args(small, "--preset", "none", "causal", "--max-tokens", "200")
    rows, result = str(tmp_path / "r.npz"), str(tmp_path / "r.json")
    running = {
        "a full disk": _start([*arguments, "--json", "/dev/full", "--per-token", rows]),
        "full output": _start([*arguments, "--json", result], ">/dev/full"),
        "closed output": _start(arguments, ">&-"),
        "all closed": _start([*arguments, "--json", str(tmp_path / "closed.json")], ">&- 2>&-"),
        "nobody reads": _start([*arguments, "--json", str(tmp_path / "pipe.json")], "| true"),
        "no such letter": _start(arguments, PYTHONIOENCODING="ascii"),
    }
    done = {name: (*process.communicate(timeout=120), process.returncode) for name, process in running.items()}
    out, err, code = done["a full disk"]
    assert "± s.e." in out and err.splitlines()[-1] == "error: /dev/full: cannot be written: No space left on device"
    assert code == 2 and len(np.load(rows)["position"]) == 199
    out, err, code = done["full output"]
    assert (out, code) == ("", 2) and "± s.e." in err and json.loads((tmp_path / "r.json").read_text())["tokens"] == 199
    assert err.splitlines()[-1] == "error: standard output cannot be written: No space left on device"
    out, err, code = done["closed output"]
    assert (out, code) == ("", 0) and "± s.e." in err
    assert done["all closed"] == ("", "", 0) and json.loads((tmp_path / "closed.json").read_text())["tokens"] == 199
    assert json.loads((tmp_path / "pipe.json").read_text())["tokens"] == 199
    out, err, code = done["no such letter"]
    assert code == 0 and "? s.e." in out and "causal" in out


def test_a_file_is_not_called_standard_output(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: (tmp_path / "no").read_text())
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'no'}: No such file or directory\n"


def test_output_that_cannot_be_written(small):
    command = [sys.executable, "-m", "slotfast.eval", "--list-presets"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=ENV)
    assert done.returncode == 2 and done.stderr == "error: standard output cannot be written: No space left on device\n"
    closed = subprocess.run(
        f"{sys.executable} -m slotfast.eval --list-presets | true", shell=True, env=ENV, stderr=subprocess.PIPE
    )
    assert closed.stderr == b""
