"""The plain network must be ours, or the comparison with it means nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import Inputs, moved, our_logits, plain_logits
from encoders import FrozenEncoder
from flax.traverse_util import flatten_dict, unflatten_dict
from plain_flax import make_plain, make_plain_optimizer, make_plain_state, make_plain_step, plain_params
from random_batch import as_packs, random_batch

from configs import nano
from sunfish_jax.models.denoiser import make_model
from sunfish_jax.models.prompt import Prompt
from sunfish_jax.training.sharding import make_mesh
from sunfish_jax.training.state import create_state, learning_rate_schedule, make_optimizer
from sunfish_jax.training.step import make_train_step

ENCODER = FrozenEncoder(output_dim=24)
# Compiling takes far longer here than running.
QUICKLY = {"xla_backend_optimization_level": 0}


@pytest.fixture(scope="module")
def config():
    config = nano.get_config()
    config.model.num_layers = 1
    config.model.conv_width = 3
    config.model.compute_dtype = "float32"
    config.model.dropout = 0.1
    config.tokenizer.vocab_size = 300
    config.train.accumulate_steps = 2
    # Muon takes long to compile and has tests of its own below.
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 0.01
    config.optimizer.warmup_steps = 1
    return config


@pytest.fixture(scope="module")
def model(config):
    return make_model(config, config.tokenizer.vocab_size, ENCODER)


@pytest.fixture(scope="module")
def state(config, model):
    return jax.jit(lambda: create_state(config, model), compiler_options=QUICKLY)()


@pytest.fixture(scope="module")
def params(state):
    return moved(state.params)


@pytest.fixture(scope="module")
def ours(model, params):
    return our_logits(model, params, Inputs.random(model))


def test_given_our_weights_it_returns_our_logits(model, params, ours):
    assert ours.std() > 0.5
    np.testing.assert_allclose(plain_logits(model, params, Inputs.random(model)), ours, atol=1e-4)


@pytest.mark.parametrize("weight", ["layers_0/mlp_taps", "layers_0/cross_in", "null_prompt"])
def test_the_inputs_of_that_comparison_reach_every_part(model, params, ours, weight):
    changed = flatten_dict(params, sep="/")
    changed[weight] = jnp.roll(changed[weight], 1, axis=-1)
    plain = plain_logits(model, unflatten_dict(changed, sep="/"), Inputs.random(model))
    assert np.abs(plain - ours).max() > 1e-3


def test_the_trees_hold_the_same_weights(model, state):
    z, tokens = jnp.zeros((1, 16, model.embedding_dim)), jnp.zeros((1, 16), bool)
    prompt = Prompt(inputs=jnp.zeros((1, 8, ENCODER.output_dim)), mask=jnp.ones((1, 8), bool))
    plain = make_plain(model, model.dtype)
    made = jax.eval_shape(plain.init, jax.random.key(0), z, jnp.zeros(1), z, tokens, prompt)["params"]
    given = plain_params(state.params)
    assert jax.tree.structure(made) == jax.tree.structure(given)
    assert [leaf.shape for leaf in jax.tree.leaves(made)] == [leaf.shape for leaf in jax.tree.leaves(given)]


def test_its_step_trains_from_our_loss_on(config, model, state):
    batch, mesh = random_batch(config, ENCODER.output_dim), make_mesh(1)
    # The function itself: with options of its own, a jitted one cannot be part of another.
    gradients = make_train_step(config, model, mesh).gradients.__wrapped__
    # Of the whole step only what the loss takes is compiled.
    ours = jax.jit(lambda *given: gradients(*given).loss, compiler_options=QUICKLY)(state, as_packs(batch))
    plain_state = make_plain_state(config, plain_params(state.params), mesh)
    plain_step = make_plain_step(config, make_plain(model, model.dtype), mesh, state.schedule, jax.random.key(1))
    plain_step = plain_step.lower(plain_state, batch).compile(compiler_options=QUICKLY)
    losses = []
    for _ in range(60):
        plain_state, loss = plain_step(plain_state, batch)
        losses.append(float(loss))
    # Their random numbers differ, so over few rows the losses are only about the same.
    assert losses[0] == pytest.approx(float(ours), rel=0.05)
    assert np.mean(losses[-5:]) < 0.93 * np.mean(losses[:5])


def last_update(optimizer, params, gradients) -> dict:
    """The last of the updates that a sequence of gradients leads to, by path."""
    update, state = jax.jit(optimizer.update), optimizer.init(params)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
    return flatten_dict(updates, sep="/")


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_its_optimizer_goes_where_ours_goes(config, name):
    config = config.copy_and_resolve_references()
    config.optimizer.name = name
    shapes = {
        "embedding": (20, 8),
        "null_prompt": (16,),
        "prompt_kernel": (16, 32),
        "layers_0/attention_taps": (3, 16),
        "layers_0/cross_in": (16, 16),
        "layers_0/mlp_out": (16, 64),
    }
    rng = np.random.default_rng(0)

    def random_tree():
        leaves = {path: rng.standard_normal(shape).astype(np.float32) for path, shape in shapes.items()}
        return unflatten_dict(leaves, sep="/")

    params, gradients = random_tree(), [random_tree() for _ in range(6)]
    settings = (config.optimizer, config.train.num_steps)
    ours = last_update(make_optimizer(*settings, jnp.float32), params, gradients)
    ours = flatten_dict(plain_params(unflatten_dict(ours, sep="/")), sep="/")
    plain = last_update(make_plain_optimizer(*settings), plain_params(params), map(plain_params, gradients))
    assert set(ours) == set(plain)
    for path, update in plain.items():
        if name == "muon" and path.endswith("kernel"):
            # They stop at other distances from an orthogonal matrix.
            cosine = np.vdot(update, ours[path]) / np.linalg.norm(update) / np.linalg.norm(ours[path])
            assert cosine > 0.9, path
            assert np.linalg.norm(update) == pytest.approx(np.linalg.norm(ours[path]), rel=0.3), path
        else:
            np.testing.assert_allclose(update, ours[path], rtol=1e-4, atol=1e-7, err_msg=path)


def test_its_muon_orthogonalises_nesterov_momentum(config):
    """Against float64: the singular values go through five quintics, the momentum is averaged and unbiased."""
    rng = np.random.default_rng(0)
    gradients = rng.standard_normal((4, 24, 16))
    mean, beta = 0.0, 0.95
    for step, gradient in enumerate(gradients, 1):
        mean = beta * mean + (1 - beta) * gradient
        ahead = beta * mean / (1 - beta ** (step + 1)) + (1 - beta) * gradient / (1 - beta**step)
    left, values, right = np.linalg.svd(ahead, full_matrices=False)
    values /= np.linalg.norm(values)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5

    config = config.copy_and_resolve_references()
    config.optimizer.name, config.optimizer.weight_decay = "muon", 0.0
    config.optimizer.clip_norm = 1e9
    optimizer = make_plain_optimizer(config.optimizer, num_steps=100)
    trees = [{"layers_0": {"cross_in": {"kernel": gradient.astype(np.float32)}}} for gradient in gradients]
    update = last_update(optimizer, trees[0], trees)["layers_0/cross_in/kernel"]
    rate = float(learning_rate_schedule(config.optimizer, 100)(3))
    np.testing.assert_allclose(update, -rate * 0.2 * 24**0.5 * (left * values) @ right, rtol=1e-3, atol=1e-6)
