import json
from types import SimpleNamespace

import pytest
from alphabet import MODEL, NO_PROMPT, PARAMS, SCHEDULE, TOKENIZER
from ml_collections import ConfigDict

from sunfish_jax.errors import UserError
from sunfish_jax.generation import gap_lengths, gaps, infill
from sunfish_jax.generation.options import InfillOptions, Settings

SETTINGS = Settings("ddim", 16, 1.0, (0.1, 0.9), 1.0)


@pytest.fixture
def load(monkeypatch):
    """What `load_run` gives, without a workdir."""
    config = ConfigDict({"model": {"block_size": 48}, "sampling": {"max_gap": 4, **vars(SETTINGS)}})
    run = SimpleNamespace(
        workdir="workdir",
        config=config,
        tokenizer=TOKENIZER,
        prompt_encoder=SimpleNamespace(identity="none", unread=lambda prompt: 0),
        model=MODEL,
        params=PARAMS,
        schedule=SCHEDULE,
        step=7,
    )
    monkeypatch.setattr(infill, "load_run", lambda workdir, checkpoint: run)
    monkeypatch.setattr(infill, "encode_prompts", lambda encoder, prompts: NO_PROMPT)


@pytest.mark.parametrize(
    ("text", "lengths"),
    [("a b c [MASK] f g h", [2]), ("a b c d [MASK] f g h i j k [MASK:2] n o p [MASK] s t u v", [1, 2, 2])],
)
def test_the_length_that_fits_both_sides_is_chosen(text, lengths):
    template = gaps.parse(text, TOKENIZER)
    chosen = gap_lengths.choose_lengths(
        MODEL, PARAMS, SCHEDULE, TOKENIZER, template, NO_PROMPT, 32, SETTINGS, max_gap=4, seed=0
    )
    assert chosen == lengths


def test_infill_fits_both_sides_and_records_how(load, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    text = "a b c [MASK:2] f g h i [MASK] l m [MASK:1]."
    infill.run(tmp_path, InfillOptions(text=text, num_samples=2, output=output, seed=5))
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [record["index"] for record in records] == [0, 1]
    printed = capsys.readouterr().out
    for record in records:
        assert record["text"].startswith("a b c d e f g h i j k l m ")
        assert record["text"].endswith(".")
        assert record["fills"][:2] == ["d e", "j k"]
        assert record["lengths"] == [2, 2, 1]
        assert record["template"] == text
        assert {"seed": 5, "num_steps": 16, "checkpoint_step": 7}.items() <= record.items()
        assert record["text"] in printed


def test_a_text_over_the_limit_leaves_no_file(load, tmp_path):
    options = InfillOptions(text="a [MASK] b", seq_len=5, output=tmp_path / "out.jsonl")
    with pytest.raises(UserError, match=r"takes 7 tokens.*5 fit"):
        infill.run(tmp_path, options)
    assert list(tmp_path.iterdir()) == []


def test_lengths_that_are_given_are_kept():
    template = gaps.parse("a [MASK:2] d [MASK:7]", TOKENIZER)
    assert gap_lengths.choose_lengths(
        None, None, None, TOKENIZER, template, None, 0, SETTINGS, max_gap=4, seed=0
    ) == [2, 7]
