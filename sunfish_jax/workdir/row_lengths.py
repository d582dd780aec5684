"""How long the rows are that a run is trained on: what its texts are as long as."""

import json
from pathlib import Path

import numpy as np

from sunfish_jax.errors import UserError
from sunfish_jax.workdir.json_file import write_json

_FILE = "row_lengths.json"


def save_row_lengths(workdir: Path, lengths: np.ndarray) -> None:
    """Keeps how many rows have each length; `lengths` [R] are their tokens, end of text included."""
    write_json(workdir / _FILE, np.bincount(lengths).tolist())


def load_row_lengths(workdir: Path) -> np.ndarray:
    """Counts by length, [1 + longest].

    Raises:
        UserError: the file is not there or cannot be read.
    """
    path = workdir / _FILE
    try:
        counts = np.asarray(json.loads(path.read_text(encoding="utf-8")), np.int64)
    except (OSError, ValueError, TypeError):
        counts = np.zeros(0)
    if counts.ndim != 1 or not counts.sum():
        raise UserError(f"{path} is missing or damaged: put back the one that training wrote")
    return counts
