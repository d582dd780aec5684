import json
import runpy
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from sunfish_jax.errors import UserError
from sunfish_jax.workdir.config import (
    changed_keys,
    check_resumable,
    load_config,
    record_config,
    unknown_key,
    validate_config,
)

CONFIGS = Path(__file__).parents[2] / "configs"


def get_config(name: str) -> ConfigDict:
    return runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"]()


def with_value(name: str, key: str, value) -> ConfigDict:
    config = get_config(name)
    group, _, last = key.partition(".")
    with config.ignore_type():
        config[group][last] = value
    return config


@pytest.mark.parametrize("name", ["default", "nano", "tiny", "mini", "micro", "full"])
def test_every_config_is_valid_and_has_a_name_and_a_command(name):
    validate_config(get_config(name), get_config("default"))
    if name != "default":
        assert get_config(name).logging.name == name
        assert f"--config=configs/{name}.py" in (CONFIGS / f"{name}.py").read_text().split('"""')[1]


def test_micro_is_the_recommended_model():
    config = get_config("micro")
    model = config.model
    assert (model.num_layers, model.width, model.num_heads, model.block_size) == (8, 512, 8, 256)
    assert (config.tokenizer.vocab_size, config.prompt_encoder.max_length) == (8192, 64)
    assert (config.train.batch_size, config.train.accumulate_steps, config.train.num_steps) == (4, 8, 50_000)
    assert config.optimizer.learning_rate == 5e-4


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("model.num_layers", 0, ["model.num_layers=0", "1 or more"]),
        ("model.num_heads", 3, ["width=64", "num_heads=3", "multiple of 6"]),
        ("model.num_heads", 64, ["even width", "multiple of 128"]),
        ("model.block_size", 100, ["block_size=100", "multiple of 16"]),
        ("model.conv_width", 4, ["conv_width=4", "odd"]),
        ("model.dropout", 1.0, ["dropout=1.0", "below 1"]),
        ("model.compute_dtype", "fp8", ["'fp8'", "auto, float32, bfloat16, int8"]),
        ("model.width", "64", ["model.width='64'", "type int"]),
        ("model.width", True, ["model.width=True", "type int"]),
        ("model.remat", 1, ["model.remat=1", "type bool"]),
        ("diffusion.schedule", "gumble", ["'gumble'", "gumbel, linear, cosine, sqrt"]),
        ("diffusion.conditioning_dropout", 1.5, ["1.5", "from 0 to 1"]),
        ("optimizer.learning_rate", 0.0, ["learning_rate=0.0", "above 0"]),
        ("optimizer.learning_rate", float("nan"), ["learning_rate=nan", "above 0"]),
        ("train.batch_size", -4, ["batch_size=-4", "1 or more"]),
        ("train.num_devices", 17, ["num_devices=17", "batch_size=16"]),
        ("tokenizer.vocab_size", 100, ["vocab_size=100", "258"]),
        ("prompt_encoder.name", "bert", ["'bert'", "minilm"]),
        ("prompt_encoder.name", "gpt2", ["prompt_encoder.path is empty"]),
        ("sampling.guidance_interval", (0.9, 0.1), ["(0.9, 0.1)", "rising"]),
        ("logging.sample_prompts", (1, 2), ["(1, 2)", "Write about dogs"]),
        ("logging.sample_prompts", ("dogs", " "), ["('dogs', ' ')", "empty"]),
        ("data.source", "", ["data.source is empty", "vital_articles"]),
        ("model.widht", 64, ["config.model.widht", "did you mean config.model.width?"]),
        ("train.learning_rate", 1e-3, ["did you mean config.optimizer.learning_rate?"]),
    ],
)
def test_a_wrong_value_is_named(key, value, words):
    with pytest.raises(UserError) as error:
        validate_config(with_value("nano", key, value), get_config("default"))
    for word in words:
        assert word in str(error.value)


def test_a_whole_number_does_for_a_real_one():
    validate_config(with_value("nano", "sampling.guidance_scale", 2), get_config("default"))


def test_a_missing_key_is_named():
    config = get_config("nano")
    del config.model.width
    with pytest.raises(UserError, match=r"config\.model\.width is missing"):
        validate_config(config, get_config("default"))


def test_an_override_in_the_wrong_group_finds_its_key():
    assert "did you mean config.train.num_steps?" in str(unknown_key("num_steps", get_config("nano")))
    assert "configs/default.py" in str(unknown_key("qqqqqqqqqq", get_config("nano")))


def test_a_saved_config_comes_back_equal(tmp_path):
    config = get_config("nano")
    assert record_config(tmp_path / "run", config, step=0) == {}
    loaded = load_config(tmp_path / "run")
    assert changed_keys(loaded, config) == {}
    assert loaded.logging.sample_prompts == config.logging.sample_prompts
    validate_config(loaded, get_config("default"))


def test_changes_are_recorded_with_their_step(tmp_path):
    config = get_config("nano")
    record_config(tmp_path, config, step=0)
    record_config(tmp_path, config, step=100)
    config.train.num_steps = 500
    config.model.dropout = 0.2
    changes = record_config(tmp_path, config, step=120)
    assert changes == {"train.num_steps": (300, 500), "model.dropout": (0.0, 0.2)}
    assert load_config(tmp_path).train.num_steps == 500
    lines = (tmp_path / "config_history.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 120, "changed": {"train.num_steps": [300, 500], "model.dropout": [0.0, 0.2]}}
    ]


def test_what_a_state_depends_on_cannot_change(tmp_path):
    record_config(tmp_path, get_config("nano"), step=0)
    changed = {
        "data.text_key": "body",
        "tokenizer.vocab_size": 600,
        "model.width": 128,
        "prompt_encoder.name": "transformer",
        "diffusion.schedule": "cosine",
        "optimizer.name": "adamw",
        "train.seed": 12,
    }
    config = get_config("nano")
    for key, value in changed.items():
        group, _, last = key.partition(".")
        config[group][last] = value
    config.optimizer.learning_rate = 1.0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError) as error:
        record_config(tmp_path, config, step=10)
    for key, value in changed.items():
        assert f"{key} is " in str(error.value) and repr(value) in str(error.value)
    assert "learning_rate" not in str(error.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("key", ["train.num_steps", "checkpoint.keep", "model.remat", "train.batch_size"])
def test_the_rest_may_change(key):
    check_resumable(get_config("nano"), with_value("nano", key, 48))


@pytest.mark.parametrize("key", ["data.source", "tokenizer.path", "prompt_encoder.path"])
def test_what_a_run_reads_may_be_moved(key):
    check_resumable(get_config("nano"), with_value("nano", key, "elsewhere"))


@pytest.mark.parametrize("text", ["", "{", "[1]", '"a"'])
def test_a_damaged_config_is_one_line(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="is damaged"):
        load_config(tmp_path)


def test_a_workdir_without_a_run_is_an_error(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        load_config(tmp_path)


def test_a_workdir_that_is_a_file_is_an_error(tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(UserError, match="cannot be written"):
        record_config(tmp_path / "file", get_config("nano"), step=0)
    assert (tmp_path / "file").read_text() == "precious"
