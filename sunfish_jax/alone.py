"""One process at a time in a folder."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows.
    fcntl = None

LOCK_FILE = ".lock"


@contextlib.contextmanager
def alone_in(folder: Path, if_not: Callable[[], None]) -> Iterator[bool]:
    """Within its `with` block no other process enters one for the same folder.

    The lock is of an empty file in the folder, which stays there, and ends with the process however that ends. (A
    folder can be locked itself, but over NFS for one machine alone.)

    Args:
        folder: an existing folder.
        if_not: is called where another process is in it. It may raise; if it returns, that process is waited for.

    Yields:
        Whether the process is alone: where a file system knows no locks nothing is kept away.
    """
    if fcntl is None:
        yield False
        return
    descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        locked = _lock(descriptor, fcntl.LOCK_NB)
        if locked is None:
            if_not()
            locked = _lock(descriptor)
        yield bool(locked)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, flags: int = 0) -> bool | None:
    """Whether it is locked now, False where there are no locks; None if another process has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | flags)
    except BlockingIOError:
        return None
    except OSError:
        return False
    return True
