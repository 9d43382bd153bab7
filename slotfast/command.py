"""How a command ends: one line and exit code 2 for bad input, 130 for Ctrl-C, never a traceback for either."""

import sys
from collections.abc import Callable

from .errors import InputError


def run(main: Callable[[], None]) -> None:
    """Call a command's main function and turn what it raises into an exit code."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # the reader of our output went away: not an error of ours, and nothing more can be said there
        sys.stderr.close()
        sys.exit(141)
