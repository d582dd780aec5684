"""Products in eight bits against float64 arithmetic on the same integers, and on what is rounded to them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from sunfish_jax.ops.dense import dense, squared_relu_mlp
from sunfish_jax.ops.quantized import quantize, quantize_kernel, quantized_product


# Hypothesis begins with what it takes for the simplest, here the largest: of 1 by 1 nothing could be wrong.
def up_to(most):
    return st.integers(0, most - 1).map(lambda less: most - less)


few_examples = settings(max_examples=3, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])


def bfloat16(rng, *shape):
    """Of very different sizes from row to row and from column to column."""
    scales = np.exp(rng.normal(size=(shape[0], 1))) * np.exp(rng.normal(size=(1, shape[1])))
    return jnp.asarray(rng.normal(size=shape) * scales, jnp.bfloat16)


def exact(x):
    return np.asarray(x, np.float64)


def nearest(x, axis):
    """x rounded to a 127th of the largest along an axis, in float64; and those steps."""
    x = exact(x)
    steps = np.abs(x).max(axis=axis, keepdims=True) / 127
    return np.round(x / np.where(steps == 0, 1, steps)) * steps, steps


def rounded(x):
    return exact(jnp.asarray(x, jnp.bfloat16))


def assert_close(got, want, tolerance=1e-5):
    got, want = exact(got), exact(want)
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max()


def relative_error(got, want):
    return np.linalg.norm(exact(got) - exact(want)) / np.linalg.norm(exact(want))


@few_examples
@given(n=up_to(37), k=up_to(31), axis=st.integers(0, 1), seed=st.integers(0, 99))
def test_values_are_the_nearest_multiples(n, k, axis, seed):
    x = bfloat16(np.random.default_rng(seed), n, k)
    quantized = jax.jit(quantize, static_argnums=1)(x, axis)
    assert quantized.values.dtype == jnp.int8
    assert np.abs(exact(quantized.values)).max(axis=axis).min() == 127
    want, steps = nearest(x, axis)
    assert_close(quantized.steps, steps)
    got = exact(quantized.values) * exact(quantized.steps)
    # Where a value lies halfway, float32 may round it to either side.
    assert (np.abs(got - exact(x)) <= 0.5001 * steps).all()
    assert np.isclose(got, want, rtol=1e-5, atol=0).mean() > 0.99


def test_zeros_stay_zeros():
    x = jnp.zeros((3, 5), jnp.bfloat16).at[1].set(1.0)
    quantized = quantize(x, 1)
    np.testing.assert_allclose(exact(quantized.values) * exact(quantized.steps), exact(x), rtol=1e-6)


@few_examples
@given(n=up_to(37), k=up_to(31), m=up_to(29), seed=st.integers(0, 99))
def test_products_are_exact_but_for_the_rounding(n, k, m, seed):
    rng = np.random.default_rng(seed)
    x, g, kernel = bfloat16(rng, n, k), bfloat16(rng, n, m), bfloat16(rng, k, m)
    both_ways = quantize_kernel(kernel)

    @jax.jit
    def products(x, g, both_ways):
        low_x, low_g = quantize(x, 1), quantize(g, 1)
        forward = quantized_product(low_x, both_ways.by_column)
        return forward, quantized_product(low_g, both_ways.by_row, transposed=True), low_x, low_g

    forward, backward, low_x, low_g = products(x, g, both_ways)

    def product(left, right):
        # Integers, which float64 adds up exactly.
        return (exact(left.values) @ exact(right)) * exact(left.steps)

    columns, rows = both_ways.by_column, both_ways.by_row
    assert_close(forward, product(low_x, columns.values) * exact(columns.steps))
    assert_close(backward, product(low_g, exact(rows.values).T) * exact(rows.steps).T)


def gradients(function, arguments, cotangent):
    value, pullback = jax.vjp(function, *arguments)
    return value, pullback(cotangent)


@few_examples
@given(n=up_to(37), k=up_to(31), m=up_to(29), seed=st.integers(0, 99))
def test_dense(n, k, m, seed):
    rng = np.random.default_rng(seed)
    x, kernel = bfloat16(rng, n, k), bfloat16(rng, k, m)
    g = jnp.asarray(rng.normal(size=(n, m)), jnp.float32)

    @jax.jit
    def fast(x, kernel, g):
        return gradients(lambda x, w: dense(x, w, quantize_kernel(w)), (x, kernel), g)

    y, (d_x, d_kernel) = fast(x.astype(jnp.float32), kernel, g)
    assert d_x.dtype == jnp.float32
    assert d_kernel.dtype == jnp.bfloat16
    g = rounded(g)

    def product(left, right):
        """Each with steps for what is not summed over."""
        return nearest(left, 1)[0] @ nearest(right, 0)[0]

    # A value that lies halfway between two multiples may go to either: a step in a sum.
    assert_close(y, product(x, kernel), 1e-2)
    assert_close(d_x, product(g, exact(kernel).T), 1e-2)
    assert_close(d_kernel, product(exact(x).T, g), 1e-2)


@few_examples
@given(n=up_to(37), k=up_to(31), m=up_to(29), seed=st.integers(0, 99))
def test_squared_relu_mlp(n, k, m, seed):
    rng = np.random.default_rng(seed)
    x, kernel_in, kernel_out = bfloat16(rng, n, k), bfloat16(rng, k, m), bfloat16(rng, k, m)
    g = jnp.asarray(rng.normal(size=(n, k)), jnp.float32)

    @jax.jit
    def fast(x, kernel_in, kernel_out, g):
        def mlp(x, kernel_in, kernel_out):
            return squared_relu_mlp(
                x, kernel_in, kernel_out, quantize_kernel(kernel_in), quantize_kernel(kernel_out)
            )

        return gradients(mlp, (x, kernel_in, kernel_out), g)

    y, (d_x, d_in, d_out) = fast(x.astype(jnp.float32), kernel_in, kernel_out, g)
    low_g = nearest(rounded(g), 1)[0]
    hidden = np.maximum(nearest(x, 1)[0] @ nearest(kernel_in, 0)[0], 0)
    squared = rounded(hidden**2)
    d_hidden = rounded(2 * np.sqrt(squared) * (low_g @ nearest(kernel_out, 0)[0]))
    assert_close(y, nearest(squared, 1)[0] @ nearest(kernel_out, 1)[0].T, 3e-2)
    assert_close(d_x, nearest(d_hidden, 1)[0] @ nearest(kernel_in, 1)[0].T, 3e-2)
    assert_close(d_in, nearest(exact(x).T, 1)[0] @ nearest(d_hidden, 0)[0], 3e-2)
    assert_close(d_out, nearest(rounded(g).T, 1)[0] @ nearest(squared, 0)[0], 3e-2)


def test_what_eight_bits_cost():
    # As wide as micro: a hundredth of a product, two of the feed-forward layer, and nothing that adds up.
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(200, 512)), jnp.bfloat16)
    kernel_in, kernel_out = (jnp.asarray(rng.normal(size=(512, 2048)) / 22, jnp.bfloat16) for _ in range(2))

    def mlp(quantized):
        return jax.jit(squared_relu_mlp)(x, kernel_in, kernel_out, *quantized)

    product = exact(x) @ exact(kernel_in)
    assert 0.002 < relative_error(dense(x, kernel_in, quantize_kernel(kernel_in)), product) < 0.015
    assert relative_error(mlp((quantize_kernel(kernel_in), quantize_kernel(kernel_out))), mlp(())) < 0.03


def test_no_gradient_goes_through_the_steps():
    x, kernel = jnp.ones((3, 4)), jnp.asarray(np.random.default_rng(0).normal(size=(4, 5)), jnp.bfloat16)
    through = jax.grad(lambda w: dense(x, kernel, quantize_kernel(w)).sum())(kernel)
    np.testing.assert_array_equal(exact(through), 0)


@pytest.mark.usefixtures("compiled_as_shipped")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_not_finite_stays_so(dtype):
    # First, last and in between of what a maximum is taken of in parts.
    x, kernel = (jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype) for shape in ((96, 64), (64, 128)))
    g = jnp.ones((96, 128))

    @jax.jit
    def everything(x, kernel, g):
        narrow = kernel.astype(jnp.bfloat16)
        return gradients(lambda x, w: dense(x, w, quantize_kernel(w)), (x, narrow), g)

    for bad, place in itertools.product((np.nan, np.inf, -np.inf), (0, 31, 63)):
        y, (_, d_kernel) = everything(x.at[5, place].set(bad), kernel, g)
        assert not np.isfinite(exact(y[5])).any()
        assert np.isfinite(exact(y[:5])).all()
        assert not np.isfinite(exact(d_kernel[place])).any()
        _, (d_x, d_kernel) = everything(x, kernel, g.at[7, place].set(bad))
        assert not np.isfinite(exact(d_x[7])).any()
        assert not np.isfinite(exact(d_kernel[:, place])).any()
        y, (d_x, _) = everything(x, kernel.at[3, place].set(bad), g)
        assert not np.isfinite(exact(y[:, place])).any()
        assert not np.isfinite(exact(d_x[:, 3])).any()
