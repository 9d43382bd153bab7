"""A script with the kernels that it imports inside it: one text that needs torch and triton and nothing of ours."""

import ast
import copy
import difflib
import re
import symtable
from collections.abc import Sequence
from pathlib import Path

from ..errors import InputError
from .source import Folder, Name, Statement, bound_names, read_python

_EXPECTED = (
    "expected from kernels import NAME, ..., or the same from slotfast.kernels, or from a copy of that folder beside "
    "the script"
)
# What an import binds its name to: a module and, in a `from` import, the name in it.
ImportKey = tuple[str, str | None]
# Kernels annotate constants with tl.constexpr. The compiler looks the annotation up, so `tl` would have to be ours; the
# interpreter compares its text, so it may not be renamed: hence `constexpr` alone, imported under its own name.
_CONSTEXPR = "constexpr"


def inline(script: Path, kernels: Sequence[str] = (), folder: Folder | None = None) -> str:
    """The text of a script with kernels in the place of their imports.

    The script stays as it is but for its imports of kernels. In front of its first statement come the functions that it
    imports, and all that they need, without comments, docstrings and references; a name that the script or another
    module binds too gets a number.

    Args:
        script: Python file that takes kernels by `from kernels import NAME, ...`, the same from `slotfast.kernels`, or
            from a copy of that folder beside the script, `from yours.fast import ...`.
        kernels: files of the kernels folder that are taken along as a whole, whatever the script imports.
        folder: the kernels folder; by default the copy that the script imports from, or else the one in this package.

    Raises:
        InputError: not Python; an import that cannot be replaced; a file beside the script that it needs; an unknown
            kernel; nothing to take along.
    """
    theirs = _Script(script, folder)
    folder = theirs.folder
    whole = [name for kernel in kernels for name in folder.exported(kernel) if not name.endswith("_ref")]
    roots = theirs.wanted | {folder.public[name] for name in whole}
    if not roots:
        raise InputError(f"{script}: imports nothing from kernels; --kernels says what to take along")
    statements = folder.reached(roots)
    names = _names(statements, theirs)
    # each import once, however many modules want it
    block = "\n".join(dict.fromkeys(_written(each, names, folder) for each in statements)) + "\n"
    if f": {_CONSTEXPR}" in block:
        if theirs.binds(_CONSTEXPR, ("triton.language", _CONSTEXPR)):
            raise InputError(_taken(_CONSTEXPR))
        block = f"from triton.language import {_CONSTEXPR}\n{block}"
    return theirs.with_block(block, names)


class _Script:
    """Somebody's script: what it wants from the kernels folder, and what it binds itself."""

    def __init__(self, path: Path, folder: Folder | None):
        self.path = path
        self.text, self.tree = read_python(path)
        copy, root = _copy_beside(path, self.tree)
        self.folder = folder = folder or Folder(root)
        self._packages = re.compile(rf"((slotfast\.)?kernels{'|' * bool(copy)}{re.escape(copy)})(\.|$)")
        self.imports: list[tuple[ast.ImportFrom, dict[str, Name]]] = []  # each name it binds -> what it means
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                self._examine(node, folder)
        self.wanted = {target for _, targets in self.imports for target in targets.values()}
        body = ast.parse(self._edited({node: "pass" for node, _ in self.imports})).body
        imports = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
        self._others = _bound([node for node in body if node not in imports])
        self._imported: dict[str, set[ImportKey]] = {}
        for node in imports:
            for alias in node.names:
                self._imported.setdefault(_bound_by(alias), set()).add(_import_key(node, alias))

    def _examine(self, node: ast.Import | ast.ImportFrom, folder: Folder) -> None:
        """Take down an import of kernels; refuse one that would find nothing beside a single file."""
        where = f"{self.path}, line {node.lineno}: {ast.unparse(node)}"
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        else:
            modules = ["." * node.level + (node.module or "")]
            if ours := self._packages.match(modules[0]):
                return self._take(node, modules[0][ours.end() :], where, folder)
        for module in modules:
            top = module.partition(".")[0]
            if top in ("kernels", "slotfast"):
                raise InputError(f"{where}: {_EXPECTED}")
            beside = self.path.parent / top
            if not top or beside.with_suffix(".py").exists() or (beside / "__init__.py").exists():
                raise InputError(f"{where}: one file cannot take along what lies beside it")

    def _take(self, node: ast.ImportFrom, module: str, where: str, folder: Folder) -> None:
        targets = {alias.asname or alias.name: Name(module, alias.name) for alias in node.names}
        if "*" in targets:
            raise InputError(f"{where}: {_EXPECTED}")
        absent = [target.name for target in targets.values() if not folder.has(target)]
        near = difflib.get_close_matches(absent[0], folder.public, 1, 0.75) if absent else []
        if len(absent) == len(targets) and not near and node.module == "kernels":
            return  # the public library of that name
        if absent:
            hint = f"; the nearest is {near[0]!r}" if near else ""
            raise InputError(f"{where}: there is no {absent[0]!r} in kernels{hint}")
        targets = {name: folder.resolve(target) for name, target in targets.items()}
        if any(target.module == "spec" for target in targets.values()):
            raise InputError(f"{where}: specs describe the kernels folder, and stay there")
        self.imports.append((node, targets))

    def binds(self, name: str, key: ImportKey | Name) -> bool:
        """Whether the script binds a name to something other than a kernel does; one import may serve both."""
        return name in self._others or self._imported.get(name, {key}) != {key}

    def with_block(self, block: str, names: dict[Name, str]) -> str:
        """The script with a block in front of its first statement, and its imports replaced by what they bind."""
        edits = {}
        for node, targets in self.imports:
            bound = [f"{name} = {names[target]}" for name, target in targets.items() if name != names[target]]
            edits[node] = "; ".join(bound) or "pass"
        return self._edited(edits, block)

    def _edited(self, edits: dict[ast.stmt, str], block: str = "") -> str:
        """The text with some statements replaced, and a block in front of the first that may come second."""
        body = self.text.encode()
        starts = [0]  # where each line starts, in bytes, as ast counts them
        for line in body.split(b"\n"):
            starts.append(starts[-1] + len(line) + 1)
        replaced = [
            (starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset, text)
            for node, text in edits.items()
        ]
        first = next((node for node in self.tree.body if not _is_header(node)), None)
        lines = [] if first is None else [first.lineno, *(d.lineno for d in getattr(first, "decorator_list", ()))]
        place = starts[min(lines) - 1] if lines else len(body)
        for begin, end, text in sorted([*replaced, (place, place, block)], reverse=True):
            body = body[:begin] + text.encode() + body[end:]
        return body.decode()


def _copy_beside(script: Path, tree: ast.Module) -> tuple[str, Path | None]:
    """The copy of the kernels folder that a script imports from: its name in the script, and where it lies."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            root, parts = script.absolute().parents[max(node.level - 1, 0)], (node.module or "").split(".")
            for count in range(1, len(parts) + 1):
                place = root.joinpath(*parts[:count])
                if (place / "spec.py").is_file() and (place / "_rows.py").is_file():
                    return "." * node.level + ".".join(parts[:count]), place
    return "", None


def _is_header(node: ast.stmt) -> bool:
    """What must stay in front: the docstring and imports from __future__."""
    is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return is_docstring or (isinstance(node, ast.ImportFrom) and node.module == "__future__")


def _import_key(node: ast.Import | ast.ImportFrom, alias: ast.alias) -> ImportKey:
    return (alias.name, None) if isinstance(node, ast.Import) else (node.module or "", alias.name)


def _bound_by(alias: ast.alias) -> str:
    return alias.asname or alias.name.partition(".")[0]


def _bound(body: list[ast.stmt]) -> set[str]:
    return bound_names(symtable.symtable(ast.unparse(ast.Module(body, [])), "script", "exec"))


def _names(statements: list[Statement], script: _Script) -> dict[Name, str]:
    """The name under which each kernel name stands in the script: its own, or its own with a number."""
    names: dict[Name, str] = {}
    owners: dict[str, ImportKey | Name] = {}
    inner = frozenset().union(*(statement.inner for statement in statements))
    for statement in statements:
        node = statement.node
        for name in sorted(statement.binds):
            is_import = isinstance(node, ast.Import | ast.ImportFrom)
            key = _import_key(node, node.names[0]) if is_import else Name(statement.module, name)
            given, number = name, 1
            while script.binds(given, key) or owners.get(given, key) != key or (number > 1 and given in inner):
                number += 1
                given = f"{name}_{number}"
            owners[given] = key
            names[Name(statement.module, name)] = given
    return names


def _taken(name: str) -> str:
    return f"{name!r}: the script gives this name to something else; rename it there"


def _written(statement: Statement, names: dict[Name, str], folder: Folder) -> str:
    """A statement under the new names, without comments and docstrings."""
    changed = {}
    for name in statement.uses | statement.binds:
        given = names.get(folder.resolve(Name(statement.module, name)), name)
        if given != name:
            changed[name] = given
    ambiguous = sorted(changed.keys() & statement.inner)
    if ambiguous:
        raise InputError(_taken(ambiguous[0]))
    return ast.unparse(_Rewrite(changed).visit(copy.deepcopy(statement.node)))


class _Rewrite(ast.NodeTransformer):
    """Renames top-level names, and drops docstrings."""

    def __init__(self, changed: dict[str, str]):
        self.changed = changed

    def visit_arg(self, node: ast.arg) -> ast.arg:
        if node.annotation is not None and ast.unparse(node.annotation) == f"tl.{_CONSTEXPR}":
            node.annotation = ast.Name(_CONSTEXPR)
        return self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.Name:
        node.id = self.changed.get(node.id, node.id)
        return node

    def visit_alias(self, node: ast.alias) -> ast.alias:
        if _bound_by(node) in self.changed:
            node.asname = self.changed[_bound_by(node)]
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.ClassDef) -> ast.stmt:
        self.generic_visit(node)
        node.name = self.changed.get(node.name, node.name)
        if ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        return node

    visit_ClassDef = visit_FunctionDef
