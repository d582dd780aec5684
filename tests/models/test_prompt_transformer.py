"""The prompt encoder trained from scratch, against a plain float64 computation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sunfish_jax.models.prompt_transformer import PromptTransformer

MODULE = PromptTransformer(vocab_size=50, max_length=16, num_layers=2, num_heads=2, width=8)


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 50, (2, 3, 16)).astype(np.int32)
    mask = np.arange(16) < rng.integers(1, 16, (2, 3, 1))
    return tokens, mask


@pytest.fixture(scope="module")
def variables(inputs):
    return MODULE.init(jax.random.key(0), *inputs)


def _rms_norm(x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def _plain(params, tokens, width=8, num_heads=2):
    """One prompt without padding."""
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    x = (params["tokens"]["embedding"][tokens] + params["positions"][: len(tokens)]) * np.sqrt(width)
    for i in range(2):
        normed = _rms_norm(x)
        query, key, value = (normed @ params[f"{name}_{i}_kernel"] for name in ("query", "key", "value"))
        attended = np.zeros_like(x)
        for head in range(num_heads):
            at = slice(head * 4, head * 4 + 4)
            for position in range(len(tokens)):
                weights = np.exp(key[:, at] @ query[position, at] / 2)
                attended[position, at] = weights @ value[:, at] / weights.sum()
        x = x + attended @ params[f"attention_output_{i}_kernel"]
        x = x + np.maximum(_rms_norm(x) @ params[f"mlp_in_{i}_kernel"], 0) ** 2 @ params[f"mlp_out_{i}_kernel"].T
    return _rms_norm(x)


def test_states_equal_the_plain_computation_of_the_prompt_without_padding(inputs, variables):
    tokens, mask = inputs
    states = jax.jit(MODULE.apply)(variables, tokens, mask)
    assert states.shape == (2, 3, 16, 8) and states.dtype == jnp.float32
    for row in np.ndindex(2, 3):
        plain = _plain(variables["params"], tokens[row][mask[row]])
        np.testing.assert_allclose(np.asarray(states[row])[mask[row]], plain, rtol=1e-4, atol=1e-4)


def test_every_parameter_is_trained(inputs, variables):
    tokens, mask = inputs

    @jax.jit
    @jax.grad
    def gradient(variables):
        return (MODULE.apply(variables, tokens, mask)[..., 0] * mask).sum()

    for path, value in jax.tree_util.tree_leaves_with_path(gradient(variables)):
        assert np.isfinite(value).all() and np.any(value), path


def test_each_kernel_starts_with_the_variance_of_its_number_of_inputs(inputs):
    wide = PromptTransformer(vocab_size=50, max_length=16, num_layers=1, num_heads=2, width=64)
    params = wide.init(jax.random.key(0), *inputs)["params"]
    for name, fan_in in (("query", 64), ("mlp_in", 64), ("mlp_out", 256)):
        assert np.var(params[f"{name}_0_kernel"]) == pytest.approx(1 / fan_in, rel=0.1)
