"""--resume and --plot: an evaluation that was killed ends with the bits of one that was not, or says why it cannot."""

import copy
import io
import json
import os
import signal
import subprocess
import sys
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch

from slotfast.artifact import load_artifact, write_community
from slotfast.command import checkpoint
from slotfast.data import ByteTable, Text, TokenStream
from slotfast.errors import InputError
from slotfast.eval import SlidingPass, Streaming, resume
from slotfast.eval.__main__ import main
from slotfast.model import GPT
from slotfast.slot import PRESETS, Adapter, parse_preset
from slotfast.ttt import ScoreFirst
from slotfast.windows import Plan
from slotfast.worker import Worker
from tests.arguments import changed
from tests.kills import run_and_kill
from tests.models import write_tiny

V, L, STRIDE, BOS = 64, 32, 8, 1
BYTES = ByteTable(np.arange(V) % 5, np.arange(V) % 3 == 0, np.arange(V) < 4)
DEMO = resources.files("slotfast") / "demo"
ROOT = Path(__file__).parents[1]
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


class _Killed(Exception):
    pass


def _pass(model, presets, rank, world, training, streaming=None):
    tokens = np.random.default_rng(0).integers(4, V, 700)
    tokens[[0, 100, 101, 333, 520]] = BOS
    stream = TokenStream([tokens])
    adapters = [Adapter(parse_preset(name), bos_id=BOS) for name in presets]
    training = ScoreFirst(chunk=128, lr=0.02, epochs=1) if training else None
    plan = Plan(len(stream) - 1, L, STRIDE)
    options = {"batch_windows": 8, "worker": Worker(rank=rank, world=world), "training": training}
    return SlidingPass(copy.deepcopy(model), Text(stream, BYTES, BOS), plan, adapters, streaming=streaming, **options)


def _quick(name):
    """Few steps are as good here as many, and every part of a state is carried."""
    row = PRESETS[name]
    name = f"{name}:steps=2" if row.optimizer == "adamw" else name
    return f"{name}:phases=3x3" if row.optimizer == "lbfgs" else name


@pytest.mark.parametrize(
    ("presets", "rank", "world", "training", "streaming"),
    [
        *(([name], 0, 1, False, None) for name in PRESETS if name != "none"),
        (["causal", "causal:decay=0.5", "causal-bigram", "pr1350"], 1, 2, False, None),
        (["causal", "causal-lbfgs", "pr1318"], 0, 1, True, None),
        ([], 0, 1, False, None),
        (["causal", "causal-lbfgs", "pr1217-window"], 0, 1, False, Streaming(3, 50)),
        (["causal", "causal-window"], 1, 2, False, Streaming(2, 20)),
        (["causal"], 0, 1, False, Streaming(1, 24)),
        ([], 0, 1, False, Streaming(0, 1000)),
    ],
    ids=str,
)
def test_a_pass_that_goes_on_ends_with_the_same_bits(tiny_model, tmp_path, presets, rank, world, training, streaming):
    presets = [_quick(name) if name in PRESETS else name for name in presets]
    whole, expected = _pass(tiny_model, presets, rank, world, training, streaming), []
    whole.run(expected.append)
    work = [adapter.work() for adapter in whole.adapters]
    for pieces in (1, 4, len(expected)):
        killed, scored = _pass(tiny_model, presets, rank, world, training, streaming), []

        def kill(killed=killed, scored=scored, pieces=pieces):
            if len(scored) == pieces:
                checkpoint.save(tmp_path / "c", "slotfast.eval", {}, killed.state_dict())
                raise _Killed

        with pytest.raises(_Killed):
            killed.run(scored.append, on_piece=kill)
        going = _pass(tiny_model, presets, rank, world, training, streaming)
        going.load_state_dict(checkpoint.load(tmp_path / "c", "slotfast.eval", {}))
        going.run(scored.append)
        assert [part.position[0] for part in scored] == [part.position[0] for part in expected]
        assert all(np.array_equal(mine.nll, other.nll) for mine, other in zip(scored, expected, strict=True))
        for mine, other in ((going.meter, whole.meter), (going.along, whole.along)):
            assert all(
                np.array_equal(getattr(mine, name), getattr(other, name)) for name in ("tokens", "bytes", "nats")
            )
        assert going.windows == whole.windows and [adapter.work() for adapter in going.adapters] == work


def test_pieces_of_the_stream_add_up_to_its_documents(tiny_model):
    done = _pass(tiny_model, ["causal"], 0, 1, False).run()
    assert done.along.tokens.sum() == done.meter.tokens.sum() == 699
    assert done.along.bytes.sum() == done.meter.bytes.sum()
    np.testing.assert_allclose(done.along.nats.sum(1), done.meter.nats.sum(1), rtol=1e-12)
    assert set(done.along.tokens) == {3, 4}  # of 700 tokens in 200 pieces, but for the first


# ---------------------------------------------------------------------------------------------------------------------
# the command


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with a tiny random model of the demo tokenizer, and a text of six documents."""
    folder = tmp_path_factory.mktemp("small")
    write_tiny(folder / "m")
    lines = [json.dumps({"text": f"The quick brown fox number {n} — naïve — jumps.\n" * 30}) for n in range(6)]
    (folder / "t.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def _args(small, *more):
    args = ["--artifact", small / "m", "--text", small / "t.jsonl", "--stride", "16", "--batch-windows", "4"]
    return changed([*args, "--preset", "causal", "causal-lbfgs:phases=3x3"], more)


def _result(path):
    found = json.loads(path.read_text())
    for name in ("seconds", "windows_per_second", "peak_memory_bytes", "config"):
        del found[name]
    for row in found["presets"]:
        row.pop("seconds", None)
    return found


@pytest.mark.parametrize(
    "way", [[], ["--forward", "stream", "--sinks", "2", "--block-tokens", "100"]], ids=["windows", "stream"]
)
def test_killed_at_any_point_and_started_again_gives_the_same_result(small, tmp_path, way):
    """Once, or as often as SLOTFAST_KILLS says."""
    program = "import sys; from slotfast.eval import resume, __main__; resume._SECONDS = resume._SHARE = 0; "
    outputs = ["--json", "j", "--per-token", "t.npz", *way]
    command = [sys.executable, "-c", program + "__main__.main(sys.argv[1:])"]
    subprocess.run([*command, *_args(small, *outputs)], env=ENV, cwd=tmp_path, check=True, capture_output=True)
    expected, rows = _result(tmp_path / "j"), dict(np.load(tmp_path / "t.npz"))
    command += _args(small, *outputs, "--resume", "c")
    run_and_kill(command, tmp_path / "c", longest=0.1, env=ENV, cwd=tmp_path)
    done = subprocess.run(command, env=ENV, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert "going on behind " in done.stderr
    assert _result(tmp_path / "j") == expected
    again = np.load(tmp_path / "t.npz")
    assert set(again.files) == set(rows) and all(np.array_equal(again[name], rows[name]) for name in rows)


def _interrupting(monkeypatch, counts):
    """Presses Ctrl-C in the forwards with these numbers; returns how many there were so far."""
    calls, hidden = [], GPT.hidden

    def press(model, *args, **kwargs):
        calls.append(None)
        for _ in range(counts.count(len(calls))):
            signal.raise_signal(signal.SIGINT)
        return hidden(model, *args, **kwargs)

    monkeypatch.setattr(GPT, "hidden", press)
    return calls


def test_an_interrupt_saves_the_batch_that_it_came_in(small, tmp_path, monkeypatch, capsys, interruptible):
    args = _args(small, "--json", tmp_path / "j", "--resume", tmp_path / "c")
    main(_args(small, "--json", tmp_path / "straight"))
    with monkeypatch.context() as patched:
        calls = _interrupting(patched, [3])
        with pytest.raises(KeyboardInterrupt, match="c holds what is done; the same command goes on from there"):
            main(args)
        assert len(calls) == 3 and not (tmp_path / "j").exists()
        capsys.readouterr()
        main(args)
    assert "going on behind 12 windows" in capsys.readouterr().err
    assert _result(tmp_path / "j") == _result(tmp_path / "straight")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_interrupt_takes_effect_at_once(small, tmp_path, monkeypatch, interruptible):
    _interrupting(monkeypatch, [1, 1])
    with pytest.raises(KeyboardInterrupt) as caught:
        main(_args(small, "--resume", tmp_path / "c"))
    assert caught.value.args == () and not (tmp_path / "c").exists()  # nothing is done, and nothing is promised


def test_an_interrupt_that_is_ignored_stays_so(small, tmp_path, monkeypatch, interruptible):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _interrupting(monkeypatch, [1])
    main(_args(small, "--json", tmp_path / "j", "--resume", tmp_path / "c"))
    assert (tmp_path / "j").exists() and signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_an_evaluation_that_is_done_is_not_done_again(small, tmp_path, capsys, monkeypatch):
    args = _args(small, "--json", tmp_path / "j", "--resume", tmp_path / "c")
    main(args)
    expected = _result(tmp_path / "j")
    monkeypatch.setattr("slotfast.model.GPT.hidden", None)
    main(args)
    assert _result(tmp_path / "j") == expected
    found = json.loads((tmp_path / "j").read_text())["seconds"]
    assert found["total"] >= found["forward"] > 0


OTHERS = {
    "stride": (["--stride", "8"], "made with stride 16, this run has 8"),
    "batch": (["--batch-windows", "8"], "made with batch_windows 4, this run has 8"),
    "presets": (
        ["--preset", "pr1350-window"],
        r"made with preset \['causal', 'causal-lbfgs:phases=3x3'\], this run has",
    ),
    "text": (["--max-tokens", "200"], "made with text '"),
    "rows": (["--per-token", "t.npz"], "made with per_token False, this run has True"),
    "training": (["--ttt"], "made with preset"),
    "weights": (["--weights", "int6"], "made with model '"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_evaluation_is_refused(small, tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    main(_args(small, "--resume", "c"))
    saved, _ = (tmp_path / "c").read_bytes(), capsys.readouterr()
    other, message = OTHERS[name]
    with pytest.raises(InputError, match=f"^c: {message}"):
        main(_args(small, "--resume", "c", *other))
    assert (tmp_path / "c").read_bytes() == saved and {path.name for path in tmp_path.iterdir()} == {"c"}
    assert "scoring" not in capsys.readouterr().err


def test_another_model_of_the_same_shape_is_refused(small, tmp_path):
    main(_args(small, "--resume", tmp_path / "c"))
    write_tiny(tmp_path / "m", seed=1)
    with pytest.raises(InputError, match="made with model '"):
        main(_args(small, "--artifact", tmp_path / "m", "--resume", tmp_path / "c"))


def test_the_same_weights_in_another_model_are_refused(small, tmp_path):
    write_community(tmp_path / "m.ptz", load_artifact(small / "m"))
    args = ["--artifact", tmp_path / "m.ptz", "--resume", tmp_path / "c", "--seq-len", "64", "--max-tokens", "300"]
    main(_args(small, *args, "--model-config", "pr1019,softcap=30"))
    with pytest.raises(InputError, match="made with model_config '"):
        main(_args(small, *args, "--model-config", "pr1019,softcap=20"))


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "other state", "no state", "more windows"])
def test_a_damaged_file_is_refused(small, tmp_path, damage):
    path = tmp_path / "c"
    args = _args(small, "--resume", path)
    main(args)
    whole = path.read_bytes()
    if damage in ("truncated", "empty", "text"):
        path.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"no"}[damage])
    else:
        found = torch.load(io.BytesIO(whole[32:]), weights_only=True)
        if damage == "more windows":
            found["state"]["pass"]["done"] += 1
        elif damage == "no state":
            found["state"] = {}
        else:
            found["state"]["pass"]["meter"]["nats"] = torch.zeros(1, 1)
        checkpoint.save(path, "slotfast.eval", found["run"], found["state"])
    with pytest.raises(InputError, match=f"^{path}: (cannot be read as a checkpoint|its state does not fit|is empty)"):
        main(args)


def test_a_file_that_cannot_be_read_is_not_called_damaged(tmp_path):
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        checkpoint.load(tmp_path, "slotfast.eval", {})


def test_saving_takes_a_small_share_of_the_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(resume.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(resume.checkpoint, "load", lambda *_: None)
    saver, saves = resume.Saver("c", {}, None, None), []

    def save():
        saves.append(now[0])
        now[0] += 2.0

    saver.save = save
    for _ in range(1000):
        now[0] += 0.1
        saver.save_when_due()
    assert saves[0] == pytest.approx(5.0, abs=0.2) and np.diff(saves).min() > 40


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--resume", "-"], "--resume -: expected a file"),
        (["--resume", "x", "--json", "x"], "--json and --resume: both are x"),
        (["--resume", "./x", "--json", "x"], "--json and --resume: both are ./x"),
        (["--json", "m", "--artifact", "./m"], "--artifact and --json: both are m"),
        (["--plot", "t", "--text", "t"], "--text and --plot: both are t"),
        (["--resume", "no/such/folder"], "its folder does not exist"),
        (["--plot", "no/such/folder"], "its folder does not exist"),
    ],
)
def test_what_cannot_be_written_is_refused_first(small, more, message):
    with pytest.raises(InputError, match=message):
        main(_args(small, *more))


def test_a_plot_without_matplotlib_is_refused_first(small, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"--plot: needs matplotlib: pip install 'slotfast\[plot\]'"):
        main(_args(small, "--plot", tmp_path / "p.png"))
    assert not list(tmp_path.iterdir())


def test_the_plot_is_a_picture(small, tmp_path):
    image = pytest.importorskip("matplotlib.image", reason="the extra `plot`")
    main(_args(small, "--plot", tmp_path / "p.png"))
    pixels = image.imread(tmp_path / "p.png")
    assert pixels.shape[0] > 500 and pixels.shape[1] > 800 and pixels.std() > 0.05


def test_two_ranks_save_their_own_parts(small, tmp_path):
    outputs = ["--json", "j", "--resume", "c"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, "-m", "slotfast.eval", *_args(small, *outputs)]

    def run():
        done = subprocess.run(command, env=ENV, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-4000:]

    run()
    expected = _result(tmp_path / "j")
    assert {path.name for path in tmp_path.iterdir()} == {"j", "c", "c.rank1"}
    (tmp_path / "c.rank1").unlink()  # that rank starts again
    run()
    assert _result(tmp_path / "j") == expected
