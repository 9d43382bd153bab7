"""Benches end with one line where they cannot run, and leave nothing behind."""

import ast
import sys
from pathlib import Path

import pytest
import torch

from bench import sweep, targets
from bench.common import need

BENCHES = sorted((Path(__file__).parents[1] / "bench").glob("*.py"))


def test_a_bench_without_its_packages_is_one_line(capsys):
    with pytest.raises(SystemExit, match="2"):
        need("no_such_package")
    assert capsys.readouterr().err == "error: this bench needs no_such_package: pip install '.[bench]'\n"
    for path in BENCHES:  # their extra is installed here, so that a plain import would not be noticed
        imported = {
            alias.name
            for node in ast.walk(ast.parse(path.read_text("utf-8")))
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        assert path.name == "conftest.py" or "pytest" not in imported, path


@pytest.mark.skipif(torch.cuda.is_available(), reason="has what it needs")
def test_a_sweep_without_a_gpu_is_refused_and_one_of_nothing_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sweep", "--kernel", "lbfgs_push", "--seconds", "0", "--jobs", "1", "--out", "s"])
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit, match="2"):
        sweep.main()
    assert "needs a GPU" in capsys.readouterr().err
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(sweep, "work", lambda kernel, most: [])
    assert sweep.main() == 1
    assert "nothing was measured" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_no_bench_writes_where_it_was_not_told_to(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["targets", "evaluate"])
    monkeypatch.setitem(targets.TARGETS, "evaluate", lambda rows, tiny: rows.take({}, dict, windows=1))
    assert targets.main() == 0
    assert "windows 1" in capsys.readouterr().out and not list(tmp_path.iterdir())
