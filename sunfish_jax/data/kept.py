"""What is made of a corpus is made once, and kept for all runs that want the same."""

import hashlib
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from sunfish_jax.alone import alone_in
from sunfish_jax.unfinished import unfinished

_INCOMPLETE = "incomplete-"


def made_once(directory: Path, key: str, make: Callable[[Path], None]) -> Path:
    """Returns the folder that is kept for `key`, made if it is not there yet.

    Processes make one folder of a directory at a time. Only a finished one gets its real name: half of it is never
    taken for all.

    Args:
        directory: where it is kept; is created.
        key: everything that decides what is in it.
        make: writes it, given the path of a folder that does not exist. It may not make another in `directory`.
    """
    folder = directory / hashlib.blake2b(key.encode(), digest_size=8).hexdigest()
    if folder.exists():
        return folder
    directory.mkdir(parents=True, exist_ok=True)
    with alone_in(directory, _say_so) as alone:
        if alone:
            # Of processes that were killed: no other is at work.
            for left in directory.glob(f"{_INCOMPLETE}*"):
                shutil.rmtree(left, ignore_errors=True)
        if not folder.exists():
            with unfinished(Path(tempfile.mkdtemp(dir=directory, prefix=_INCOMPLETE))) as temporary:
                make(temporary / "made")
                _take(temporary / "made", folder)
    return folder


def _take(made: Path, folder: Path) -> None:
    try:
        made.rename(folder)
    except OSError:
        # Where processes are not kept apart another may have been faster: what it made is the same.
        if not folder.exists():
            raise


def _say_so() -> None:
    print("waiting for another process, which prepares text", flush=True)
