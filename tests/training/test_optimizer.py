import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import nano
from sunfish_jax.training.state import learning_rate_schedule, make_optimizer

RATE = 1e-2


@pytest.fixture
def config():
    config = nano.get_config().optimizer
    config.learning_rate = RATE
    config.warmup_steps = 1
    config.weight_decay = 0.1
    config.table_multiplier = 3.0
    return config


@pytest.fixture
def params():
    rng = np.random.default_rng(0)
    shapes = {"embedding": (6, 4), "head_table": (6, 8), "scales_kernel": (5, 9)}
    shapes |= {"attention_in": (8, 24), "cross_in": (8, 8), "mlp_in": (8, 12)}
    shapes |= {"attention_out": (8, 8), "cross_out": (8, 8), "mlp_out": (8, 12), "taps": (3, 8)}
    layer = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    outside = {name: layer.pop(name) for name in ("embedding", "head_table", "scales_kernel")}
    return outside | {"layers_0": layer}


def second_update(config, params, gradients):
    """The update of the second step, at the peak learning rate: the first one's rate is zero."""
    optimizer = make_optimizer(config, 1000, jnp.dtype("float32"))
    state = optimizer.init(params)
    for _ in range(2):
        updates, state = optimizer.update(gradients, state, params)
    return updates


def small_gradients(params):
    return jax.tree.map(lambda p: 1e-3 * jnp.cos(3.0 * p), params)


def side_by_side(kernels, names, transposed):
    """[8, ...]: the kernels of these names, and those stored the other way round; the residual stream is 8 wide."""
    parts = [kernels[name] for name in names] + [kernels[name].T for name in transposed]
    return np.concatenate([np.asarray(part, np.float64) for part in parts], axis=1)


def test_muon_moves_kernels_along_orthogonal_matrices(config, params):
    """Those of a layer that read the residual stream, and those that write to it, along one matrix each."""
    config.name = "muon"
    config.weight_decay = 0.0
    gradients = small_gradients(params)
    updates = second_update(config, params, gradients)
    layer, normalized = (
        updates["layers_0"],
        jax.tree.map(lambda g: g / np.sqrt(np.mean(np.square(g))), gradients["layers_0"]),
    )
    moved = [
        tuple(side_by_side(kernels, names, transposed) for kernels in (layer, normalized))
        for names, transposed in (
            (["attention_in", "cross_in", "mlp_in"], []),
            (["mlp_out"], ["attention_out", "cross_out"]),
        )
    ]
    moved.append((np.asarray(updates["scales_kernel"]), np.asarray(gradients["scales_kernel"], np.float64)))
    for update, gradient in moved:
        u, _, vt = np.linalg.svd(gradient, full_matrices=False)
        inner = u.T @ (-update / RATE / 0.2 / max(update.shape) ** 0.5) @ vt.T
        np.testing.assert_allclose(inner, np.diag(np.diag(inner)), atol=1e-3)
        assert (np.abs(np.diag(inner) - 1.0) < 0.271).all()
    # With one gradient throughout, Adam moves by the learning rate in the gradient's sign.
    np.testing.assert_allclose(layer["taps"], -RATE * np.sign(gradients["layers_0"]["taps"]), rtol=1e-3)
    for table in ("embedding", "head_table"):
        np.testing.assert_allclose(updates[table], -3 * RATE * np.sign(gradients[table]), rtol=1e-3)


def test_muon_moves_a_kernel_of_small_gradients_as_far_as_its_neighbours(config, params):
    config.name = "muon"
    gradients = small_gradients(params)
    expected = second_update(config, params, gradients)
    gradients["layers_0"] |= {name: 1e-4 * gradients["layers_0"][name] for name in ("cross_in", "cross_out")}
    got = second_update(config, params, gradients)
    for name, update in got["layers_0"].items():
        np.testing.assert_allclose(update, expected["layers_0"][name], rtol=1e-3, atol=1e-6, err_msg=name)


def test_muon_leaves_kernels_of_different_layers_apart(config, params):
    config.name = "muon"
    params["layers_1"] = jax.tree.map(lambda p: 2.0 * p + 1.0, params["layers_0"])
    gradients = small_gradients(params)
    both = second_update(config, params, gradients)
    gradients["layers_1"] = jax.tree.map(jnp.flip, gradients["layers_1"])
    for name, update in second_update(config, params, gradients)["layers_0"].items():
        np.testing.assert_allclose(update, both["layers_0"][name], rtol=1e-3, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_only_kernels_decay(config, params, name):
    config.name = name
    still = second_update(config, params, jax.tree.map(jnp.zeros_like, params))
    kernels = [(still["layers_0"], params["layers_0"], name) for name in params["layers_0"] if name != "taps"]
    for updates, values, name in [*kernels, (still, params, "scales_kernel")]:
        np.testing.assert_allclose(updates.pop(name), -RATE * 0.1 * values[name], rtol=1e-5)
    assert not any(np.any(update) for update in jax.tree.leaves(still))


def test_adamw_is_optax_adamw(config, params):
    config.name = "adamw"
    config.table_multiplier = 1.0
    gradients = small_gradients(params)
    decayed = {"embedding": False, "head_table": False, "scales_kernel": True}
    decayed["layers_0"] = {name: name != "taps" for name in params["layers_0"]}
    reference = optax.adamw(
        learning_rate_schedule(config, 1000), config.beta1, config.beta2, weight_decay=0.1, mask=decayed
    )
    state = reference.init(params)
    for _ in range(2):
        expected, state = reference.update(gradients, state, params)
    for got, want in zip(
        jax.tree.leaves(second_update(config, params, gradients)), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-9)


def test_large_gradients_are_clipped(config, params):
    config.name = "adamw"
    config.beta1 = config.beta2 = 0.0
    optimizer = make_optimizer(config, 1000, jnp.dtype("float32"))
    state = optimizer.init(params)
    huge = jax.tree.map(lambda p: jnp.full_like(p, 1e6), params)
    _, state = optimizer.update(huge, state, params)
    moment = optax.tree.get(state, "mu")
    assert float(optax.tree.norm(moment)) == pytest.approx(config.clip_norm, rel=1e-5)


@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_the_shortest_runs_have_a_schedule(config, num_steps):
    rate = learning_rate_schedule(config, num_steps)
    assert np.isfinite([rate(step) for step in range(num_steps + 1)]).all()
