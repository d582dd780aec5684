"""Multi-head attention whose gradients stay on XLA:CPU's fast path."""

import functools

import jax
import jax.numpy as jnp

from sunfish_jax.ops.dense import transposed_copy

_MASKED = -1e9


def _batched(a: jax.Array, b: jax.Array, b_axis: int, out_dtype) -> jax.Array:
    """Contracts the last dimension of a [B, H, M, K] with dimension `b_axis` (2 or 3) of b."""
    dimensions = (((3,), (b_axis,)), ((0, 1), (0, 1)))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=out_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, causal: bool = False) -> jax.Array:
    """softmax(q k^T / sqrt(d)) v for every head.

    Args:
      q: [B, H, S, d].
      k: [B, H, T, d].
      v: [B, H, T, d].
      mask: [B, T] bool, False at keys that no query may attend to; None for no mask. A row of all False
        attends to every key alike.
      causal: query s attends to no key after the s-th.

    Returns:
      [B, H, S, d] in the dtype of v.
    """
    return _attention_forward(q, k, v, mask, causal)[0]


def _probabilities(q, k, mask, causal):
    scores = _batched(q, k, 3, jnp.float32) * (q.shape[-1] ** -0.5)
    if mask is not None:
        scores = jnp.where(mask[:, None, None, :], scores, _MASKED)
    if causal:
        scores = jnp.where(jnp.tri(*scores.shape[-2:], dtype=bool), scores, _MASKED)
    scores = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    return (scores / scores.sum(axis=-1, keepdims=True)).astype(q.dtype)


def _attention_forward(q, k, v, mask, causal):
    p = _probabilities(q, k, mask, causal)
    return _batched(p, v, 2, v.dtype), (q, k, v, p)


def _attention_backward(causal, residuals, g):
    # Where a query attends to nothing p is 0, and so are the gradients.
    del causal
    q, k, v, p = residuals
    g = g.astype(v.dtype)
    d_v = _batched(transposed_copy(p), g, 2, v.dtype)
    d_p = _batched(g, v, 3, jnp.float32)
    p32 = p.astype(jnp.float32)
    d_scores = p32 * (d_p - (d_p * p32).sum(axis=-1, keepdims=True)) * (q.shape[-1] ** -0.5)
    d_scores = d_scores.astype(q.dtype)
    d_q = _batched(d_scores, k, 2, q.dtype)
    d_k = _batched(transposed_copy(d_scores), q, 2, k.dtype)
    return d_q, d_k, d_v, None


attention.defvjp(_attention_forward, _attention_backward)
