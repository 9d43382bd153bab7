"""The JSON Schemas that ship, of audits and records: what the commands write is so, and every fault would be found."""

import copy
import json
import sys
from importlib import resources
from pathlib import Path

import pytest

from slotfast import record
from slotfast.audit.__main__ import main as audit
from tests.json_schema import faults

RESULTS = Path(__file__).parents[1] / "bench" / "results"
AUDIT = json.loads((resources.files("slotfast.audit") / "result.schema.json").read_text())
RECORD = json.loads((resources.files("slotfast") / "record.schema.json").read_text())
LOOPS = """
import torch

def clean(tokens):
    return torch.full((len(tokens) - 1,), 2.7725887)

def leaks(tokens):
    return torch.full((len(tokens) - 1,), 2.5) + tokens.roll(-2)[:-1] / 16
"""


@pytest.fixture(scope="module")
def audits(tmp_path_factory):
    """Results of our own loop, of one that is honest, and of one that leaks."""
    folder, found = tmp_path_factory.mktemp("audits"), {}
    (folder / "my_schema_loops.py").write_text(LOOPS.replace("(tokens):", "(tokens, log):"))
    small = ["--vocab-size", "16", "--max-tokens", "60", "--budget", "0.1"]
    own = ["--preset", "none", "--reruns", "1", "--max-tokens", "60", "--seq-len", "16", "--stride", "4"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        patch.chdir(folder)
        for name, options in (
            ("own", own),
            ("clean", ["--score", "my_schema_loops:clean", *small]),
            ("leaks", ["--score", "my_schema_loops:leaks", *small]),
        ):
            try:
                audit([*options, "--json", f"{name}.json"])
            except SystemExit as ended:
                assert ended.code == 1 and name == "leaks"
            found[name] = json.loads((folder / f"{name}.json").read_text())
    return found


def _submission(tmp_path, *options):
    result = json.loads((RESULTS / "amd-epyc-2-threads" / "eval.json").read_text())
    paths = []
    for seed in (1, 2):
        result["model"]["metadata"]["seed"] = seed
        result["presets"][1]["adapted"]["nats"] += seed
        paths.append(tmp_path / f"run{seed}.json")
        paths[-1].write_text(json.dumps(result))
    record.main([*map(str, paths), "--submission", str(tmp_path / "s.json"), *options])
    return json.loads((tmp_path / "s.json").read_text())


@pytest.mark.parametrize("name", ["own", "clean", "leaks"])
def test_an_audit_is_as_its_schema_says(audits, name):
    assert faults(audits[name], AUDIT) == []
    assert audits[name]["schema"] == AUDIT["properties"]["schema"]["const"]
    assert set(AUDIT["required"]) == set(AUDIT["properties"])


def test_a_leak_has_all_that_its_schema_names(audits):
    traced = next(leak for leak in audits["leaks"]["loops"][0]["leaks"] if "moved" in leak)
    described = AUDIT["properties"]["loops"]["items"]["properties"]["leaks"]["items"]["properties"]
    assert set(traced) == set(described) and set(traced["moved"]) == set(described["moved"]["properties"])


def test_the_committed_certificate_is_as_its_schema_says():
    assert faults(json.loads((RESULTS / "audit-pr1350.json").read_text()), AUDIT) == []


def test_a_submission_is_as_its_schema_says(tmp_path):
    for options in ([], ["--baseline", "1.9,0.001,3", "--name", "a name"]):
        found = _submission(tmp_path, *options)
        assert faults(found, RECORD) == [] and set(found) == set(RECORD["required"]) == set(RECORD["properties"])
        assert found["schema"] == RECORD["properties"]["schema"]["const"] == 1


def _wrong(document, path):
    """The document with another kind of value somewhere, and without one."""
    for change in (lambda place: place.update({path[-1]: [object()]}), lambda place: place.pop(path[-1])):
        changed = copy.deepcopy(document)
        place = changed
        for key in path[:-1]:
            place = place[key]
        change(place)
        yield changed


def test_every_fault_is_found(audits, tmp_path):
    found = audits["leaks"]
    for path in (
        ("schema",),
        ("verdict",),
        ("stream", "sha256"),
        ("loops", 0, "conditions", "C1"),
        ("loops", 0, "tests", 0, "verdict"),
        ("loops", 0, "leaks", 0, "looks_like"),
        ("loops", 0, "noise_floor_nats"),
    ):
        assert all(faults(document, AUDIT) for document in _wrong(found, path)), path
    found = _submission(tmp_path, "--baseline", "1.9,0.001,3")
    for path in (("val_loss",), ("seed_results", 0, "val_bpb"), ("comparison", "p"), ("compliance", "c1"), ("date",)):
        assert all(faults(document, RECORD) for document in _wrong(found, path)), path
