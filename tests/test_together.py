"""--resume of ranks that train a model together: killed anywhere, they go on behind one chunk, with the same bits."""

import json
import signal
import time

import numpy as np
import pytest

from slotfast.ttt import ScoreFirst
from slotfast.windows import Plan

from .kills import TIMES
from .models import write_tiny
from .test_learn_resume import _result
from .two_ranks import free_port, start_two

# Chunks of four windows, two on each rank; and of one window, so that rank 0 has none
ROWS = (
    "causal",
    "ttt-549:chunk=64,lr=0.05,steps=1,batch=1",
    "learn:chunk=32,lr=0.01,rank=2",
    "ttt-1413:chunk=16,lr=0.02,steps=1,batch=1+causal-window",
)
PROGRAM = """
import json, os, signal, sys
from slotfast.command import checkpoint
from slotfast.errors import InputError
from slotfast.eval import resume
from slotfast.eval.__main__ import main
from slotfast.ttt import ScoreFirst

resume._SECONDS = resume._SHARE = 0
rank, counts, at = os.environ["RANK"], {}, None
save, replace, train = checkpoint.save, os.replace, ScoreFirst.train


class Killed(BaseException):
    pass


def reach(event):
    counts[event] = counts.get(event, 0) + 1
    if [event, counts[event]] == at:
        if event == "train":
            return signal.raise_signal(signal.SIGINT)  # the rank is told to end, and goes on to the chunk's end
        raise Killed


def saving(path, command, run, state):
    if str(path).endswith(".next"):
        before, after = "write", "written"
    else:
        before, after = "own", "saved in learn" if state["chunks"][0] and not state["chunks"][1] else "saved"
    reach(before)
    save(path, command, run, state)
    reach(after)


def replacing(path, place):
    ours = str(path).endswith(".next")
    if ours:
        reach("rename")
    replace(path, place)
    if ours:
        reach("renamed")


def training(*arguments):
    reach("train")
    train(*arguments)


checkpoint.save, os.replace, ScoreFirst.train = saving, replacing, training
signal.signal(signal.SIGINT, signal.default_int_handler)
for case in json.loads(sys.argv[1]):
    os.chdir(case["folder"])
    os.environ["MASTER_PORT"], at = case["port"], case["at"].get(rank)
    counts.clear()
    try:
        main(case["args"])
        end = "done"
    except BaseException as error:
        end = f"{type(error).__name__}: {error}"
    with open(f"{case['name']}.{rank}", "w") as file:
        json.dump({"end": end, "trained": counts.get("train", 0)}, file)
"""


def _run(cases, folder):
    """Every case in both ranks of one pair of processes."""
    ranks = start_two(["-c", PROGRAM, json.dumps(cases)], folder)
    errors = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "".join(errors)[-4000:]


def _case(folder, args, name, at=None):
    folder.mkdir(exist_ok=True)
    return {"folder": str(folder), "args": [*args], "name": name, "at": at or {}, "port": free_port()}


def _ends(folder, name):
    return [json.loads((folder / f"{name}.{rank}").read_text()) for rank in (0, 1)]


def _same(folder, whole):
    mine, other = _result(folder / "j"), _result(whole / "j")
    for row in (*mine["presets"], *other["presets"]):
        row.pop("seconds", None)
    assert mine == other
    mine, other = np.load(folder / "t.npz"), np.load(whole / "t.npz")
    assert set(mine.files) == set(other.files) and all(np.array_equal(mine[name], other[name]) for name in mine.files)
    assert {path.name for path in folder.iterdir() if path.name[0] == "c"} <= {"c", "c.rank1"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder and the arguments of a run that nothing stopped, and how many chunks it trained on."""
    folder = tmp_path_factory.mktemp("whole")
    write_tiny(folder / "m")
    lines = [json.dumps({"text": "The quick brown fox — jumps.\n" * 5 + str(number)}) for number in range(2)]
    (folder / "text.jsonl").write_text("\n".join(lines), encoding="utf-8")
    args = ["--artifact", str(folder / "m"), "--text", str(folder / "text.jsonl"), "--stride", "16"]
    args += ["--batch-windows", "1", "--preset", *ROWS, "--forward", "windows", "--json", "j", "--per-token", "t.npz"]
    _run([_case(folder, args, "end")], folder)
    ends = _ends(folder, "end")
    assert [each["end"] for each in ends] == ["done", "done"]
    return folder, args, ends[0]["trained"]


def test_killed_at_any_place_all_ranks_go_on_behind_the_same_chunk(whole, tmp_path):
    folder, args, total = whole
    predictions = json.loads((folder / "j").read_text())["tokens"]
    first = len(ScoreFirst(64).chunks(Plan(predictions, 64, 16)))
    assert total == first + len(ScoreFirst(16).chunks(Plan(predictions, 64, 16)))
    places = {  # where either is killed, and how many chunks are kept
        "in the pass of other rows": ({"0": ["saved", 2], "1": ["saved", 3]}, 0),
        "before anything is agreed": ({"1": ["write", 1]}, 0),
        "before one rank has written": ({"0": ["write", 2]}, 1),
        "before it knows that the other has": ({"0": ["written", 2]}, 2),
        "between the ranks' renames": ({"0": ["renamed", 2], "1": ["rename", 2]}, 2),
        "the other way round": ({"0": ["rename", 3], "1": ["renamed", 3]}, 3),
        "both before their renames": ({"0": ["rename", 3], "1": ["rename", 3]}, 3),
        "in a row that learns by itself": ({"0": ["saved in learn", 3], "1": ["saved in learn", 1]}, first),
        "in the second row that they train": ({"1": ["written", first + 4]}, first + 4),
        "at the end": ({"0": ["renamed", total]}, total),
    }
    cases = []
    for name, (at, _) in places.items():
        cases.append(_case(tmp_path / name, [*args, "--resume", "c"], "killed", at))
        cases.append(_case(tmp_path / name, [*args, "--resume", "c"], "end"))
    _run(cases, tmp_path)
    for name, (at, kept) in places.items():
        for rank, each in enumerate(_ends(tmp_path / name, "killed")):
            lost = f"InputError: rank {rank}: another process, which it waited for, has ended"
            assert each["end"].startswith("Killed" if str(rank) in at else lost), (name, each)
        ends = _ends(tmp_path / name, "end")
        assert ends == [{"end": "done", "trained": total - kept}] * 2, name
        _same(tmp_path / name, folder)


def test_an_interrupt_of_one_rank_ends_all_behind_the_chunk(whole, tmp_path):
    folder, args, total = whole
    again = [*args, "--resume", "c"]
    _run([_case(tmp_path, again, "killed", {"1": ["train", 3]}), _case(tmp_path, again, "end")], tmp_path)
    for each, path in zip(_ends(tmp_path, "killed"), ("c", "c.rank1"), strict=True):
        assert each["end"] == f"KeyboardInterrupt: {path} holds what is done; the same command goes on from there"
        assert each["trained"] == 3
    assert _ends(tmp_path, "end") == [{"end": "done", "trained": total - 3}] * 2
    _same(tmp_path, folder)


def test_files_that_do_not_go_together_are_refused_by_every_rank(whole, tmp_path):
    _, args, total = whole
    again = [*args, "--resume", "c"]
    _run([_case(tmp_path, again, "killed", {"0": ["renamed", 3], "1": ["renamed", 3]})], tmp_path)
    (tmp_path / "c.rank1").rename(tmp_path / "kept")
    _run([_case(tmp_path, again, "lost")], tmp_path)
    said = "InputError: c behind 3 chunks, c.rank1 behind 0 chunks: expected files behind the same one; without any, "
    assert _ends(tmp_path, "lost") == [{"end": said + "the run starts anew", "trained": 0}] * 2
    (tmp_path / "c.rank1").write_bytes(b"no")
    _run([_case(tmp_path, again, "damaged")], tmp_path)
    said = "InputError: c.rank1: cannot be read as a checkpoint: damaged, or another kind of file"
    assert _ends(tmp_path, "damaged") == [{"end": said, "trained": 0}] * 2
    (tmp_path / "kept").rename(tmp_path / "c.rank1")
    _run([_case(tmp_path, again, "end"), _case(tmp_path, again, "done")], tmp_path)
    assert _ends(tmp_path, "end") == [{"end": "done", "trained": total - 3}] * 2
    assert _ends(tmp_path, "done") == [{"end": "done", "trained": 0}] * 2


def _saved_since(begun, path):
    return path.exists() and path.stat().st_mtime > begun


def test_killed_at_any_moment_and_started_again_they_give_the_same_result(whole, tmp_path):
    """Both at once, with nothing left to do for either; once, or as often as SLOTFAST_KILLS says."""
    folder, args, _ = whole
    program = "import sys; from slotfast.eval import resume, __main__; resume._SECONDS = resume._SHARE = 0; "
    command, random = ["-c", program + "__main__.main(sys.argv[1:])", *args, "--resume", "c"], np.random.default_rng()
    for _ in range(TIMES):
        begun, ranks = time.time(), start_two(command, tmp_path, MASTER_PORT=free_port())
        while ranks[0].poll() is None and not all(_saved_since(begun, tmp_path / name) for name in ("c", "c.rank1")):
            time.sleep(0.002)
        time.sleep(random.uniform(0, 2))
        for rank in ranks:
            rank.send_signal(signal.SIGKILL)
            rank.communicate(timeout=60)
    ranks = start_two(command, tmp_path, MASTER_PORT=free_port())
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0] and all("going on behind" in error for error in errors)
    _same(tmp_path, folder)
