"""slotfast artifact: what an artifact holds, and how to turn other people's into ours and back."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from .. import config
from ..command.files import json_text, write_json
from ..command.run import deliver, run_command
from ..errors import InputError

_COMMANDS = {
    "show": (config.ShowSettings, "What a file holds: tensors, sizes, bits a weight, and the entropy bound."),
    "convert": (config.ConvertSettings, "Write a model of any readable form as .slotfast, or as PR #1019's .ptz."),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run one of the commands; raises InputError on bad input."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments.pop(0) if arguments else ""
    if name in ("-h", "--help"):
        lines = [__doc__, "", *(f"  {command:<9}{about}" for command, (_, about) in _COMMANDS.items())]
        return print("\n".join([*lines, "", "slotfast artifact COMMAND --help says more."]))
    if name == "--version":
        return print(config.version())
    if name not in _COMMANDS:
        raise InputError(f"command {name!r}: expected show or convert; see --help")
    cls, about = _COMMANDS[name]
    settings, _ = config.load(cls, f"slotfast artifact {name}", about, arguments)
    config.check_outputs(settings)
    from . import program  # imports torch

    command: Callable[[Any], tuple[dict[str, Any], str]] = program.show if name == "show" else program.convert
    found, text = command(settings)
    shown = json_text(found) if settings.json_ == "-" else text
    return deliver(shown, (settings.json_, lambda path: write_json(path, found)))


if __name__ == "__main__":
    run_command(main)
