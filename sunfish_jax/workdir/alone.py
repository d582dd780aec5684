"""One training at a time in a workdir."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from sunfish_jax.errors import UserError

try:
    import fcntl
except ImportError:  # Windows.
    fcntl = None


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Within its `with` block no other process enters one for the same folder.

    The lock is of the folder itself, and ends with the process however that ends. Where a file system knows no
    locks nothing is kept away.

    Raises:
        UserError: another process is there.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another training is running in --workdir={folder}: stop it first, or name another workdir"
            ) from None
        except OSError:
            pass
        yield
    finally:
        os.close(descriptor)
