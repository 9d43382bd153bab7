"""Settings out of a file: `--config run.toml`, with a line for each flag."""

import tomllib
from typing import Any, get_origin

from ..errors import InputError
from ..words import nearest
from .arguments import flag


def read_config(cls: Any, path: str) -> dict[str, Any]:
    """What a file sets, by setting.

    Args:
        cls: a settings class.
        path: a TOML file whose keys are flags without their dashes: `seq-len = 1024`.

    Raises:
        InputError: missing, no TOML, a key that is no flag of this command (with a near one that is), a list where one
            value is taken or the other way round, or a yes or no for what is none.
    """
    try:
        with open(path, "rb") as file:
            found = tomllib.load(file)
    except OSError as error:
        raise InputError(f"--config {path!r}: expected a TOML file: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"--config {path!r}: expected a TOML file: {error}") from None
    names = {flag(name, field).lower().lstrip("-"): name for name, field in cls.model_fields.items()}
    del names["config"]
    values = {}
    for key, value in found.items():
        if key not in names:
            raise InputError(f"{path}: {key}: no such flag{nearest(key, names) or '; see --help'}")
        wanted = cls.model_fields[names[key]].annotation
        if get_origin(wanted) is list and not isinstance(value, list):
            expected = "a list"
        elif isinstance(value, dict) or (get_origin(wanted) is not list and isinstance(value, list)):
            expected = "one value"
        elif isinstance(value, bool) is not (wanted is bool):
            expected = "true or false" if wanted is bool else "no true or false"
        else:
            values[names[key]] = value
            continue
        raise InputError(f"{path}: {key} {value!r}: expected {expected}")
    return values
