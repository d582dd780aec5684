"""A short depthwise convolution along the sequence, as shifted sums that fuse into their neighbours."""

import jax
import jax.numpy as jnp


def depthwise_convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """y[b, s, w] = sum_j kernel[j, w] x[b, s + j - K // 2, w], with zeros beyond the ends.

    Args:
      x: [B, S, W].
      kernel: [K, W], K odd.

    Returns:
      [B, S, W].
    """
    reach = kernel.shape[0] // 2
    padded = jnp.pad(x, ((0, 0), (reach, reach), (0, 0)))
    return sum(kernel[j] * padded[:, j : j + x.shape[1]] for j in range(kernel.shape[0]))
