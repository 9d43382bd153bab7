"""Who may import whom: modules stand on floors, nothing imports from a floor above its own, and there are no cycles."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import slotfast

ROOT = Path(slotfast.__file__).parent
FLOORS = [
    {"errors", "contest", "saved", "words", "variables", "lazy", "shipped", "kernels"},
    {"windows", "welch", "loader", "command", "worker", "timing", "lbfgs"}
    | {"ops", "banded", "flash", "fused", "losses", "compiled"},
    {"data", "corpus", "score", "overlap", "optim", "model", "slot"},
    {"stream", "quantize", "generate", "foreign", "learn", "ttt"},
    {"artifact", "config"},
    {"eval", "bundle"},
    {"calibrate", "record", "record_page"},
    {"train", "audit", "harness"},
]
COMMANDS = {"__main__", "program"}  # of any package: they read settings, which know the packages
READERS = COMMANDS | {"setup"}  # they turn settings into the objects that work
ENTRIES = {("record",), ("harness", "model")}  # a command in one file; a model that somebody else's command makes
FILES = [path for path in sorted(ROOT.rglob("*.py")) if "kernels" not in path.relative_to(ROOT).parts]


def name_of(path):
    """slotfast.eval.loop -> ("eval", "loop"); of a package, its own name."""
    return path.relative_to(ROOT).with_suffix("").parts


def imported(path, nodes):
    """Names inside slotfast that relative imports among `nodes` ask for, as `name_of` gives them."""
    package = name_of(path)[:-1]
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.level:
            base = (*package[: len(package) + 1 - node.level], *(node.module or "").split("."))
            base = tuple(part for part in base if part)
            for alias in node.names:
                whole = (*base, alias.name)
                found = [p for p in (whole, (*whole, "__init__"), base, (*base, "__init__")) if p in NAMES]
                if found:
                    yield found[0]


NAMES = {name_of(path) for path in FILES}


def floor(name):
    if name[-1] in COMMANDS or name == ("__init__",):
        return len(FLOORS)
    return next(level for level, units in enumerate(FLOORS) if name[0] in units)


def own(name, path):
    """The version, or a package that hands on what its own command's module has."""
    return name == ("__init__",) or name[:-1] == name_of(path)[:-1]


def test_every_module_has_a_floor():
    units = {name[0] for name in NAMES} - {"__init__", "__main__"}
    assert units | {"kernels"} == set.union(*FLOORS)
    assert sum(map(len, FLOORS)) == len(set.union(*FLOORS))


@pytest.mark.parametrize("path", FILES, ids=lambda path: ".".join(name_of(path)))
def test_nothing_imports_upwards(path):
    above = [
        ".".join(name)
        for name in imported(path, ast.walk(ast.parse(path.read_text())))
        if floor(name) > floor(name_of(path)) and not own(name, path)
    ]
    assert not above


def test_there_are_no_cycles():
    """Among imports that run when a module is loaded."""
    graph = {name_of(path): set(imported(path, ast.parse(path.read_text()).body)) - {("__init__",)} for path in FILES}
    for name, needed in graph.items():
        needed.discard(name)
    list(TopologicalSorter(graph).static_order())


def names_of_settings(tree):
    """Classes of settings that a module names, in imports, annotations or calls."""
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
        names += [node.attr] if isinstance(node, ast.Attribute) else [node.id] if isinstance(node, ast.Name) else []
        yield from (name for name in names if name.endswith("Settings"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: ".".join(name_of(path)))
def test_settings_are_read_once(path):
    """Where a command begins: what works below takes what it works with, and can be used without a command."""
    name = name_of(path)
    if name[0] != "config" and name not in ENTRIES and name[-1] not in READERS:
        assert not list(names_of_settings(ast.parse(path.read_text())))


def test_settings_are_found_where_they_are_read():
    source = "from ..config import EvalSettings\ndef f(settings: config.TrainSettings): ..."
    assert set(names_of_settings(ast.parse(source))) == {"EvalSettings", "TrainSettings"}


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").rglob("*.py")), ids=lambda path: path.name)
def test_kernels_import_nothing_of_slotfast(path):
    for node in ast.walk(ast.parse(path.read_text())):
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        assert not [module for module in modules if module.split(".")[0] == "slotfast"]
