"""Arguments of commands."""


def changed(arguments, more):
    """Flags as strings, each of `more` in the place of the same flag in `arguments`; a flag's values follow it."""
    again, kept, keep = {str(text).partition("=")[0] for text in more if str(text).startswith("--")}, [], True
    for text in map(str, arguments):
        keep = text not in again if text.startswith("--") else keep
        kept += [text] if keep else []
    return [*kept, *map(str, more)]
