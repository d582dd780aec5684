"""JSON files that are replaced whole or not at all."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any) -> None:
    """Writes `value` to `path`: a reader, or a killed process, leaves the old file or the new one.

    What is not a number becomes null, since JSON has no NaN.

    Raises:
        OSError: It cannot be written; the old file is untouched.
    """
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(json.dumps(_without_nan(value), indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_nan(member) for name, member in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(member) for member in value]
    return None if isinstance(value, float) and math.isnan(value) else value
