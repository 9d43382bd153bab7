"""The campaign's own logic: limits, what a phase inherits, what is kept of one that is cut short, what is timed how."""

import json
import tarfile
import time
from pathlib import Path

import pytest
import torch

from bench import common, gpu_campaign, summary, sweep, timing
from bench.gpu_campaign import CALL_S, KILL_S, START_S, Phase

ABOUT = {"commit": "abc"}


def python(program, *, name="one", limit_s=20.0, **rest):
    return Phase(name, limit_s, ["-c", program], ["-c", program], **rest)


def packed(path):
    """The files in an archive, by their names in its folder."""
    with tarfile.open(path) as tar:
        files = {member.name: tar.extractfile(member).read().decode() for member in tar if member.isfile()}
    return {name.partition("/")[2]: text for name, text in files.items()}


@pytest.fixture
def campaign(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_campaign.signal, "signal", lambda *_: None)  # pytest's own stays

    def start(*phases, dry=False):
        code = gpu_campaign.campaign("figures", list(phases), tmp_path / "out", dry, ABOUT)
        return code, packed(tmp_path / "out" / "figures.tar.gz"), (tmp_path / "out" / "figures.txt").read_text()

    return start


@pytest.mark.parametrize("call", ["figures", "checks", "compiled"])
def test_a_call_ends_within_its_time(call):
    """By construction: even if every phase is stopped at its limit, and hangs when it is ended."""
    phases = gpu_campaign.plan()[call]
    assert START_S + sum(phase.limit_s + KILL_S for phase in phases) <= CALL_S < 600
    names = [phase.name for phase in phases]
    assert len(set(names)) == len(names) and all(name.replace("-", "").isalnum() for name in names)


def test_what_is_worth_most_comes_first():
    figures, checks = ([phase.name for phase in gpu_campaign.plan()[call]] for call in ("figures", "checks"))
    assert figures[0] == "smoke" and {"solve", "evaluate", "cross-entropy", "matmul", "attention"} <= set(figures)
    assert checks[0] == "tests" and {"memcheck", "racecheck", "bitwise", "sweep"} <= set(checks)
    files = gpu_campaign.test_files()
    assert "tests/test_kernels.py" in files and "tests/test_bundle.py" not in files
    root = Path(gpu_campaign.ROOT)
    of_kernels = ["slotfast.kernels" in (root / file).read_text() for file in files]
    assert of_kernels == sorted(of_kernels, reverse=True)
    assert all((root / "tests" / f"{stem}.py").exists() for stem in gpu_campaign.ELSEWHERE)


def test_no_test_for_the_device_interprets_in_a_process_of_its_own():
    """The interpreter of the host's Triton may not work with the host's numpy."""
    root = Path(gpu_campaign.ROOT)
    marks = ('"TRITON_INTERPRET": "1"', 'TRITON_INTERPRET="1"')
    marked = {
        path.stem for path in (root / "tests").glob("test_*.py") if any(mark in path.read_text() for mark in marks)
    }
    assert marked - {Path(__file__).stem} <= gpu_campaign.ELSEWHERE


def test_every_module_and_file_of_the_plan_exists():
    root = Path(gpu_campaign.ROOT)
    for phases in gpu_campaign.plan().values():
        for phase in phases:
            module = phase.command[phase.command.index("-m") + 1]
            assert module == "pytest" or (root / (module.replace(".", "/") + ".py")).exists(), module
            assert all((root / part).exists() for part in phase.command if part.endswith(".py")), phase


def test_packages_beside_the_checkout_are_seen(campaign, tmp_path, monkeypatch):
    beside = tmp_path / "site"
    beside.mkdir()
    (beside / "only_beside.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(beside))
    seen = python(
        "import only_beside, slotfast, os; print(slotfast.__file__, os.environ['EXTRA'])", environment={"EXTRA": "x"}
    )
    code, files, _ = campaign(seen)
    assert code == 0 and files["one.log"].strip() == str(gpu_campaign.ROOT / "slotfast" / "__init__.py") + " x"


def test_the_commit_comes_by_variable_where_there_is_no_git(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("SLOTFAST_COMMIT", raising=False)
    assert common.commit() == "unknown"
    monkeypatch.setenv("SLOTFAST_COMMIT", "0123abcd")
    assert common.commit() == common.provenance("cpu", command="x")["commit"] == "0123abcd"


def test_what_fails_costs_its_phase(campaign):
    good = python("print('fine')", name="good")
    code, files, table = campaign(python("1 / 0", name="bad"), good)
    assert code == 1 and "ZeroDivisionError" in files["bad.log"] and files["good.log"] == "fine\n"
    assert [row["went"] for row in json.loads(files["campaign.json"])["phases"]] == ["FAILED, exit code 1", "ok"]
    assert "bad" in table and "FAILED, exit code 1" in table
    assert json.loads(files["campaign.json"])["commit"] == "abc"


ROW_THEN_HANG = """
import subprocess, sys, time
open({path!r}, "w").write('{{"kernel": "a", "off": 0.5}}')
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({pid!r}, "w").write(str(child.pid))
print("before", flush=True)
time.sleep(60)
"""


def test_figures_of_a_phase_that_is_stopped_are_kept(campaign, tmp_path):
    pid = tmp_path / "pid"
    program = ROW_THEN_HANG.format(path="{out}/smoke.jsonl", pid=str(pid))
    started = time.monotonic()
    code, files, table = campaign(python(program, name="smoke", limit_s=3), python("print(2)", name="next"))
    assert code == 1 and time.monotonic() - started < 20
    assert json.loads(files["smoke.jsonl"]) == {"kernel": "a", "off": 0.5}
    assert "before" in files["smoke.log"] and files["next.log"] == "2\n"
    assert "STOPPED" in table and "smoke     1 of 1 kernels agree" in table
    state = Path(f"/proc/{pid.read_text()}/stat")  # its workers are gone too: none, or a zombie
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def test_the_archive_is_refreshed_during_a_phase(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_campaign, "REFRESH_S", 0.05)
    seen = []

    def refresh():
        gpu_campaign.pack(tmp_path / "logs", tmp_path / "a.tar.gz")
        seen.append(packed(tmp_path / "a.tar.gz")["one.log"])

    (tmp_path / "logs").mkdir()
    program = "import sys, time; print(1, flush=True); time.sleep(0.5); print(2)"
    row = gpu_campaign.run(python(program), tmp_path / "logs", False, refresh)
    assert row["went"] == "ok" and row["tail"] == ["1", "2"]
    assert "1\n" in seen


def test_an_archive_that_cannot_be_written_ends_nothing(tmp_path, monkeypatch, capsys):
    (tmp_path / "logs").mkdir()
    gpu_campaign.pack(tmp_path / "logs", tmp_path / "a.tar.gz")
    before = (tmp_path / "a.tar.gz").read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gpu_campaign.tarfile, "open", full)
    gpu_campaign.pack(tmp_path / "logs", tmp_path / "a.tar.gz")
    assert (tmp_path / "a.tar.gz").read_bytes() == before and "No space left" in capsys.readouterr().out


def test_only_an_archive_and_a_table_are_left(campaign, tmp_path):
    campaign(python("pass"))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["figures.tar.gz", "figures.txt"]


def test_a_tool_that_is_missing_skips_its_phase(campaign):
    phase = python("print('plain')", under=["no-such-tool", "--flag"])
    code, files, table = campaign(phase)
    assert code == 0 and "SKIPPED: no no-such-tool here" in table and "one.log" not in files
    assert campaign(phase, dry=True)[1]["one.log"] == "plain\n"


def test_a_dry_run_interprets_and_says_so(campaign):
    code, files, table = campaign(python("import os; print(os.environ['TRITON_INTERPRET'])"), dry=True)
    assert code == 0 and files["one.log"] == "1\n" and table.startswith("DRY RUN")


# Rows


def test_one_failed_assertion_costs_one_row(tmp_path):
    def figures(value):
        assert value < 2, "too large"
        return {"ms": value}

    rows = common.Rows(tmp_path / "rows.jsonl", ABOUT)
    for value in (1, 2, 0):
        rows.take({"of": value}, figures, value)
        assert summary.rows_of(tmp_path / "rows.jsonl") == [ABOUT, *rows.rows]  # there as soon as it exists
    assert rows.failed == 1
    assert rows.rows[::2] == [{"of": 1, "ms": 1}, {"of": 0, "ms": 0}]
    assert rows.rows[1]["of"] == 2 and rows.rows[1]["failed"].startswith("AssertionError: too large")


def test_a_line_that_is_cut_off_does_not_count(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n{"a": ')
    assert summary.rows_of(tmp_path / "x.jsonl") == [{"a": 1}] and summary.rows_of(tmp_path / "none") == []


def test_the_table_names_what_failed_and_survives_odd_rows(tmp_path):
    common.append_json(tmp_path / "solve.jsonl", {"what": "one launch"})
    common.append_json(tmp_path / "matmul.jsonl", {"of": "model", "m": 1, "failed": "AssertionError: off"})
    (tmp_path / "tests.log").write_text(
        "tests/test_a.py::test_one PASSED [ 50%]\n[gw1] [ 60%] FAILED tests/test_a.py::test_two\n"
        "[gw0] [ 70%] PASSED tests/test_b.py::test_three\nFAILED tests/test_a.py::test_two - why\n"
    )
    table = "\n".join(summary.summary(tmp_path))
    assert "solve: no summary" in table and "FAILED    matmul: model, 1: AssertionError: off" in table
    assert "tests     2 passed, 1 failed" in table


# Timing


@pytest.fixture
def gpu(monkeypatch):
    """Records how calls are timed, as if there were a GPU."""
    seen = []

    def replayed(function, calls, seconds):
        seen.append(calls)
        return [function() / 1000]

    monkeypatch.setattr(timing, "replayed", replayed)
    return seen


@pytest.mark.parametrize("us, small", [(2.0, True), (99.0, True), (101.0, False)])
def test_small_is_what_takes_the_device_under_100_us(gpu, us, small):
    assert timing.is_small(lambda: us, "cuda") is small
    assert timing.is_small(lambda: us, "cpu") is False


def test_small_calls_are_timed_by_graphs_of_200_or_more(gpu):
    for calls in (1, 200, 750):
        assert timing.measure(lambda: 3.0, "cuda", small=True, calls=calls) == [0.003]
    assert gpu == [200, 200, 750]


def test_what_no_graph_holds_is_not_small(monkeypatch):
    def refuse(*_):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(timing, "replayed", refuse)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert timing.is_small(lambda: None, "cuda") is False


# The sweep


def test_neighbours_move_block_and_warps_together():
    found = sweep.neighbours((64, 4))
    assert {(32, 2), (128, 8), (32, 4), (64, 8), (128, 2)} <= set(found) and (64, 4) not in found
    assert not [each for each in sweep.neighbours((64, 32)) if each[1] > 32]
    assert not [each for each in sweep.neighbours((1, 1)) if min(each) < 1]


def test_candidates_are_shared_out_one_by_one(monkeypatch):
    """A kernel whose candidates take long must not occupy one process while the others are idle."""
    jobs = []

    class Pool:
        def __init__(self, *_, **__): ...
        def __enter__(self):
            return self

        def __exit__(self, *_): ...
        def submit(self, function, *arguments):
            jobs.append((function.__name__, *arguments[:3]))
            return Done(function(*arguments))

    class Done:
        def __init__(self, value):
            self.value = value

        def result(self):
            return self.value

    monkeypatch.setattr(sweep, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(sweep, "candidates", lambda name, reason: [(1,), (2,), (3,)])
    monkeypatch.setattr(sweep, "compile_candidate", lambda name, reason, each, deadline: None if each == (2,) else "no")
    found = list(sweep.compiled([("a", "x"), ("b", "y")], 2, None, 0.0))
    assert found == [(item, [(2,)], {"(1,)": "no", "(3,)": "no"}) for item in (("a", "x"), ("b", "y"))]
    assert len([job for job in jobs if len(job) == 4]) == 6
