"""JSON files that are replaced whole or not at all."""

import json
import os
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any) -> None:
    """Writes `value` to `path`: a reader, or a killed process, leaves the old file or the new one.

    Raises:
        OSError: It cannot be written; the old file is untouched.
    """
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, path)
