"""Predictions follow from their constants, and refuse tables that they do not know."""

import json
from dataclasses import replace

import pytest

from bench import predict
from bench.ledger import Ledger
from bench.predict import GPUS, Row, check_table, forward, launch, read_table, slowest, solve, times

H100 = GPUS["H100"]
ROW = Row(per_element=10.0, programs=4, warps=4, elements=4096)


def test_an_example_computed_by_hand():
    """2^30 elements of two bytes at ten instructions each, 4 programs of 4 warps, 4096 elements a trip."""
    found = times(ROW, 2**30, 2**31, H100)
    assert found["issue"] == pytest.approx(2**30 * 10 / (128 * 132 * 1.83e9) * 1e6)  # 347.3
    assert found["bytes"] == pytest.approx(2**31 / 3.35e12 * 1e6)  # 641.0
    # 2^18 trips over 528 programs, each a latency of 800 and 320 instructions
    assert found["latency"] == pytest.approx(2**18 / 528 * (800 + 320) / 1.83e9 * 1e6)
    assert round(found["issue"], 1) == 347.3 and round(found["bytes"], 1) == 641.0
    assert slowest(found)["bound"] == "bytes" and slowest(found)["us"] == round(found["bytes"], 4)
    ahead = times(replace(ROW, ahead=True), 2**30, 2**31, H100)
    assert ahead["latency"] == pytest.approx(2**18 / 528 * 800 / 1.83e9 * 1e6)


@pytest.mark.parametrize("ahead", [False, True])
def test_more_work_is_never_faster(ahead):
    row = replace(ROW, ahead=ahead)
    one = times(row, 1e9, 2e9, H100)
    for worse in (
        times(replace(row, per_element=15.0), 1e9, 2e9, H100),
        times(row, 1e9, 3e9, H100),
        times(row, 2e9, 2e9, H100),
        times(replace(row, programs=2), 1e9, 2e9, H100),
    ):
        assert worse != one and all(worse[name] >= us for name, us in one.items())
    assert times(row, 1e9, 2e9, GPUS["H200"])["bytes"] < one["bytes"]
    assert solve(H100, 4, 8, 1)["us"] > solve(H100, 2, 8, 1)["us"]
    assert not solve(H100, 4, 8, 1)["fits_l2"] and solve(H100, 2, 8, 1)["fits_l2"]
    one, crowded = solve(H100, 2, 8, 1), solve(H100, 2, 8, 1, shared=120_000)
    assert one["p_fits_l1"] and not crowded["p_fits_l1"] and one["us"] < crowded["us"] == one["worst_us"]


def test_a_forward_is_its_products_and_its_bytes():
    ledger = Ledger()
    ledger.add("MLP.fc", "linear", read=10**6, written=10**6, flops=10**12)
    products = 10**12 / (989.4e12 * 0.6) * 1e6
    assert forward(ledger, H100) == pytest.approx(products)
    ledger.add("MLP.forward", "square", read=10**9, written=10**9, flops=10**9)
    assert forward(ledger, H100) == pytest.approx(products + 2e9 / (3.35e12 * 0.9) * 1e6)
    ledger.add("rotate", "cat", read=0, written=0, flops=0, calls=10**5)
    assert forward(ledger, H100) == 2.0 * (10**5 + 2)


def test_tables_that_it_does_not_know_are_refused(monkeypatch, capsys):
    with pytest.raises(ValueError, match="no static table is committed"):
        read_table("0.0.1")
    with pytest.raises(ValueError, match="expected target sm_90, got 'sm_80'"):
        check_table({"target": "sm_80", "rows": []})
    with pytest.raises(ValueError, match="lacks barriers"):
        row = dict.fromkeys(("kernel", "case", "function", "types", "per_element", "programs", "registers", "shared"))
        check_table({"target": "sm_90", "rows": [row]})
    with pytest.raises(ValueError, match="no row rate_scan"):
        launch({}, "rate_scan", "production", "fp64")
    monkeypatch.setattr("sys.argv", ["predict", "--triton", "0.0.1"])
    assert predict.main() == 2 and capsys.readouterr().err.startswith("error: Triton 0.0.1")


@pytest.mark.parametrize("version", ["3.6.0", "3.9.0"])
def test_every_target_has_a_prediction(version):
    pytest.importorskip("triton", reason="launch parameters come from triton")
    found = predict.predict(read_table(version), H100)
    assert {name[:2] for name in found} == {"P1", "P3", "P5", "P6", "P7", "P9"}
    assert all(one["us"] > 0 and one["target"] for one in found.values())
    row, _ = launch(read_table(version), "bias_cross_entropy_grad", "V 1024 bfloat16", "bf16")
    assert row.ahead and row.per_element <= 10 and row.programs == 4
    row, _ = launch(read_table(version), "linear_cross_entropy", "V 1024", "bf16")
    assert row.programs == 2  # which the prediction of losses takes for granted
    one = found["P7 losses of 32 windows of 2048, V 1024"]
    assert one["us"] < one["as_written_us"] / 3 and one["mb"] < 100 < one["in_memory_mb"] < one["as_written_mb"]
    stored = json.loads(predict.COMMITTED.read_text())
    assert stored["kind"] == "predicted, not measured" and stored["H100"].keys() == found.keys()
