"""How numbers are written for people."""


def counted(number: int, noun: str) -> str:
    """A number of things: `1 window`, `1,024 windows`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
