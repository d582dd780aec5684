import jax.numpy as jnp
import numpy as np
import pytest

from sunfish_jax.ops.orthogonalize import orthogonalize


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16)])
def test_keeps_the_singular_vectors_and_levels_the_values(shape, dtype):
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=shape)
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    # Singular values over a range of 20, as gradients have.
    matrix = u * np.geomspace(20.0, 1.0, len(s)) @ vt
    got = np.asarray(orthogonalize(jnp.asarray(matrix, jnp.float32), jnp.dtype(dtype)), np.float64)
    inner = u.T @ got @ vt.T
    tolerance = 1e-3 if dtype == "float32" else 0.15
    np.testing.assert_allclose(inner - np.diag(np.diag(inner)), 0.0, atol=tolerance)
    # The interval in which the iteration ends.
    slack = 1e-3 if dtype == "float32" else 0.04
    assert (np.diag(inner) > 0.731 - slack).all()
    assert (np.diag(inner) < 1.269 + slack).all()
    # Nothing outside the matrix's own row and column space.
    np.testing.assert_allclose(u @ inner @ vt, got, atol=tolerance)


def test_a_stack_is_done_one_by_one():
    stack = jnp.asarray(np.random.default_rng(0).normal(size=(3, 12, 8)), jnp.float32)
    one_by_one = [
        orthogonalize(matrix, jnp.dtype("float32")) for matrix in stack * jnp.array([1, 10, 100])[:, None, None]
    ]
    np.testing.assert_allclose(orthogonalize(stack, jnp.dtype("float32")), np.stack(one_by_one), atol=1e-4)


def test_the_smallest_singular_value_that_is_levelled():
    # One large value is all of the unit, so the other is a hundredth of it.
    matrix = jnp.diag(jnp.array([1.0, 0.01]))
    got = orthogonalize(matrix, jnp.dtype("float32"))
    np.testing.assert_allclose(jnp.diag(got), 1.0, atol=0.27)


@pytest.mark.parametrize("scale", [1e-14, 1e-9, 1e-3, 1e6])
def test_the_scale_of_the_matrix_does_not_matter(scale):
    matrix = jnp.asarray(np.random.default_rng(0).normal(size=(8, 12)), jnp.float32)
    scaled = orthogonalize(scale * matrix, jnp.dtype("float32"))
    np.testing.assert_allclose(scaled, orthogonalize(matrix, jnp.dtype("float32")), atol=1e-3)


def test_what_is_too_small_to_measure_does_not_grow():
    matrix = 1e-22 * jnp.asarray(np.random.default_rng(0).normal(size=(8, 12)), jnp.float32)
    assert np.abs(orthogonalize(matrix, jnp.dtype("float32"))).max() < 1.3


def test_a_zero_matrix_stays_zero():
    assert not np.any(orthogonalize(jnp.zeros((4, 6)), jnp.dtype("float32")))
