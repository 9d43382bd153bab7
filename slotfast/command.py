"""How a command ends: one line and exit code 2 for bad input, 130 for Ctrl-C, never a traceback for either."""

import os
import sys
from collections.abc import Callable
from typing import NoReturn

from .errors import InputError


def run(main: Callable[[], None]) -> None:
    """Call a command's main function and turn what it raises into an exit code."""
    try:
        main()
        sys.stdout.flush()
    except InputError as error:
        _end(f"error: {error}", 2)
    except KeyboardInterrupt:
        _end("interrupted", 130)
    except BrokenPipeError:  # whoever read our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _end(f"error: output cannot be written: {error.strerror}", 2)
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        if not (isinstance(error, MemoryError) or "out of memory" in text or "allocate memory" in text):
            raise
        _end("error: out of memory: lower --batch-windows or --seq-len", 2)


def _end(line: str, code: int) -> NoReturn:
    print(line, file=sys.stderr)
    sys.exit(code)
