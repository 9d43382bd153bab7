"""What the compiler makes of the kernels, held to the committed table; and that the gates can fail.

Compiles in a subprocess: Triton interprets or compiles, per process.
"""

import json
from pathlib import Path

import pytest

from slotfast.kernels import specs

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from bench import static_report

    return static_report


def test_quick_check(compiling, tmp_path):
    """One production shape of each kernel: no spills, nothing worse than committed, compiles for another target too."""
    import triton

    printed = compiling("-m", "bench.static_report", "--quick", "--check", "--json", tmp_path / "rows.json")
    found = json.loads((tmp_path / "rows.json").read_text())
    assert found["triton"] == triton.__version__
    for spec in specs():
        case = next(case for case in spec.cases if case.production)
        rows = [row for row in found["rows"] if row["kernel"] == spec.name and row["case"] == case.reason]
        compiled = [row["function"] for row in rows]
        assert set(compiled) == {c.kernel.__name__ for c in spec.compilations(**case.shape)}
        assert not [row for row in rows if max(row["stack"], row["local"]) > row["accepted_spill"]]
    if "SKIPPED" in printed:
        pytest.skip(next(line for line in printed.splitlines() if "SKIPPED" in line))
    assert "none worse than committed" in printed


ROW = {
    "kernel": "k", "case": "c", "function": "f", "types": "bf16", "registers": 100, "stack": 0, "local": 0,
    "shared": 2048, "programs": 4, "code": 8000, "per_element": 6.0, "barriers": 2, "matrix": 8, "accepted_spill": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    "worse",
    [
        {"registers": 110},
        {"shared": 4096},
        {"code": 9500},
        {"per_element": 6.3},
        {"per_element": None},
        {"barriers": 3},
        {"programs": 2},
        {"matrix": 0},
        {"case": "another"},
    ],
    ids=str,
)
def test_a_regression_fails(report, worse):
    assert not report.compare([ROW], [ROW], whole=True)
    assert report.compare([{**ROW, **worse}], [ROW], whole=False)


def test_small_changes_and_gains_pass(report):
    better = {
        "registers": 104,
        "shared": 0,
        "code": 8100,
        "per_element": 5.0,
        "barriers": 0,
        "programs": 5,
        "matrix": 9,
    }
    assert not report.compare([{**ROW, **better}], [ROW], whole=True)


def test_launches_that_are_gone_are_noticed(report):
    assert not report.compare([], [ROW], whole=False)
    assert report.compare([], [ROW], whole=True)


@pytest.mark.parametrize("spill", ["stack", "local"])
def test_a_spill_fails(report, spill):
    assert not report.spills([ROW])
    assert not report.spills([{**ROW, spill: 16, "accepted_spill": 16}])
    assert report.spills([{**ROW, spill: 8}])
    assert not report.spills([{**ROW, spill: 8}], [{**ROW, spill: 8}])
    assert report.spills([{**ROW, spill: 16}], [{**ROW, spill: 8}])


def test_hot_loop_is_the_longest_of_the_deepest(report):
    """Two loops in a loop, a longer one outside, a rare case's way back, the branch to itself that pads the code."""
    from bench.compile import _parse

    lines = [
        "    MOV R1, c[0x0][0x28]",
        ".L_x_0:",
        "    IADD3 R0, R0, 1, RZ",
        ".L_x_5:",
        "    @!P3 BRA `(.L_x_6)",
        ".L_x_1:",
        *["    FFMA R2, R3, R4, R2"] * 8,
        "    @P0 BRA `(.L_x_1)",
        ".L_x_2:",
        "    BAR.SYNC.DEFER_BLOCKING 0x0",
        *["    MUFU.EX2 R2, R2"] * 10,
        "    @!P1 BRA `(.L_x_2)",
        "    @P2 BRA `(.L_x_0)",
        ".L_x_4:",
        *["    FADD R2, R2, R2"] * 20,
        "    @P0 BRA `(.L_x_4)",
        "    EXIT",
        ".L_x_6:",
        *["    FMUL R2, R2, R2"] * 9,
        "    BRA `(.L_x_5)",
        ".L_x_3:",
        "    BRA `(.L_x_3)",
    ]
    count, listing = 0, ""
    for line in lines:
        listing += line + "\n" if line.startswith(".") else f"        /*{count:04x}*/ {line} ;\n"
        count += 16 * (not line.startswith("."))
    opcodes, (begin, end) = _parse(listing)
    assert len(opcodes) == 58 and "BRA" in opcodes and "EXIT" in opcodes
    assert opcodes[begin] == "BAR.SYNC.DEFER_BLOCKING" and end - begin == 12
    assert _parse("        /*0000*/    EXIT ;\n") == (["EXIT"], (0, 0))


@pytest.mark.parametrize("version", ["3.6.0", "3.9.0"])
def test_committed_tables_are_about_what_exists(report, version):
    """Every production launch has its row, so that a kernel without figures cannot pass unnoticed."""
    pytest.importorskip("triton", reason="launch parameters come from triton.next_power_of_2")
    committed = json.loads(report.table_of(version).read_text())
    assert committed["target"] == "sm_90" and committed["triton"] == version
    wanted = {(name, reason) for name, reason, _ in report.work()}
    found = {(row["kernel"], row["case"]) for row in committed["rows"]}
    assert wanted == found, "python -m bench.static_report --update"


def test_older_compilers_do_about_as_well(report):
    """With the older Triton no production launch spills or takes over 1.1 times the instructions an element."""
    old, new = (json.loads(report.table_of(version).read_text())["rows"] for version in ("3.6.0", "3.9.0"))
    old = {report.label(row): row for row in old}
    assert old.keys() == {report.label(row) for row in new}
    for row in new:
        assert max(row["stack"], row["local"]) <= row["accepted_spill"], report.label(row)
        found = old[report.label(row)]
        assert max(found["stack"], found["local"]) <= found["accepted_spill"], report.label(row)
        assert (found["per_element"] or 0) <= 1.1 * (row["per_element"] or 0), report.label(row)
