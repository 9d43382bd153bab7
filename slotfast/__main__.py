"""slotfast: the commands, by name."""

import runpy
import sys
from collections.abc import Sequence

from . import __doc__ as _ABOUT
from . import config
from .command.run import run_command
from .errors import InputError
from .words import nearest

COMMANDS = {
    "eval": "score a model, plain and adapted: bits per byte out of one pass",
    "audit": "find out whether an evaluation loop looks at what it must not",
    "train": "train a model and write its int6 artifact",
    "calibrate": "fit an adaptation's few numbers to a stored model",
    "artifact": "show what a model's file holds, or convert it",
    "bundle": "put the kernels into a script's one file, or into a folder of the kernel hub",
    "harness": "lm-evaluation-harness, its command lm_eval, with models of `eval` among its own",
    "record": "test several runs against a baseline, and write submission.json",
}


def main() -> None:
    """Run the command that the arguments name; the whole process is its."""
    run_command(lambda: _choose(sys.argv[1:]))
    if sys.argv[1:] and sys.argv[1] in COMMANDS:
        name = sys.argv.pop(1)
        runpy.run_module(f"slotfast.{name}", run_name="__main__", alter_sys=True)


def _choose(arguments: Sequence[str]) -> None:
    """Print what was asked for, unless that is a command; raises InputError where there is no such."""
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        lines = [f"  {command:<11}{about}" for command, about in COMMANDS.items()]
        print("\n".join([_ABOUT, "", *lines, "", "slotfast COMMAND --help says more; python -m slotfast is the same."]))
    elif name == "--version":
        print(config.version())
    elif name not in COMMANDS:
        raise InputError(f"{name}: no such command{nearest(name, COMMANDS) or '; see --help'}")


if __name__ == "__main__":
    main()
