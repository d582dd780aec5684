"""Where things are kept that can be made again: compiled programs and prepared corpora, for all runs."""

import os
from pathlib import Path

from sunfish_jax.errors import UserError


def cache_folder() -> Path:
    """`sunfish_jax` in XDG_CACHE_HOME, or in `~/.cache`; it may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sunfish_jax"


def data_folder() -> Path:
    """The folder of prepared corpora, which is made if there is none.

    Raises:
        UserError: nothing may be written there.
    """
    folder = cache_folder() / "data"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        problem = None if os.access(folder, os.W_OK | os.X_OK) else "it may not be written to"
    except OSError as error:
        problem = error.strerror
    if problem:
        raise UserError(
            f"prepared text is kept in {folder} ({problem}): set XDG_CACHE_HOME to a folder that can be written to"
        )
    return folder
