"""What a loop opens while it runs: a file that it writes can remember, one that it reads can hold the text itself."""

import contextlib
import os
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_OUTSIDE = {
    **dict.fromkeys(("socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg"), "connections"),
    **dict.fromkeys(("subprocess.Popen", "os.posix_spawn", "os.system", "os.fork", "os.forkpty"), "processes"),
}
# A name can remember as well as what is in a file, and so can the time, the rights or the length of one
_NAMED = {
    *("os.mkdir", "os.rmdir", "os.remove", "os.rename", "os.link", "os.symlink"),
    *("os.truncate", "os.utime", "os.chmod", "os.setxattr", "sqlite3.connect"),
}
_CODE = {".py", ".pyc", ".so", ".pth"}
_SYSTEM = tuple({"/proc/", "/sys/", "/dev/", *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))})


@dataclass(frozen=True)
class Opened:
    """Names of files, without their folders, and kinds of what lies outside of the process and its files.

    Args:
        read, written: files; code, what the system makes up and what is installed left out of those that are read.
        outside: `connections`, `processes`.
    """

    read: set[str] = field(default_factory=set)
    written: set[str] = field(default_factory=set)
    outside: set[str] = field(default_factory=set)


_watching: list[Opened] = []
_hooked: list[bool] = []


@contextlib.contextmanager
def watched() -> Iterator[Opened]:
    """Within, what Python opens is noted; a library that opens files by itself goes unseen."""
    if not _hooked:
        sys.addaudithook(_note)  # for good: Python takes none back
        _hooked.append(True)
    opened = Opened()
    _watching.append(opened)
    try:
        yield opened
    finally:
        _watching.remove(opened)


def _note(event: str, args: tuple[Any, ...]) -> None:
    if not _watching or (event != "open" and event not in _OUTSIDE and event not in _NAMED):
        return
    opened = _watching[-1]
    if event in _NAMED:
        if isinstance(args[0], str | bytes | os.PathLike):
            opened.written.add(Path(os.fsdecode(args[0])).name)
        return
    if event in _OUTSIDE:
        opened.outside.add(_OUTSIDE[event])
        return
    path, mode, flags = args
    if not isinstance(path, str | bytes | os.PathLike):
        return
    name = os.fsdecode(path)
    if set(mode or "") & set("wax+") or (mode is None and (flags or 0) & _WRITES):
        opened.written.add(Path(name).name)
    elif Path(name).suffix not in _CODE and not name.startswith(_SYSTEM):
        opened.read.add(Path(name).name)
