"""What a run needs before its first step, and what its workdir keeps of that."""

import dataclasses
import json

import numpy as np
import pytest

from configs import nano
from sunfish_jax.cache import data_folder
from sunfish_jax.data import batches, tokens
from sunfish_jax.data.sources import open_source
from sunfish_jax.data.tokenizer import train_tokenizer
from sunfish_jax.errors import UserError
from sunfish_jax.models import prompt_table
from sunfish_jax.training import preparation
from sunfish_jax.training.preparation import begin_workdir, prepare_run
from sunfish_jax.workdir.config import HISTORY_FILE, load_config
from sunfish_jax.workdir.row_lengths import load_row_lengths
from sunfish_jax.workdir.run import IDENTITY_FILE
from sunfish_jax.workdir.writers import WANDB_RUN_FILE


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    config = nano.get_config()
    source = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    with source.open("w") as file:
        for i in range(200):
            print(json.dumps({"text": f"animal {i} eats {i % 7} fish", "prompt": f"animal {i}"}), file=file)
    config.data.source = str(source)
    config.tokenizer.vocab_size = 300
    return config


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def prepared(config):
    return prepare_run(config)


def test_new_run_is_found_again_with_the_same_tokens(config, prepared, tmp_path):
    begin_workdir(tmp_path, config, prepared)
    np.testing.assert_array_equal(load_row_lengths(tmp_path), np.bincount(prepared.splits["train"].lengths))
    again = prepare_run(config, resumed=tmp_path)
    assert again.buckets == prepared.buckets
    np.testing.assert_array_equal(again.splits["train"].tokens, prepared.splits["train"].tokens)
    batch, same = again.training_batches(config)[5], prepared.training_batches(config)[5]
    np.testing.assert_array_equal(batch.tokens, same.tokens)
    np.testing.assert_array_equal(batch.prompt.inputs, same.prompt.inputs)


def test_text_is_prepared_once_for_all_runs(config, empty_cache, capsys, monkeypatch):
    left = data_folder() / "incomplete-x/tokens"
    left.mkdir(parents=True)
    first = prepare_run(config)
    assert "training a tokenizer" in capsys.readouterr().out
    # What a killed process left.
    assert not left.parent.exists()
    monkeypatch.setattr(tokens, "_write_split", None)
    second = prepare_run(config)
    assert "training a tokenizer" not in capsys.readouterr().out
    assert second.identity == first.identity and second.buckets == first.buckets
    np.testing.assert_array_equal(second.splits["train"].tokens, first.splits["train"].tokens)


def test_a_tokenizer_is_trained_for_each_text_and_size(config, empty_cache, tmp_path):
    small = prepare_run(config)
    other = config.copy_and_resolve_references()
    other.tokenizer.vocab_size = 290
    assert len(prepare_run(other).tokenizer) == 290 < len(small.tokenizer)
    text = "other words of another corpus, "
    (tmp_path / "other.txt").write_text("".join(f"{text}{i}\n\n" for i in range(300)))
    other.data.source = str(tmp_path / "other.txt")
    other.tokenizer.vocab_size = config.tokenizer.vocab_size
    again = prepare_run(other)
    assert len(again.tokenizer(text)["input_ids"]) < len(small.tokenizer(text)["input_ids"])


def test_a_cache_that_takes_nothing_is_one_line(config, empty_cache):
    empty_cache.write_text("a file")
    with pytest.raises(UserError, match=r"cache/sunfish_jax/data .*: set XDG_CACHE_HOME to a folder"):
        prepare_run(config)


def test_prompts_of_training_are_encoded_once(config, monkeypatch):
    prepared = prepare_run(config)
    monkeypatch.setattr(prompt_table, "_BYTES_LEFT_FREE", 0)
    calls = []
    encode = prepared.prompt_encoder.encode
    encoder = dataclasses.replace(
        prepared.prompt_encoder, encode=lambda tokens, mask: calls.append(len(tokens)) or encode(tokens, mask)
    )
    source = dataclasses.replace(prepared, prompt_encoder=encoder).training_batches(config)
    first = source[0]
    far = batches._STEPS_ENCODED_TOGETHER * source.steps_per_epoch
    source[far]
    encoded = sum(calls)
    np.testing.assert_array_equal(source[0].prompt.inputs, first.prompt.inputs)
    assert sum(calls) == encoded > 0


def test_tokenizer_of_a_large_corpus_is_trained_on_texts_spread_over_it(config, empty_cache, tmp_path, monkeypatch):
    texts = [example.text for example in open_source(config.data, tmp_path).examples("train")]
    seen = []

    def train(texts, vocab_size):
        seen.append(list(texts))
        return train_tokenizer(seen[-1], vocab_size)

    monkeypatch.setattr(preparation, "train_tokenizer", train)
    for share in (1, 4):
        monkeypatch.setattr(preparation, "_TOKENIZER_CHARACTERS", len("".join(texts)) // share)
        prepare_run(config)
    assert seen == [texts, texts[::4]]


def test_config_of_a_run_that_saved_nothing_is_replaced(config, prepared, tmp_path):
    begin_workdir(tmp_path, config, prepared)
    other = config.copy_and_resolve_references()
    other.model.width = 128
    for name in (WANDB_RUN_FILE, HISTORY_FILE):
        (tmp_path / name).write_text("of the run before")
    begin_workdir(tmp_path, other, prepared)
    assert load_config(tmp_path).model.width == 128
    assert not (tmp_path / WANDB_RUN_FILE).exists() and not (tmp_path / HISTORY_FILE).exists()


def test_token_counts_are_those_of_the_training_text(prepared):
    counts = prepared.token_counts()
    tokens = np.asarray(prepared.splits["train"].tokens)
    assert counts.shape == (prepared.model.vocab_size,) and counts.sum() == len(tokens)
    assert counts[prepared.tokenizer.eos_token_id] == prepared.splits["train"].num_rows
    token = tokens[3]
    assert counts[token] == (tokens == token).sum()


@pytest.mark.parametrize(
    ("key", "words"),
    [("data", "text of data.source"), ("tokenizer", "tokenizer"), ("prompt_encoder", "prompt encoder")],
)
def test_run_does_not_go_on_with_what_changed(config, prepared, empty_cache, tmp_path, key, words):
    begin_workdir(tmp_path, config, prepared)
    (tmp_path / IDENTITY_FILE).write_text(json.dumps({**prepared.identity, key: "another"}))
    with pytest.raises(UserError, match=f"the {words} changed since the run") as error:
        prepare_run(config, resumed=tmp_path)
    # What would be refused as well is not advised.
    assert ("train.init_from" in str(error.value)) == (key == "data")
    assert list(data_folder().iterdir()) == []


@pytest.mark.parametrize("text", [None, "{", "[]", '{"data": "x"}'])
def test_a_run_whose_fingerprints_are_lost_is_one_line(config, prepared, tmp_path, text):
    begin_workdir(tmp_path, config, prepared)
    (tmp_path / IDENTITY_FILE).unlink()
    if text is not None:
        (tmp_path / IDENTITY_FILE).write_text(text)
    with pytest.raises(UserError, match="missing or damaged"):
        prepare_run(config, resumed=tmp_path)
