"""How a command ends: one line and exit code 2 for bad input, 130 for Ctrl-C, never a traceback for either."""

import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn

from ..errors import InputError

EXIT_CODES = {
    0: "done; audit: no leak found",
    1: "audit: a leak, or a verdict that was not what was measured; anywhere: a fault of ours, with its traceback",
    2: "bad input, said in one line; nothing is written",
    130: "interrupted (Ctrl-C); what goes to --resume or --checkpoint is saved first",
    141: "whoever read the output went away",
}


def run_command(main: Callable[[], None], foreign: str | None = None) -> None:
    """Call a command's main function and turn what it raises into an exit code.

    Args:
        main: the function.
        foreign: the flag that names anybody's code. Where it is given, `main` runs in a child process: code that ends
            its process must not end the command with a code that means success.
    """
    if foreign and any(argument == foreign or argument.startswith(foreign + "=") for argument in sys.argv[1:]):
        _run_in_child(main, foreign)
    else:
        _run(main)


@contextlib.contextmanager
def no_exit(what: str) -> Iterator[None]:
    """Anybody's code runs here: a `sys.exit` of its own becomes an InputError that begins with `what`."""
    try:
        yield
    except SystemExit as error:
        raise InputError(f"{what} ended the process: sys.exit({error.code!r})") from error


def _run_in_child(main: Callable[[], None], foreign: str) -> None:
    """Run `main` in a forked process, which says in a pipe how it has come to its end.

    What it says there counts beside how the process ends: code that runs at its exit could end it with another code.
    """
    done, done_end = os.pipe()
    parent, parent_end = os.pipe()  # closes when the parent dies, however it does
    child = os.fork()
    if not child:
        os.close(done)
        os.close(parent_end)
        threading.Thread(target=lambda: (os.read(parent, 1), os._exit(1)), daemon=True).start()
        code = 1  # an exception's
        try:
            _run(main)
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
            raise
        finally:  # by an exception too: only the end of the process itself leaves nothing there
            os.write(done_end, bytes([code]))
        return
    os.close(done_end)
    os.close(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to both
    signal.signal(signal.SIGTERM, lambda number, frame: os.kill(child, number))
    said = os.read(done, 1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if said:
        os._exit(said[0] or (code if code >= 0 else 128 - code))  # the child has flushed and cleaned up what there was
    how = f"exit code {code}" if code >= 0 else f"signal {-code}"
    _end(f"error: {foreign}: its code ended the process, with {how}: there is no result", 2)


def deliver(text: str, *files: tuple[str | None, Callable[[str], object]]) -> None:
    """Print a result, then write its files: whatever fails, the rest is done, and the first error is raised at the end.

    Args:
        text: for standard output, or standard error where that is full; empty: nothing.
        files: where each goes, and what writes it; nothing is written to None and to `-`.
    """
    errors: list[OSError | InputError] = []
    printing = [("standard output", lambda _: _print(text))] if text else []
    for path, write in (*printing, *files):
        try:
            if path is not None and path != "-":
                write(path)
        except (OSError, InputError) as error:
            errors.append(error)
    if errors:
        raise errors[0]


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # its reader has seen enough
        raise
    except OSError:
        print(text, file=sys.stderr)
        raise


def _run(main: Callable[[], None]) -> None:
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115 - for the life of the process
    sys.stdout = sys.stdout or sys.stderr  # closed: what is printed is not lost
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without a letter of ours shows a question mark
    try:
        main()
        sys.stdout.flush()
    except InputError as error:
        _end(f"error: {error}", 2)
    except KeyboardInterrupt as error:
        _end(": ".join(["interrupted", *map(str, error.args)]), 130)
    except BrokenPipeError:  # whoever read our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        if error.filename is not None:
            _end(f"error: {error.filename}: {error.strerror}", 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _end(f"error: standard output cannot be written: {error.strerror}", 2)
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        if not (isinstance(error, MemoryError) or "out of memory" in text or "allocate memory" in text):
            raise
        _end("error: out of memory: lower --batch-windows or --seq-len", 2)


def _end(line: str, code: int) -> NoReturn:
    print(line, file=sys.stderr)
    sys.exit(code)
