import json

import jax
import numpy as np
import pytest

from configs import nano
from sunfish_jax.data.tokenizer import tokenizer_identity, train_tokenizer
from sunfish_jax.errors import UserError
from sunfish_jax.models.denoiser import make_model
from sunfish_jax.models.prompt_encoder import make_prompt_encoder
from sunfish_jax.training.state import create_state
from sunfish_jax.workdir.checkpoints import Checkpoints
from sunfish_jax.workdir.config import record_config
from sunfish_jax.workdir.row_lengths import save_row_lengths
from sunfish_jax.workdir.run import IDENTITY_FILE, TOKENIZER_FOLDER, load_run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A workdir with two checkpoints, and the state of the second, whose parameters all differ."""
    workdir = tmp_path_factory.mktemp("run")
    config = nano.get_config()
    config.tokenizer.vocab_size = 300
    config.model.compute_dtype = "float32"
    config.prompt_encoder.name = "transformer"
    tokenizer = train_tokenizer(["a dog and a puppy", "a physicist"], 300)
    encoder = make_prompt_encoder(config.prompt_encoder, tokenizer)
    model = make_model(config, len(tokenizer), encoder)
    # Compiled in one piece it is several times quicker.
    state = jax.jit(lambda: create_state(config, model, np.ones(len(tokenizer))))()
    newer = state.replace(
        step=state.step + 2,
        ema_params=jax.tree.map(lambda p: p + 1, state.params),
        schedule=state.schedule.replace(mu=state.schedule.mu + 1),
    )
    record_config(workdir, config, step=0)
    tokenizer.save_pretrained(workdir / TOKENIZER_FOLDER)
    identity = {"tokenizer": tokenizer_identity(tokenizer), "prompt_encoder": encoder.identity, "data": "x"}
    save_row_lengths(workdir, np.array([3, 1, 3]))
    (workdir / IDENTITY_FILE).write_text(json.dumps(identity))
    with Checkpoints(workdir, config.checkpoint) as checkpoints:
        checkpoints.save(1, state, {"held_out": 1.0})
        checkpoints.save(2, newer, {"held_out": 2.0})
    return workdir, newer


def test_a_run_has_the_averaged_parameters_and_the_fitted_schedule(trained):
    workdir, state = trained
    run = load_run(workdir)
    assert run.step == 2 and run.config.logging.name == "nano"
    assert run.tokenizer.decode(run.tokenizer("a puppy").input_ids) == "a puppy"
    jax.tree.map(np.testing.assert_array_equal, run.params, state.ema_params)
    assert run.schedule.mu == state.schedule.mu
    assert run.row_lengths.tolist() == [0, 1, 0, 2]
    table = run.model.apply({"params": run.params}, method="vocabulary").embeddings
    assert table.shape == (len(run.tokenizer), 32)


def test_best_is_not_latest(trained):
    workdir, state = trained
    run = load_run(workdir, "best")
    assert run.step == 1 and run.schedule.mu < state.schedule.mu
    # Those of the first state, of which the second has a copy.
    jax.tree.map(np.testing.assert_array_equal, run.params, state.params)


@pytest.mark.parametrize("name", ["tokenizer", "prompt_encoder"])
def test_another_tokenizer_or_encoder_is_an_error(trained, name):
    workdir, _ = trained
    path = workdir / IDENTITY_FILE
    saved = path.read_text()
    try:
        path.write_text(json.dumps(json.loads(saved) | {name: "another"}))
        with pytest.raises(UserError, match=f"{name.replace('_', ' ')} 'another'"):
            load_run(workdir)
    finally:
        path.write_text(saved)


@pytest.mark.parametrize("content", ["3", "{", '{"tokenizer": ""}'])
def test_a_damaged_identity_is_an_error(trained, content):
    workdir, _ = trained
    path = workdir / IDENTITY_FILE
    saved = path.read_text()
    try:
        path.write_text(content)
        with pytest.raises(UserError, match="missing or damaged"):
            load_run(workdir)
    finally:
        path.write_text(saved)


def test_a_config_of_another_architecture_is_an_error(trained):
    workdir, _ = trained
    path = workdir / "config.json"
    saved = path.read_text()
    try:
        path.write_text(json.dumps(json.loads(saved) | {"model": json.loads(saved)["model"] | {"width": 32}}))
        with pytest.raises(UserError, match=r"ema_params\.\S+ is \(.*64.*\), not \(.*32.*\)"):
            load_run(workdir)
    finally:
        path.write_text(saved)
