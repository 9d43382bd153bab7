"""What other programs rely on: the names that are exported, their documentation, and the form of results."""

import copy
import inspect
import json
from importlib import resources
from pathlib import Path

import pytest

import slotfast
import slotfast.audit
from slotfast.eval.__main__ import main
from tests.json_schema import faults

SCHEMA = json.loads((resources.files("slotfast.eval") / "result.schema.json").read_text())
PUBLIC = [(package, name) for package in (slotfast, slotfast.audit) for name in package.__all__]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    path = tmp_path_factory.mktemp("result") / "result.json"
    rows = ["--preset", "none", "causal", "causal-lbfgs", "--budget", "60"]
    main(["--max-tokens", "400", "--seq-len", "128", "--json", str(path), *rows])
    return json.loads(path.read_text())


def test_a_result_is_as_its_schema_says(result):
    assert faults(result, SCHEMA) == []
    assert result["schema"] == SCHEMA["properties"]["schema"]["const"] == 1
    assert set(SCHEMA["required"]) == set(SCHEMA["properties"]) - {"budget"}


def test_every_fault_of_a_result_is_found(result):
    def wrong(*path):
        """The document with another kind of value, and without one, somewhere."""
        for value in (object(), None):
            document = copy.deepcopy(result)
            place = document
            for key in path[:-1]:
                place = place[key]
            if value is None:
                del place[path[-1]]
            else:
                place[path[-1]] = [place[path[-1]], value]
            yield document

    for path in (
        ("schema",),
        ("base", "bpb"),
        ("presets", 1, "adapted", "gain_se"),
        ("text", "sha256"),
        ("plan", "stride"),
    ):
        assert all(faults(document, SCHEMA) for document in wrong(*path)), path
    assert faults(result | {"schema": 2}, SCHEMA) and faults(result | {"ranks": 0}, SCHEMA)


@pytest.mark.parametrize(("package", "name"), PUBLIC, ids=lambda value: getattr(value, "__name__", value))
def test_what_is_public_is_documented(package, name):
    value = getattr(package, name)
    if not callable(value):
        return
    text = inspect.getdoc(value)
    assert text and text.splitlines()[0].endswith(".")
    if inspect.isfunction(value):
        signature = inspect.signature(value)
        for parameter in signature.parameters:
            assert f"{parameter}:" in text or f"{parameter}, " in text or f", {parameter}:" in text, parameter
        assert signature.return_annotation is None or "\nReturns:\n" in text


def test_names_are_seen_by_type_checkers_and_by_the_package():
    """Under TYPE_CHECKING the same names are imported that are given when they are asked for."""
    for package in (slotfast, slotfast.audit):
        source = Path(package.__file__).read_text()
        block = source.partition("if TYPE_CHECKING:\n")[2].partition("\n\n")[0]
        seen = {name.strip(" (),") for line in block.splitlines() for name in line.partition(" import ")[2].split(",")}
        assert set(package.__all__) <= seen, set(package.__all__) - seen
    assert (Path(slotfast.__file__).parent / "py.typed").exists()


def test_bad_input_of_the_library_is_an_input_error():
    with pytest.raises(slotfast.InputError, match="preset 'x': no such preset"):
        slotfast.parse_preset("x")
