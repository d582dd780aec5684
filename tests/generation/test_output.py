import json
from pathlib import Path

import numpy as np
import pytest
from alphabet import TOKENIZER

from sunfish_jax.errors import UserError
from sunfish_jax.generation.output import decode, jsonl_writer


def test_text_is_cut_at_its_first_end():
    eos, pad = TOKENIZER.eos_token_id, TOKENIZER.pad_token_id
    a, b = TOKENIZER.encode("a b")
    assert decode(np.array([a, b, eos, b, eos, pad]), TOKENIZER) == "a b"
    assert decode(np.array([a, pad, b]), TOKENIZER) == "a b"
    assert decode(np.array([a, b, len(TOKENIZER) + 3]), TOKENIZER) == "a b"
    assert decode(np.array([eos, a]), TOKENIZER) == ""


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text("old\n")
    with pytest.raises(KeyboardInterrupt), jsonl_writer(path) as write:
        write({"text": "half"})
        raise KeyboardInterrupt
    assert path.read_text() == "old\n"
    with jsonl_writer(path) as write:
        write({"text": "é\n"})
        write({"text": "b"})
        assert path.read_text() == "old\n"
    assert [json.loads(line)["text"] for line in path.read_text().splitlines()] == ["é\n", "b"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_one(tmp_path):
    path, link = tmp_path / "out.jsonl", tmp_path / "link.jsonl"
    link.symlink_to(path)
    for text in ("a", "b"):
        with jsonl_writer(link) as write:
            write({"text": text})
    assert link.is_symlink() and json.loads(path.read_text()) == {"text": "b"}


def test_where_nothing_can_be_written_is_known_at_once():
    with pytest.raises(UserError, match=r"/dev/null/out.jsonl cannot be written: .+; name another"):
        with jsonl_writer(Path("/dev/null/out.jsonl")):
            raise AssertionError("sampling began")
