"""Files and folders that are worth nothing before they are finished, and do not stay behind when they never are."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

_unfinished: set[Path] = set()


@contextlib.contextmanager
def unfinished(path: Path) -> Iterator[Path]:
    """Removes `path` at the end of the `with` block, unless it was renamed by then; so does `remove_unfinished`.

    Yields:
        `path`, a file or a folder, which may not exist yet.
    """
    _unfinished.add(path)
    try:
        yield path
    finally:
        _remove(path)
        _unfinished.discard(path)


def remove_unfinished() -> None:
    """Removes what is not finished, for a process that is about to end without leaving its `with` blocks."""
    for path in tuple(_unfinished):
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        # Another thread may still be writing there.
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
