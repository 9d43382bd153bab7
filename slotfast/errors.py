"""The one exception that stands for bad input: commands print it as one line and exit with code 2."""


class InputError(ValueError):
    """Input that cannot be used; the message says what was wrong, where, and what was expected, in one line."""
