"""A short depthwise convolution along the sequence, as shifted sums that fuse into their neighbours."""

import functools

import jax
import jax.numpy as jnp

# How many products are added in one pass over both factors of the kernel's gradient.
_PARTS = 4


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def depthwise_convolution(x: jax.Array, kernel: jax.Array, causal: bool = False) -> jax.Array:
    """y[b, s, w] = sum_j kernel[j, w] x[b, s + j - K // 2, w], with zeros beyond the ends.

    Args:
      x: [B, S, W].
      kernel: [K, W], K odd.
      causal: take x[b, s + j - (K - 1), w] instead, which looks back only.

    Returns:
      [B, S, W].
    """
    return _forward(x, kernel, causal)[0]


def _shifted(x: jax.Array, reach: tuple[int, int]) -> list[jax.Array]:
    """x[b, s + j - before, w] for every j from 0 to before + after; `reach` is (before, after)."""
    padded = jnp.pad(x, ((0, 0), reach, (0, 0)))
    return [padded[:, j : j + x.shape[1]] for j in range(sum(reach) + 1)]


def _reach(kernel: jax.Array, causal: bool) -> tuple[int, int]:
    last = len(kernel) - 1
    return (last, 0) if causal else (last // 2, last // 2)


def _forward(x, kernel, causal):
    y = sum(tap * part for tap, part in zip(kernel, _shifted(x, _reach(kernel, causal)), strict=True))
    # x alone is kept. The automatic gradient would keep every shifted copy.
    return y, (x, kernel)


def _backward(causal, residuals, g):
    x, kernel = residuals
    before, after = _reach(kernel, causal)
    d_x = sum(tap * part for tap, part in zip(kernel[::-1], _shifted(g, (after, before)), strict=True))
    # A quarter of each row at a time in one fusion first: XLA:CPU multiplies and adds in one pass only where it
    # adds few, and each of them is code of its own.
    unfilled = -x.shape[1] % _PARTS
    parts_of_g = jnp.split(jnp.pad(g, ((0, 0), (0, unfilled), (0, 0))), _PARTS, axis=1)
    products = []
    for shifted in _shifted(jnp.pad(x, ((0, 0), (0, unfilled), (0, 0))), (before, after)):
        pairs = zip(parts_of_g, jnp.split(shifted, _PARTS, axis=1), strict=True)
        products.append(sum(part_of_g * part for part_of_g, part in pairs))
    d_kernel = jax.lax.optimization_barrier(jnp.stack(products)).sum(axis=(1, 2))
    return d_x, d_kernel


depthwise_convolution.defvjp(_forward, _backward)
