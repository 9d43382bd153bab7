"""The kernels folder read as source: which statement binds which name, which names it needs, and where those are bound.

Reading decides what is taken along: a public function, and whatever can be reached from it by name. Nothing that runs
reaches references, specs and cases, so they stay behind unless somebody asks for them.
"""

import ast
import difflib
import symtable
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from .. import kernels
from ..errors import InputError, reading


class Name(NamedTuple):
    """A top-level name of a module: `module` is its path inside the folder, with dots; the folder itself is ""."""

    module: str
    name: str


@dataclass(frozen=True, eq=False)
class Statement:
    """One top-level statement; an import of several names counts as one statement for each."""

    module: str
    node: ast.stmt

    @cached_property
    def _table(self) -> symtable.SymbolTable:
        return symtable.symtable(ast.unparse(self.node), self.module, "exec")

    @cached_property
    def binds(self) -> frozenset[str]:
        return frozenset(bound_names(self._table))

    @cached_property
    def uses(self) -> frozenset[str]:
        """Top-level names that it, or any function inside it, looks up."""
        used = {symbol.get_name() for symbol in self._table.get_symbols() if symbol.is_referenced()}
        for scope in inner_scopes(self._table):
            used |= {symbol.get_name() for symbol in scope.get_symbols() if symbol.is_global()}
        return frozenset(used)

    @cached_property
    def inner(self) -> frozenset[str]:
        """Names that mean something else somewhere inside it."""
        scopes = inner_scopes(self._table)
        return frozenset(s.get_name() for scope in scopes for s in scope.get_symbols() if not s.is_global())


def bound_names(table: symtable.SymbolTable) -> set[str]:
    """Names that the top level of a module binds, and those that its functions declare global and bind."""
    bound = {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported() or s.is_namespace()}
    for scope in inner_scopes(table):
        bound |= {s.get_name() for s in scope.get_symbols() if s.is_declared_global() and s.is_assigned()}
    return bound


def inner_scopes(table: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
    """All scopes inside one."""
    for child in table.get_children():
        yield child
        yield from inner_scopes(child)


def read_python(path: Path) -> tuple[str, ast.Module]:
    """Text and syntax tree of a Python file.

    Raises:
        InputError: cannot be read, not UTF-8, not Python.
    """
    try:
        with reading(path):
            text = path.read_text("utf-8-sig")
        return text, ast.parse(text)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}") from None
    except SyntaxError as error:
        raise InputError(f"{path}, line {error.lineno}: not Python: {error.msg}") from None
    except ValueError as error:
        raise InputError(f"{path}: not Python: {error}") from None


class Folder:
    """The kernels folder.

    Args:
        root: where it lies; the one in this package by default.
    """

    def __init__(self, root: Path | None = None):
        self.root = root or Path(kernels.__file__).parent
        self.files: dict[str, Path] = {}
        self.statements: dict[str, list[Statement]] = {}
        self._imports: dict[Name, Name] = {}  # names that come from another module of the folder
        self._modules_of: dict[str, list[str]] = {}
        for path in sorted(self.root.rglob("*.py")):
            parts = path.relative_to(self.root).with_suffix("").parts
            is_package = parts[-1] == "__init__"
            module = ".".join(parts[:-1] if is_package else parts)
            self.files[module] = path
            self._read(module, is_package, read_python(path)[1])

    def _read(self, module: str, is_package: bool, tree: ast.Module) -> None:
        package = module.split(".") if is_package else module.split(".")[:-1]
        statements, needed = [], []
        # Where a stand-in replaces an import that may fail, the import: one file needs what it launches.
        for node in (each for top in tree.body for each in (top.body if isinstance(top, ast.Try) else [top])):
            if isinstance(node, ast.ImportFrom) and node.level:
                source = [part for part in package[: len(package) - node.level + 1] if part]
                target = ".".join([*source, *(node.module or "").split(".")]).strip(".")
                needed.append(target)
                for alias in node.names:
                    self._imports[Name(module, alias.asname or alias.name)] = Name(target, alias.name)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                for alias in node.names:
                    one = ast.Import([alias]) if isinstance(node, ast.Import) else _from(node.module, alias)
                    statements.append(Statement(module, one))
            elif not isinstance(node, ast.Expr):  # a docstring
                statements.append(Statement(module, node))
        self.statements[module], self._modules_of[module] = statements, needed

    @property
    def public(self) -> dict[str, Name]:
        """What the folder itself offers, by name."""
        return {name.name: self.resolve(name) for name in self._imports if name.module == ""}

    def exported(self, kernel: str) -> list[str]:
        """What the folder offers of one kernel file.

        Raises:
            InputError: no such file, or nothing public in it.
        """
        names = [public for public, target in self.public.items() if target.module.partition(".")[0] == kernel]
        if not names:
            files = {target.module.partition(".")[0] for target in self.public.values()}
            known = sorted(file for file in files if not file.startswith("_"))
            near = difflib.get_close_matches(kernel, known, 1)
            hint = f"the nearest is {near[0]!r}" if near else f"expected one of {', '.join(known)}"
            raise InputError(f"kernel {kernel!r}: no such file; {hint}")
        return names

    def resolve(self, name: Name) -> Name:
        """Where a name is bound, through any imports inside the folder."""
        while name in self._imports:
            name = self._imports[name]
        return name

    def has(self, name: Name) -> bool:
        """Whether a module binds or imports a name."""
        name = self.resolve(name)
        return any(name.name in statement.binds for statement in self.statements.get(name.module, ()))

    def reached(self, roots: Iterable[Name]) -> list[Statement]:
        """All statements that the roots need, in an order in which they can run."""
        taken: set[Statement] = set()
        pending = [self.resolve(root) for root in roots]
        while pending:
            name = pending.pop()
            for statement in self.statements.get(name.module, ()):
                if name.name in statement.binds and statement not in taken:
                    taken.add(statement)
                    pending += [self.resolve(Name(name.module, used)) for used in statement.uses]
        return [each for module in self.modules() for each in self.statements[module] if each in taken]

    def modules(self, roots: Iterable[str] | None = None) -> list[str]:
        """The modules that some need, themselves included, each after those it imports from; all by default."""
        order: list[str] = []

        def visit(module: str) -> None:
            if module in self.statements and module not in order:
                for needed in self._modules_of[module]:
                    visit(needed)
                order.append(module)

        for module in self.statements if roots is None else roots:
            visit(module)
        return order


def _from(module: str, alias: ast.alias) -> ast.ImportFrom:
    return ast.ImportFrom(module, [alias], 0)
