"""Rotary positions, and heads taken from the product that makes queries, keys and values."""

import functools

import jax
import jax.numpy as jnp

from sunfish_jax.ops.rows import Rows

_BASE = 10_000.0


def rotary(x: jax.Array, first: jax.Array | int = 0) -> jax.Array:
    """Rotary position embedding (Su et al. 2021) along the sequence.

    Args:
      x: [..., S, d], d even.
      first: the position of the first of the S.

    Returns:
      [..., S, d] in x's dtype: pair (i, i + d/2) turned by the angle (first + s) * base^(-2i/d).
    """
    return _turn(x.astype(jnp.float32), *_turns(x.shape[-2], x.shape[-1], first)).astype(x.dtype)


def _turns(length: int, head_dim: int, first: jax.Array | int = 0) -> tuple[jax.Array, jax.Array]:
    """cos and signed sin of each position's angles, [S, d] each."""
    half = head_dim // 2
    frequencies = _BASE ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = (first + jnp.arange(length, dtype=jnp.float32))[:, None] * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    turns = jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)
    # Without the barrier XLA computes the cosine again for every row and head, in the loop that multiplies by it.
    return jax.lax.optimization_barrier(turns)


def _turn(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """x cos + (the other of each pair) sin."""
    return x * cos + _halves_swapped(x) * sin


def _halves_swapped(x: jax.Array) -> jax.Array:
    """[..., d] with the two halves of the last dimension in each other's place.

    A sum of two paddings stays in one loop with what surrounds it. A roll, which is a concatenation, has loops of
    its own: with one, turning the pairs took up to three times as long.
    """
    half = x.shape[-1] // 2
    around = [(0, 0, 0)] * (x.ndim - 1)
    zero = jnp.zeros((), x.dtype)
    return jax.lax.pad(x, zero, [*around, (-half, half, 0)]) + jax.lax.pad(x, zero, [*around, (half, -half, 0)])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def rotary_heads(
    qkv: jax.Array, rows: Rows, num_heads: int, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries and keys, turned by their positions, and values, head by head.

    Args:
      qkv: [N, 3*H*d] float32, the three beside each other.
      rows: B rows of at most S among the N positions.
      num_heads: H.
      dtype: what attention multiplies in.

    Returns:
      Three of [B, H, S, d] in that dtype.
    """
    return _rotary_heads_forward(qkv, rows, num_heads, dtype)[0]


def _turns_of(rows: Rows, head_dim: int) -> tuple[jax.Array, jax.Array]:
    """What `_turn` takes for [N, H, d]."""
    cos, sin = (rows.at_places(turn)[:, None] for turn in _turns(rows.longest, head_dim))
    return cos, sin


def _rotary_heads_forward(qkv, rows, num_heads, dtype):
    q, k, v = jnp.moveaxis(qkv.reshape(len(qkv), 3, num_heads, -1), 1, 0)
    turns = _turns_of(rows, q.shape[-1])
    parts = _turn(q, *turns), _turn(k, *turns), v
    return tuple(rows.windows(part.astype(dtype)) for part in parts), rows


def _rotary_heads_backward(num_heads, dtype, rows, g):
    del num_heads, dtype
    # Moved while they are narrow, and turned back where they lie then: the way of least memory traffic.
    q, k, v = jax.lax.optimization_barrier(tuple(rows.positions(part) for part in g))
    cos, sin = _turns_of(rows, q.shape[-1])
    back = [_turn(part.astype(jnp.float32), cos, -sin) for part in (q, k)]
    d_qkv = jnp.stack([*back, v.astype(jnp.float32)], axis=1)
    return d_qkv.reshape(len(d_qkv), -1), None


rotary_heads.defvjp(_rotary_heads_forward, _rotary_heads_backward)
