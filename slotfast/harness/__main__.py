"""The command: that of lm-evaluation-harness, with our model among its own."""

import sys
from collections.abc import Sequence

from .. import config
from ..command.run import run_command
from .needed import harness


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command `lm_eval` with the model `slotfast`; raises InputError on bad input of that model.

    Args:
        argv: arguments of lm_eval, sys.argv's by default.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments == ["--version"]:
        return print(config.version())
    cli, utils = harness("lm_eval._cli"), harness("lm_eval.utils")
    utils.setup_logging()
    parser = cli.HarnessCLI()
    before, sys.argv = sys.argv, ["slotfast harness", *arguments]  # it reads no other
    try:
        parser.execute(parser.parse_args())
    finally:
        sys.argv = before
    return None


if __name__ == "__main__":
    run_command(main)
