import json
import math
import os

import pytest

from sunfish_jax.workdir.json_file import write_json


def test_what_is_written_is_read_back(tmp_path):
    for value in ({"a": [1, 2.5]}, {"b": None}):
        write_json(tmp_path / "file.json", value)
        assert json.loads((tmp_path / "file.json").read_text()) == value
    assert os.listdir(tmp_path) == ["file.json"]


def test_what_is_not_a_number_is_null(tmp_path):
    write_json(tmp_path / "file.json", {"a": {"b": math.nan, "c": (1.0, math.nan)}})
    assert json.loads((tmp_path / "file.json").read_text()) == {"a": {"b": None, "c": [1.0, None]}}


def test_a_failure_leaves_the_old_file(tmp_path, monkeypatch):
    write_json(tmp_path / "file.json", {"a": 1})

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(tmp_path / "file.json", {"a": 2})
    assert json.loads((tmp_path / "file.json").read_text()) == {"a": 1}
