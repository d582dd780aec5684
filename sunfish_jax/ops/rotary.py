"""Rotary positions, and heads taken from the product that makes queries, keys and values."""

import functools

import jax
import jax.numpy as jnp

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
    """x cos + (the other of each pair) sin. A roll stays in one loop with what surrounds it; two halves do not."""
    return x * cos + jnp.roll(x, x.shape[-1] // 2, axis=-1) * sin


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def rotary_heads(
    qkv: jax.Array, batch: int, num_heads: int, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries and keys, turned by their positions, and values, head by head.

    Args:
      qkv: [B*S, 3*H*d] float32, the three beside each other.
      batch: B.
      num_heads: H.
      dtype: what attention multiplies in.

    Returns:
      Three of [B, H, S, d] in that dtype.
    """
    return _rotary_heads_forward(qkv, batch, num_heads, dtype)[0]


def _rotary_heads_forward(qkv, batch, num_heads, dtype):
    rows = qkv.reshape(batch, -1, 3, num_heads, qkv.shape[-1] // (3 * num_heads))
    cos, sin = (turn[:, None] for turn in _turns(rows.shape[1], rows.shape[-1]))
    parts = _turn(rows[:, :, 0], cos, sin), _turn(rows[:, :, 1], cos, sin), rows[:, :, 2]
    return tuple(part.astype(dtype).transpose(0, 2, 1, 3) for part in parts), None


def _rotary_heads_backward(batch, num_heads, dtype, residuals, g):
    del num_heads, residuals
    cos, sin = _turns(*g[0].shape[-2:])
    # Turned back where they lie and narrowed, and only then moved: the way of least memory traffic.
    back = [_turn(part.astype(jnp.float32), cos, -sin).astype(dtype) for part in g[:2]]
    back = jax.lax.optimization_barrier((*back, g[2]))
    merged = [part.transpose(0, 2, 1, 3).reshape(batch * part.shape[2], -1) for part in back]
    return (jnp.concatenate(merged, axis=-1).astype(jnp.float32),)


rotary_heads.defvjp(_rotary_heads_forward, _rotary_heads_backward)
