"""The nearest orthogonal matrix, in products that stay on XLA:CPU's fast path."""

import jax
import jax.numpy as jnp

from sunfish_jax.ops.dense import transposed_copy

# Odd quintics a x + b x^3 + c x^5, to be applied in this order: of all such, each takes the interval of singular
# values that the one before leaves closest to one. They start from [0.01, 1] and end in [0.73, 1.27] (the optimal
# composition of Amsel et al. 2025, arXiv 2505.16932; solved for this interval as linear programs).
_QUINTICS = ((8.0934, -23.6204, 17.4462), (3.6366, -2.7219, 0.5365), (2.6613, -1.9772, 0.4526))


def orthogonalize(matrices: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """U V^T, nearly, for matrices U S V^T, by a Newton-Schulz iteration.

    Singular values are measured in units of (sum_i s_i^4)^(1/4), which bounds the largest from above much more
    closely than the Frobenius norm and comes for nothing: it is the root of the norm of the first Gram matrix.

    Args:
      matrices: [..., M, N]; many of one shape in one call keep all cores busy.
      dtype: what the products are computed in; bfloat16 is precise enough for an optimiser's direction.

    Returns:
      [..., M, N] float32. Singular values of at least a hundredth of that unit become about one.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices / (_norm(matrices) + 1e-7)).astype(dtype)
    # The iteration works on the smaller Gram matrices, [rows, rows].
    x = transposed_copy(x) if tall else x
    for step, (a, b, c) in enumerate(_QUINTICS):
        gram = _product(x, x, x.ndim - 1)
        if step == 0:
            unit = _norm(gram) + 1e-7
            gram, x = gram / unit, (x.astype(jnp.float32) * jax.lax.rsqrt(unit)).astype(dtype)
        narrow = gram.astype(dtype)
        polynomial = b * gram + c * _product(narrow, narrow, x.ndim - 2)
        correction = _product(polynomial.astype(dtype), x, x.ndim - 2)
        x = (a * x.astype(jnp.float32) + correction).astype(dtype)
    return (transposed_copy(x) if tall else x).astype(jnp.float32)


def _norm(matrices: jax.Array) -> jax.Array:
    return jnp.linalg.norm(matrices, axis=(-2, -1), keepdims=True)


def _product(left: jax.Array, right: jax.Array, right_axis: int) -> jax.Array:
    """Contracts the last dimension of left [..., R, K] with one of right's last two; float32."""
    batch = tuple(range(left.ndim - 2))
    dimensions = (((left.ndim - 1,), (right_axis,)), (batch, batch))
    return jax.lax.dot_general(left, right, dimensions, preferred_element_type=jnp.float32)
