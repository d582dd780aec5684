"""The nearest orthogonal matrix, in products that stay on XLA:CPU's fast path."""

import jax
import jax.numpy as jnp

from sunfish_jax.ops.dense import transposed_copy

# Quintic whose five-fold iteration takes singular values in (0, 1] to about [0.7, 1.2] (K. Jordan et al.,
# "Muon: an optimizer for hidden layers in neural networks", 2024).
_QUINTIC = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


def orthogonalize(matrix: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """U V^T, nearly, for a matrix U S V^T, by a Newton-Schulz iteration.

    Args:
      matrix: [M, N].
      dtype: what the products are computed in; bfloat16 is precise enough for an optimiser's direction.

    Returns:
      [M, N] float32, with singular values of about one.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix / (jnp.linalg.norm(matrix) + 1e-7)
    x = x.astype(dtype)
    # The iteration works on the smaller Gram matrix, [rows, rows].
    x = transposed_copy(x) if tall else x
    a, b, c = _QUINTIC
    for _ in range(_ITERATIONS):
        gram = jax.lax.dot_general(x, x, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        narrow = gram.astype(dtype)
        polynomial = b * gram + c * jnp.dot(narrow, narrow, preferred_element_type=jnp.float32)
        step = jnp.dot(polynomial.astype(dtype), x, preferred_element_type=jnp.float32)
        x = (a * x.astype(jnp.float32) + step).astype(dtype)
    return (transposed_copy(x) if tall else x).astype(jnp.float32)
