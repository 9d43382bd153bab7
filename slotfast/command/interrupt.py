"""Ctrl-C while work that is saved goes on."""

import signal
import threading
from pathlib import Path
from typing import Any, Self


class Interrupt:
    """Within it, as a context, Ctrl-C sets `asked` alone: the work saves its state at the next place, and raises then.

    A second Ctrl-C takes effect at once. However it ends by one, the KeyboardInterrupt says how to go on. Where whoever
    started the process has it ignore Ctrl-C, as shells do in the background, it goes on ignoring it.

    Args:
        path: of the saved state.
        how: in words, what goes on from there.
    """

    def __init__(self, path: str, how: str = "the same command"):
        self.path, self.how, self.asked = path, how, False
        self._before: Any = None  # what SIGINT did

    def __enter__(self) -> Self:
        ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        if threading.current_thread() is threading.main_thread() and not ignored:
            self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
        if (kind is KeyboardInterrupt or (kind is None and self.asked)) and Path(self.path).exists():
            raise KeyboardInterrupt(f"{self.path} holds what is done; {self.how} goes on from there") from None

    def _ask(self, *_: object) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, self._before)
