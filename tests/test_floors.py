"""Who may import whom: modules stand on floors, nothing imports from a floor above its own, and there are no cycles."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import slotfast

ROOT = Path(slotfast.__file__).parent
FLOORS = [
    {"errors", "contest", "words", "variables", "lazy", "shipped", "kernels"},
    {"windows", "welch", "loader", "command", "worker", "ops", "banded", "flash", "lbfgs"},
    {"data", "corpus", "score", "overlap", "optim", "model", "slot"},
    {"stream", "quantize", "generate", "learn", "ttt"},
    {"artifact", "config"},
    {"foreign"},
    {"eval", "bundle"},
    {"calibrate", "record"},
    {"train", "audit"},
]
COMMANDS = {"__main__", "program"}  # of any package: they read settings, which know the packages
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


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").rglob("*.py")), ids=lambda path: path.name)
def test_kernels_import_nothing_of_slotfast(path):
    for node in ast.walk(ast.parse(path.read_text())):
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        assert not [module for module in modules if module.split(".")[0] == "slotfast"]
