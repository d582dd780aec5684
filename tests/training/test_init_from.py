"""Which run `train.init_from` names, and which runs it refuses."""

import types
from pathlib import Path

import jax.numpy as jnp
import pytest

from configs import nano
from sunfish_jax.errors import UserError
from sunfish_jax.training import init_from
from sunfish_jax.training.init_from import init_tokenizer, split_init_from
from sunfish_jax.workdir.checkpoints import Checkpoints
from sunfish_jax.workdir.config import record_config


@pytest.fixture
def saved(tmp_path):
    config = nano.get_config()
    record_config(tmp_path / "saved", config, step=0)
    with Checkpoints(tmp_path / "saved", config.checkpoint) as checkpoints:
        checkpoints.save(10, {"step": jnp.int32(10)})
    return tmp_path / "saved"


@pytest.mark.parametrize(
    ("value", "folder", "checkpoint"),
    [
        ("runs/first", "runs/first", "latest"),
        ("runs/first@3000", "runs/first", "3000"),
        ("runs/first@best", "runs/first", "best"),
        ("runs@home/first", "runs@home/first", "latest"),
        ("runs@home@20", "runs@home", "20"),
        ("~/runs@20", "/home/me/runs", "20"),
        ("~/runs", "/home/me/runs", "latest"),
    ],
)
def test_split_init_from(value, folder, checkpoint, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert split_init_from(value) == (Path(folder), checkpoint)


def test_what_does_not_change_the_meaning_of_weights_may_differ(saved):
    config = nano.get_config()
    config.train.init_from = f"{saved}@10"
    config.data.source = "other.jsonl"
    config.model.dropout = 0.3
    config.model.block_size = 32
    config.optimizer.learning_rate = 1e-5
    assert init_tokenizer(config) == saved / "tokenizer"


def test_weights_for_other_prompt_states_are_refused(monkeypatch):
    config = nano.get_config()
    config.train.init_from = "saved"

    def encoder(identity):
        return types.SimpleNamespace(prompt_encoder=types.SimpleNamespace(identity=identity))

    monkeypatch.setattr(init_from, "load_run", lambda workdir, checkpoint: encoder("gpt2 1"))
    with pytest.raises(UserError, match="init_from=saved was trained with the prompt encoder 'gpt2 1'"):
        init_from.init_state(None, config, encoder("gpt2 2").prompt_encoder)


@pytest.mark.parametrize(
    ("key", "value"), [("model.width", 32), ("model.num_heads", 4), ("prompt_encoder.name", "transformer")]
)
def test_other_architecture_is_refused_by_name(saved, key, value):
    config = nano.get_config()
    config.train.init_from = str(saved)
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=rf"{key} is .* there and {value!r} here"):
        init_tokenizer(config)


@pytest.mark.parametrize("name", ["transformer", "minilm"])
def test_positions_that_were_trained_stay_as_many(tmp_path, name):
    config = nano.get_config()
    config.prompt_encoder.name = name
    record_config(tmp_path / "saved", config, step=0)
    with Checkpoints(tmp_path / "saved", config.checkpoint) as checkpoints:
        checkpoints.save(10, {"step": jnp.int32(10)})
    config.train.init_from = str(tmp_path / "saved")
    config.prompt_encoder.max_length += 16
    if name == "transformer":
        with pytest.raises(UserError, match=r"prompt_encoder.max_length is .* there"):
            init_tokenizer(config)
    else:
        assert init_tokenizer(config) == tmp_path / "saved/tokenizer"


def test_missing_checkpoint_is_found_before_anything_is_prepared(saved):
    config = nano.get_config()
    config.train.init_from = f"{saved}@7"
    with pytest.raises(UserError, match=r"no checkpoint of step 7; it has the steps 10$"):
        init_tokenizer(config)


def test_other_tokenizer_and_missing_run_are_refused(saved):
    config = nano.get_config()
    config.train.init_from = str(saved)
    config.tokenizer.path = "gpt2"
    with pytest.raises(UserError, match=r"leave out tokenizer\.path"):
        init_tokenizer(config)
    config.train.init_from = "nowhere@3"
    with pytest.raises(UserError, match=r"train.init_from=nowhere@3: nowhere holds no run"):
        init_tokenizer(config)
