import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from alphabet import MODEL, NO_PROMPT, PARAMS, SCHEDULE, TOKENIZER
from ml_collections import ConfigDict

from sunfish_jax.errors import UserError
from sunfish_jax.generation import sample
from sunfish_jax.generation.generator import take_rows
from sunfish_jax.generation.options import SampleOptions, Settings

SETTINGS = Settings("ddim", 4, 1.5, (0.1, 0.9), 1.0)


@pytest.fixture
def load(monkeypatch):
    """What `load_run` gives, without a workdir."""
    run = SimpleNamespace(
        workdir="workdir",
        config=ConfigDict({"model": {"block_size": 16}, "sampling": vars(SETTINGS)}),
        tokenizer=TOKENIZER,
        prompt_encoder=SimpleNamespace(identity="none", unread=lambda prompt: 0),
        model=MODEL,
        params=PARAMS,
        schedule=SCHEDULE,
        step=7,
        row_lengths=np.bincount([16]),
    )
    monkeypatch.setattr(sample, "load_run", lambda workdir, checkpoint: run)
    monkeypatch.setattr(
        sample, "encode_prompts", lambda _, prompts: take_rows(NO_PROMPT, np.zeros(len(prompts), int))
    )
    return run


def records(tmp_path, **options):
    output = tmp_path / "out.jsonl"
    sample.run(tmp_path, SampleOptions(output=output, **options))
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_every_prompt_gets_its_samples_with_what_makes_them_again(load, tmp_path):
    several = records(tmp_path, prompts=("x", "y"), num_samples=2, seed=9, seq_len=8)
    assert [(r["prompt"], r["index"]) for r in several] == [("x", 0), ("x", 1), ("y", 0), ("y", 1)]
    assert several[0]["text"] != several[1]["text"]
    made_from = {"seed": 9, "seq_len": 8, "checkpoint_step": 7, "workdir": "workdir", **vars(SETTINGS)}
    made_from["guidance_interval"] = [0.1, 0.9]
    assert all(made_from.items() <= record.items() for record in several)
    again = records(tmp_path, prompts=("y",), num_samples=1, seed=9, seq_len=8)
    assert again == several[2:3]


def test_texts_are_as_long_as_rows_of_the_training_text(load, tmp_path, monkeypatch):
    load.row_lengths = np.array([0, 0, 1, 0, 0, 1])
    monkeypatch.setattr(sample, "decode", lambda row, tokenizer: str(len(row)))
    assert {record["text"] for record in records(tmp_path, num_samples=12, seq_len=16)} == {"2", "5"}
    assert {record["text"] for record in records(tmp_path, num_samples=12, seq_len=4)} == {"2", "4"}


def test_without_a_prompt(load, tmp_path, capsys):
    (record,) = records(tmp_path)
    assert record["prompt"] is None
    assert record["seq_len"] == 16
    assert record["text"] in capsys.readouterr().out


def test_the_output_is_tried_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "load_run", lambda *_: pytest.fail("a run was loaded"))
    options = SampleOptions()
    object.__setattr__(options, "output", Path("/dev/null/out.jsonl"))
    with pytest.raises(UserError, match="cannot be written"):
        sample.run(tmp_path, options)
