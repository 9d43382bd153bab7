"""How settings are read: from flags, then environment variables, then a file, then a preset, then defaults.

argparse reads the flags and pydantic validates the values. (pydantic-settings would do both, but it splits lists at the
commas that `--preset NAME:key=value,key=value` needs, and does not tell where a value came from.)
"""

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol, TypeVar

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from ..errors import Fault, InputError
from ..words import nearest
from .arguments import ADAPTATION_VARIABLES, flag, read_flags, variable
from .outputs import PAGE, Kind, Reads, one_file
from .toml import read_config

# An unread variable that starts like one of these is probably misspelt.
_PREFIXES = ("SLOT_", "SLOTFAST_", "EVAL_", "TTT_", "V20_")
_SWITCH = pydantic.TypeAdapter(bool)


def setting(
    default: Any,
    help: str,
    env: str | None = None,
    positional: bool = False,
    *,
    reads: Reads | None = None,
    writes: Kind | None = None,
    **options: Any,
) -> Any:
    """A field of a settings class: its default, help text, environment variable, and options of pydantic's Field.

    A positional one is given without a flag and is required; a list takes any number. Where a setting names files,
    `reads` finds them or `writes` says what will be there: `check_outputs` looks at both.
    """
    extra: Any = {"env": env, "positional": positional, "reads": reads, "writes": writes}
    return Field(default, description=help, json_schema_extra=extra, **options)


def model_config_setting() -> Any:
    """The field of every command that reads models."""
    return setting(
        None,
        "what other people's files do not say of their model: a generation (baseline, pr287, pr549, pr1019, pr1179, "
        "pr1204, pr1217, pr1218, pr1350, pr1394, pr1413, pr1493), KEY=VALUE,KEY=VALUE, both, or JSON",
        alias="model_config",
    )


def report_setting() -> Any:
    """The field of every command whose result is a page too."""
    return setting(
        None, "write the result as a page to look at, one .html file; needs matplotlib: '.[plot]'", writes=PAGE
    )


class _Dataclass(Protocol):
    __dataclass_fields__: ClassVar[dict[str, Any]]


T = TypeVar("T", bound=_Dataclass)


class Settings(BaseModel):
    """Base of every command's settings."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False, str_min_length=1
    )
    # Defaults that each value of the setting `preset` puts in the place of the usual ones; empty where there are none.
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {}
    # For --help: the title of each group by the setting that it begins with, and arguments as examples.
    GROUPS: ClassVar[dict[str, str]] = {}
    EXAMPLES: ClassVar[tuple[str, ...]] = ()
    CHANGES_ROWS: ClassVar[bool] = False  # whether ADAPTATION_VARIABLES change anything
    force: bool = setting(False, "overwrite an existing file of another kind")
    config_: str | None = setting(
        None,
        "read flags that are not given here, nor by variables, from a TOML file: seq-len = 1024, ttt = true, "
        'preset = ["none", "causal"]',
        alias="config",
        reads=one_file,
    )

    def given(self) -> Iterator[tuple[str, Any, Any]]:
        """Flag, field and value of every setting that has one."""
        for name, field in type(self).model_fields.items():
            if (value := getattr(self, name)) not in (None, "", []):
                yield flag(name, field), field, value

    def pick(self, cls: type[T], **others: Any) -> T:
        """Make a dataclass out of the settings that its fields are named after; `others` gives the remaining fields."""
        names = (name for name in cls.__dataclass_fields__ if name not in others)
        return cls(
            **{name: getattr(self, name if name in type(self).model_fields else f"{name}_") for name in names}, **others
        )


S = TypeVar("S", bound=Settings)


def start(cls: type[S], prog: str, description: str, argv: Sequence[str] | None = None) -> S | None:
    """Settings of a command that is to run, or None where they were only to be shown; warns of unread variables.

    Args, Raises: see `load`.
    """
    settings, sources = load(cls, prog, description, argv)
    warn_unread_variables()
    if getattr(settings, "show_config", False):
        print(show(settings, sources))
        return None
    return settings


def load(cls: type[S], prog: str, description: str, argv: Sequence[str] | None = None) -> tuple[S, dict[str, str]]:
    """Settings of one command.

    Args:
        cls: a settings class.
        prog, description: for --help.
        argv: arguments, sys.argv's by default.

    Returns:
        The settings, and for each field where its value came from: "flag", the name of the variable or
        of the file, "preset" or "default".

    Raises:
        InputError: unknown flag (with a near one that exists), two values where one is taken, or a value out of range.
        SystemExit: --help, --version.
    """
    flags = read_flags(cls, prog, description, argv)
    values, sources = dict(flags), dict.fromkeys(flags, "flag")
    for name, field in cls.model_fields.items():
        found = variable(field)
        if found and name not in values and os.environ.get(found):
            values[name], sources[name] = os.environ[found], found
    path = values.get("config_") or ""
    for name, value in read_config(cls, path).items() if path else ():
        if name not in values:
            values[name], sources[name] = value, path
    for name, value in _preset(cls, values).items():
        if name not in values:
            values[name], sources[name] = value, "preset"
    try:
        settings = cls.model_validate({cls.model_fields[name].alias or name: value for name, value in values.items()})
    except pydantic.ValidationError as error:
        fault = Fault.of(error)
        name = next(n for n, f in cls.model_fields.items() if fault.name in (n, f.alias))
        source = sources.get(name, "default")
        called = flag(name, cls.model_fields[name])
        where = {"flag": called, path: f"{path}: {called.lstrip('-')}"}.get(source, source)
        raise InputError(f"{where} {fault.value!r}: {fault.expected}") from None
    return settings, {name: sources.get(name, "default") for name in cls.model_fields}


def switch(variable: str, default: bool) -> bool:
    """The value of an environment variable that turns something on or off, in any spelling that settings take.

    Raises:
        InputError: it says something else.
    """
    value = os.environ.get(variable, "")
    try:
        return _SWITCH.validate_python(value.strip()) if value else default
    except pydantic.ValidationError as error:
        raise InputError(f"{variable} {value!r}: {Fault.of(error).expected}") from None


def _preset(cls: type[Settings], values: Mapping[str, Any]) -> dict[str, Any]:
    """What the chosen preset sets; a preset that does not exist is left to validation."""
    return cls.PRESETS.get(values.get("preset", cls.model_fields["preset"].default), {}) if cls.PRESETS else {}


def warn_unread_variables() -> None:
    """Say on standard error which environment variables look like ours but are read by nothing."""
    known = set(ADAPTATION_VARIABLES)
    for cls in Settings.__subclasses__():
        known.update(filter(None, map(variable, cls.model_fields.values())))
    for name in sorted(os.environ):
        if name.startswith(_PREFIXES) and name not in known:
            hint = nearest(name, known, "the nearest that is read is")
            print(f"warning: nothing reads the environment variable {name}{hint}", file=sys.stderr)


def show(settings: Settings, sources: Mapping[str, str]) -> str:
    """A table of every setting, its value and where it came from."""
    fields = type(settings).model_fields
    rows = [(flag(name, fields[name]), json.dumps(getattr(settings, name)), sources[name]) for name in fields]
    rows += [(name, os.environ[name], "changes rows of presets") for name in ADAPTATION_VARIABLES if name in os.environ]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(f"{name:<{widths[0]}}  {value:<{widths[1]}}  {source}" for name, value, source in rows)
