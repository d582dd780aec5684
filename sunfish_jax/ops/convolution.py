"""A short depthwise convolution along the sequence, as shifted sums that fuse into their neighbours."""

import functools

import jax
import jax.numpy as jnp

# How many products are added in one pass over both factors of the kernel's gradient.
_PARTS = 4


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def depthwise_convolution(
    x: jax.Array, kernel: jax.Array, reach: tuple[jax.Array, jax.Array], causal: bool = False
) -> jax.Array:
    """y[n, w] = sum_j kernel[j, w] x[n + j - K // 2, w], with zeros beyond the ends of the row of n.

    Args:
      x: [N, W].
      kernel: [K, W], K odd.
      reach: how many positions of its row come before each position, and how many after, [N] each.
      causal: take x[n + j - (K - 1), w] instead, which looks back only.

    Returns:
      [N, W].
    """
    return _forward(x, kernel, reach, causal)[0]


def _shifted(x: jax.Array, reach: tuple[jax.Array, jax.Array], offsets: list[int]) -> list[jax.Array]:
    """For each offset, x[n + offset], or zero where that is no position of the row of n."""
    before, after = reach
    widest = max(map(abs, offsets))
    padded = jnp.pad(x, ((widest, widest), (0, 0)))
    shifted = []
    for offset in offsets:
        within = (before + offset >= 0) & (after - offset >= 0)
        part = padded[widest + offset : widest + offset + len(x)]
        shifted.append(jnp.where(within[:, None], part, 0))
    return shifted


def _offsets(kernel: jax.Array, causal: bool) -> list[int]:
    before = len(kernel) - 1 if causal else len(kernel) // 2
    return [j - before for j in range(len(kernel))]


def _forward(x, kernel, reach, causal):
    y = sum(tap * part for tap, part in zip(kernel, _shifted(x, reach, _offsets(kernel, causal)), strict=True))
    # x alone is kept. The automatic gradient would keep every shifted copy.
    return y, (x, kernel, reach)


def _backward(causal, residuals, g):
    x, kernel, reach = residuals
    offsets = _offsets(kernel, causal)
    back = _shifted(g, reach, [-offset for offset in offsets])
    d_x = sum(tap * part for tap, part in zip(kernel, back, strict=True))
    # A quarter of the positions at a time in one fusion first: XLA:CPU multiplies and adds in one pass only where
    # it adds few, and each of them is code of its own.
    unfilled = -len(x) % _PARTS
    parts_of_g = jnp.split(jnp.pad(g, ((0, unfilled), (0, 0))), _PARTS)
    products = []
    for shifted in _shifted(x, reach, offsets):
        parts = jnp.split(jnp.pad(shifted, ((0, unfilled), (0, 0))), _PARTS)
        products.append(sum(part_of_g * part for part_of_g, part in zip(parts_of_g, parts, strict=True)))
    d_kernel = jax.lax.optimization_barrier(jnp.stack(products)).sum(axis=1)
    return d_x, d_kernel, None


depthwise_convolution.defvjp(_forward, _backward)
