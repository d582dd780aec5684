"""A short depthwise convolution along the sequence, as shifted sums that fuse into their neighbours."""

import jax
import jax.numpy as jnp


def depthwise_convolution(x: jax.Array, kernel: jax.Array, causal: bool = False) -> jax.Array:
    """y[b, s, w] = sum_j kernel[j, w] x[b, s + j - K // 2, w], with zeros beyond the ends.

    Args:
      x: [B, S, W].
      kernel: [K, W], K odd.
      causal: take x[b, s + j - (K - 1), w] instead, which looks back only.

    Returns:
      [B, S, W].
    """
    reach = kernel.shape[0] // 2
    before, after = (2 * reach, 0) if causal else (reach, reach)
    padded = jnp.pad(x, ((0, 0), (before, after), (0, 0)))
    return sum(kernel[j] * padded[:, j : j + x.shape[1]] for j in range(kernel.shape[0]))
