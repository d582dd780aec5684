"""The plain network must be ours, or the comparison with it means nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import both_logits
from encoders import FrozenEncoder
from flax.traverse_util import flatten_dict, unflatten_dict
from plain_flax import make_plain, make_plain_state, make_plain_step, plain_params

from configs import nano
from sunfish_jax.data.batches import Batch
from sunfish_jax.models.denoiser import make_model
from sunfish_jax.models.prompt import Prompt
from sunfish_jax.training.sharding import make_mesh
from sunfish_jax.training.state import create_state
from sunfish_jax.training.step import make_train_step

ENCODER = FrozenEncoder(output_dim=24)


@pytest.fixture(scope="module")
def config():
    config = nano.get_config()
    config.model.num_layers = 1
    config.model.conv_width = 3
    config.model.compute_dtype = "float32"
    config.model.dropout = 0.1
    config.tokenizer.vocab_size = 300
    config.train.accumulate_steps = 2
    config.optimizer.learning_rate = 0.01
    config.optimizer.warmup_steps = 1
    return config


@pytest.fixture(scope="module")
def model(config):
    return make_model(config, config.tokenizer.vocab_size, ENCODER)


def make_batch(config, rows=16, length=16, prompt_length=8) -> Batch:
    rng = np.random.default_rng(0)
    shape = (config.train.accumulate_steps, rows)
    return Batch(
        tokens=rng.integers(0, config.tokenizer.vocab_size, (*shape, length), np.int32),
        padding_mask=np.ones((*shape, length), bool),
        known_mask=rng.random((*shape, length)) < 0.1,
        prompt=Prompt(
            inputs=rng.standard_normal((*shape, prompt_length, ENCODER.output_dim)).astype(np.float16),
            mask=np.ones((*shape, prompt_length), bool),
        ),
    )


def test_given_our_weights_it_returns_our_logits(config, model):
    ours, plain = both_logits(model, create_state(config, model).params)
    assert ours.std() > 0.5
    np.testing.assert_allclose(plain, ours, atol=1e-4)


@pytest.mark.parametrize("weight", ["layers_0/mlp_taps", "layers_0/cross_in", "null_prompt"])
def test_the_inputs_of_that_comparison_reach_every_part(config, model, weight, monkeypatch):
    def with_one_changed(params):
        changed = flatten_dict(params, sep="/")
        changed[weight] = jnp.roll(changed[weight], 1, axis=-1)
        return plain_params(unflatten_dict(changed, sep="/"))

    monkeypatch.setattr("agreement.plain_params", with_one_changed)
    ours, plain = both_logits(model, create_state(config, model).params)
    assert np.abs(plain - ours).max() > 1e-3


def test_the_trees_hold_the_same_weights(config, model):
    params = create_state(config, model).params
    z, tokens = jnp.zeros((1, 16, model.embedding_dim)), jnp.zeros((1, 16), bool)
    prompt = Prompt(inputs=jnp.zeros((1, 8, ENCODER.output_dim)), mask=jnp.ones((1, 8), bool))
    plain = make_plain(model, model.dtype)
    made = jax.eval_shape(plain.init, jax.random.key(0), z, jnp.zeros(1), z, tokens, prompt)["params"]
    given = plain_params(params)
    assert jax.tree.structure(made) == jax.tree.structure(given)
    assert [leaf.shape for leaf in jax.tree.leaves(made)] == [leaf.shape for leaf in jax.tree.leaves(given)]


def test_its_step_trains_from_our_loss_on(config, model):
    batch = make_batch(config)
    state, mesh = create_state(config, model), make_mesh(1)
    plain_state = make_plain_state(config, plain_params(state.params), mesh)
    # Our step gives its arrays up; the plain one has its own.
    schedule = jax.tree.map(jnp.copy, state.schedule)
    _, metrics = make_train_step(config, model, mesh)(state, batch)
    plain_step = make_plain_step(config, make_plain(model, model.dtype), mesh, schedule, jax.random.key(1))
    losses = []
    for _ in range(60):
        plain_state, loss = plain_step(plain_state, batch)
        losses.append(float(loss))
    # Their random numbers differ, so over few rows the losses are only about the same.
    assert losses[0] == pytest.approx(float(metrics["loss"]), rel=0.05)
    assert np.mean(losses[-5:]) < 0.93 * np.mean(losses[:5])
