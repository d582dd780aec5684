"""The nearest orthogonal matrix, in products that stay on XLA:CPU's fast path."""

import jax
import jax.numpy as jnp

from sunfish_jax.ops.dense import transposed_copy

# Odd quintics a x + b x^3 + c x^5, to be applied in this order: of all such, each takes the interval of singular
# values that the one before leaves closest to one. They start from [0.01, 1] and end in [0.73, 1.27] (the optimal
# composition of Amsel et al. 2025, arXiv 2505.16932; solved for this interval as linear programs).
_QUINTICS = ((8.0934, -23.6204, 17.4462), (3.6366, -2.7219, 0.5365), (2.6613, -1.9772, 0.4526))
# Keeps a matrix of zeros from being divided by zero.
_SMALLEST = 1e-30


def orthogonalize(matrices: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """U V^T, nearly, for matrices X = U S V^T, by a Newton-Schulz iteration.

    The iteration X <- (a + b G + c G^2) X with G = X X^T multiplies X with polynomials of G alone, so they are made
    among the Gram matrices, and X itself is touched twice: for the first G, and to be multiplied with them all.

    Singular values are measured in units of (sum_i s_i^4)^(1/4), which bounds the largest from above much more
    closely than the Frobenius norm and comes for nothing: it is the root of the norm of the first Gram matrix.

    Args:
      matrices: [..., M, N]; many of one shape in one call keep all cores busy.
      dtype: what the products are computed in; bfloat16 is precise enough for an optimiser's direction.

    Returns:
      [..., M, N] float32. Singular values of at least a hundredth of that unit become about one.
    """
    matrices = matrices.astype(dtype)
    tall = matrices.shape[-2] > matrices.shape[-1]
    # The smaller Gram matrices, [rows, rows].
    wide = transposed_copy(matrices) if tall else matrices
    first_gram = _product(wide, wide, transpose=True)
    # By the sum of s_i^2 first: of a small gradient, the s_i^4 that the norm adds up would be no float32.
    size = jnp.trace(first_gram, axis1=-2, axis2=-1)[..., None, None] + _SMALLEST
    first_gram = first_gram / size
    unit = jnp.linalg.norm(first_gram, axis=(-2, -1), keepdims=True) + 1e-7
    first_gram = (first_gram / unit).astype(dtype)
    gram, together = first_gram, None
    for a, b, c in _QUINTICS:
        if together is not None:
            # Of what has been rounded, so that a rounding error is made good by the iterations after it.
            gram = _product(_multiply(together, first_gram), together, transpose=True).astype(dtype)
        diagonal = a * jnp.eye(gram.shape[-1])
        polynomial = (diagonal + b * gram.astype(jnp.float32) + c * _product(gram, gram)).astype(dtype)
        together = polynomial if together is None else _multiply(polynomial, together)
    together = (together.astype(jnp.float32) * jax.lax.rsqrt(size * unit)).astype(dtype)
    return _product(matrices, together, transpose=True) if tall else _product(together, matrices)


def _multiply(left: jax.Array, right: jax.Array) -> jax.Array:
    """left @ right, rounded to their dtype."""
    return _product(left, right).astype(left.dtype)


def _product(left: jax.Array, right: jax.Array, transpose: bool = False) -> jax.Array:
    """left @ right, or left @ right^T, of [..., R, K] and matrices; float32."""
    batch = tuple(range(left.ndim - 2))
    contracted = right.ndim - 1 if transpose else right.ndim - 2
    dimensions = (((left.ndim - 1,), (contracted,)), (batch, batch))
    return jax.lax.dot_general(left, right, dimensions, preferred_element_type=jnp.float32)
