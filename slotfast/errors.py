"""The one exception that stands for bad input: commands print it as one line and exit with code 2."""

from collections.abc import Mapping
from typing import Any


class InputError(ValueError):
    """Input that cannot be used; the message says what was wrong, where, and what was expected, in one line."""


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
}


def expected(error: Mapping[str, Any]) -> str:
    """What was expected of a value, in our words.

    Args:
        error: one of `pydantic.ValidationError.errors()`.
    """
    phrase = _EXPECTED.get(error["type"])
    if phrase is None:
        return error["msg"].removeprefix("Value error, ")
    return "expected " + phrase.format(**error.get("ctx", {}))
