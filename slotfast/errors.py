"""The one exception that stands for bad input: commands print it as one line and exit with code 2."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol


class InputError(ValueError):
    """Input that cannot be used; the message says what was wrong, where, and what was expected, in one line."""


@contextmanager
def reading(path: str | os.PathLike) -> Iterator[None]:
    """Turn an OSError of reading a file into an InputError that names the file."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def first_line(error: BaseException) -> str:
    """The kind of an exception and the first line of its message; for exceptions of other people's code."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


_EXPECTED = {
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing_size": "a whole number of fewer digits",
    "float_parsing": "a number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_parsing": "1, 0, true, false, yes, no, on or off",
    "bool_type": "true or false",
    "string_type": "text",
    "string_too_short": "at least {min_length} character",
    "string_pattern_mismatch": "the form {pattern}",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "literal_error": "{expected}",
    "missing": "a value",
    "list_type": "a list",
    "model_type": "an object",
    "extra_forbidden": "no key of this name",
    "too_short": "at least {min_length} of them",
    "too_long": "at most {max_length} of them",
}


class _ValidationError(Protocol):
    """pydantic's, described here so that nothing need import pydantic for it."""

    def errors(self) -> list[Any]: ...


@dataclass(frozen=True)
class Fault:
    """The first thing that validation found wrong.

    Args:
        where: the value's name, with dots where it lies inside another; empty where it is the whole.
        value: as it was given.
        expected: what was expected, in our words.
    """

    where: str
    value: Any
    expected: str

    @classmethod
    def of(cls, error: _ValidationError) -> "Fault":
        """The first fault of a `pydantic.ValidationError`."""
        first = error.errors()[0]
        return cls(".".join(map(str, first["loc"])), first["input"], _expected(first))

    @property
    def name(self) -> str:
        """The outermost part of `where`."""
        return self.where.partition(".")[0]

    def __str__(self) -> str:
        return f"{self.where}: {self.expected}" if self.where else self.expected


def _expected(error: Mapping[str, Any]) -> str:
    phrase = _EXPECTED.get(error["type"])
    if phrase is None:
        return error["msg"].removeprefix("Value error, ")
    return "expected " + phrase.format(**error.get("ctx", {}))
