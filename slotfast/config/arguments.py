"""The arguments of a settings class: how argparse reads them, and the help that it shows."""

import argparse
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NoReturn, get_args, get_origin

from .. import __version__
from ..command.run import EXIT_CODES
from ..errors import InputError
from ..variables import VARIABLES
from ..words import nearest
from .outputs import file_or_folder, matching_files, results, shards

# They change the rows of presets, not settings.
ADAPTATION_VARIABLES = ("SLOT_ENABLED", *VARIABLES)
_PLACES = {shards: "FOLDER", file_or_folder: "PATH", results: "RESULT", matching_files: "GLOB"}
# What kind of value a setting takes, where neither its type nor its files tell.
_VALUES = {"score": "FUNCTION", "byte_rule": "FUNCTION", "device": "DEVICE"}
_VALUES |= dict.fromkeys(("preset", "show_preset", "kernels", "name"), "NAME")
_WIDTHS = (50, 110)  # of help: a terminal's, but within these; where there is none, the larger one
_ABOUT_THE_COMMAND = ("config_", "show_config")


def version() -> str:
    """What --version says."""
    return f"slotfast {__version__}"


def flag(name: str, field: Any) -> str:
    """What a setting is called on a command line."""
    return name.upper() if field.json_schema_extra["positional"] else "--" + name.strip("_").replace("_", "-")


def variable(field: Any) -> str | None:
    """The environment variable that sets a setting where its flag does not."""
    return field.json_schema_extra["env"]


def read_flags(cls: Any, prog: str, description: str, argv: Sequence[str] | None) -> dict[str, Any]:
    """The settings that the arguments name, with their values.

    Raises:
        InputError: unknown flag (with a near one that exists), or two values where one is taken.
        SystemExit: --help, --version.
    """
    parser = _parser(cls, prog, description)
    flags, unknown = parser.parse_known_args(argv)
    if unknown:
        if not unknown[0].startswith("-"):
            raise InputError(f"{unknown[0]}: a value without a flag in front of it; see --help")
        name = unknown[0].split("=")[0]
        raise InputError(f"{unknown[0]}: no such flag{nearest(name, parser.flags()) or '; see --help'}")
    return vars(flags)


def _parser(cls: Any, prog: str, description: str) -> "_Parser":
    fields = dict(cls.model_fields)
    positional = [flag(name, field) for name, field in fields.items() if field.json_schema_extra["positional"]]
    narrowest, widest = _WIDTHS
    width = max(narrowest, min(widest, shutil.get_terminal_size((widest, 24)).columns))
    parser = _Parser(
        prog=prog,
        usage=" ".join([prog, *positional, "[--FLAG VALUE ...]"]),
        description=textwrap.fill(description, width),
        epilog=_epilog(cls, prog, width),
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=30, width=width),
        allow_abbrev=False,
        add_help=False,
        argument_default=argparse.SUPPRESS,
    )
    for title, members in _groups(cls):
        group = parser.add_argument_group(title)
        for name, field in members:
            _add(group, name, field)
    group = parser.add_argument_group("this command")
    for name in filter(fields.get, _ABOUT_THE_COMMAND):
        _add(group, name, fields[name])
    group.add_argument("--version", action="version", version=version(), help="show the version and exit")
    group.add_argument("-h", "--help", action="help", help="show this and exit")
    return parser


def _groups(cls: Any) -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    """Each group's title and settings, in the order of the class; a group begins where `GROUPS` has a title."""
    title = "arguments"
    members: list[tuple[str, Any]] = []
    own = {name: field for name, field in cls.model_fields.items() if name not in (*_ABOUT_THE_COMMAND, "force")}
    for name, field in own.items():
        if name in cls.GROUPS and members:
            yield title, members
            members = []
        title = cls.GROUPS.get(name, title)
        members.append((name, field))
    yield title, [*members, ("force", cls.model_fields["force"])]


def _add(group: Any, name: str, field: Any) -> None:
    text = flag(name, field)
    unsaid = field.default is False or field.default in (None, "auto", [], "")
    notes = [] if unsaid else [f"default: {_words(field.default)}"]
    notes += [found] if (found := variable(field)) else []
    help = (field.description + f" [{', '.join(notes)}]" * bool(notes)).replace("%", "%%")
    many = get_origin(field.annotation) is list
    if field.json_schema_extra["positional"]:
        group.add_argument(name, metavar=text, help=help, **({"nargs": "*"} if many else {}))
    elif field.annotation is bool:
        group.add_argument(text, dest=name, action="store_true", help=help)
    else:
        how = {"nargs": "+", "action": "extend"} if many else {"action": _Once}
        group.add_argument(text, dest=name, metavar=_metavar(name, field), help=help, **how)


def _words(default: Any) -> str:
    return " ".join(map(str, default)) if isinstance(default, list) else f"{default}"


def _metavar(name: str, field: Any) -> str:
    """What kind of value a flag takes."""
    inner = get_args(field.annotation)
    kinds = {field.annotation, *inner, *(kind for each in inner for kind in get_args(each))}
    if get_origin(field.annotation) is Literal:
        return "/".join(get_args(field.annotation))
    if reads := field.json_schema_extra["reads"]:
        return _PLACES.get(reads, "FILE")
    if writes := field.json_schema_extra["writes"]:
        return "FOLDER" if writes.folder else "FILE"
    return _VALUES.get(name) or ("N" if int in kinds else "X" if float in kinds else "TEXT")


def _epilog(cls: Any, prog: str, width: int) -> str:
    lines = ["examples:", *(f"  {prog} {example}" for example in cls.EXAMPLES)] if cls.EXAMPLES else []
    fields = cls.model_fields.values()
    if any(map(variable, fields)):
        also = f"; {', '.join(ADAPTATION_VARIABLES)} change rows of presets" if cls.CHANGES_ROWS else ""
        text = f"An environment variable in [brackets] is read where its flag is not given{also}."
        lines += ["", "environment:", *textwrap.wrap(text, width, initial_indent="  ", subsequent_indent="  ")]
    codes = [f"  {code:<4} {meaning}" for code, meaning in EXIT_CODES.items()]
    return "\n".join([*lines, "", "exit codes:", *codes])


class _Once(argparse.Action):
    """A flag of one value; argparse itself would drop the first of two without a word."""

    def __call__(self, parser: Any, namespace: Any, value: Any, option: str | None = None) -> None:
        if (before := getattr(namespace, self.dest, value)) != value:
            raise InputError(f"{option}: given twice, {before!r} and {value!r}; it takes one")
        setattr(namespace, self.dest, value)


class _Parser(argparse.ArgumentParser):
    """argparse whose complaints are InputErrors."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see --help")

    def flags(self) -> list[str]:
        """All flags that it knows."""
        return [option for option in self._option_string_actions if option.startswith("--")]
