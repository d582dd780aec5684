"""Multi-head attention whose gradients stay on XLA:CPU's fast path."""

import functools

import jax
import jax.numpy as jnp

from sunfish_jax.ops.dense import row_major, transposed_copy

_MASKED = -1e9


def _batched(a: jax.Array, b: jax.Array, b_axis: int) -> jax.Array:
    """Contracts the last dimension of a [B, H, M, K] with dimension `b_axis` of b.

    Args:
      a: [B, H, M, K].
      b: [B, H, N, K] for axis 3, where what comes out are scores or their gradients, which stay float32;
        [B, H, K, N] for axis 2, where it is rounded to b's dtype.
    """
    dimensions = (((3,), (b_axis,)), ((0, 1), (0, 1)))
    dtype = jnp.float32 if b_axis == 3 else b.dtype
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, causal: bool = False) -> jax.Array:
    """softmax(q k^T / sqrt(d)) v for every head.

    Args:
      q: [B, H, S, d].
      k: [B, H, T, d].
      v: [B, H, T, d].
      mask: [B, T] bool, False at keys that no query may attend to; None for no mask. A row of all False
        attends to every key alike, and its gradients mean nothing.
      causal: query s attends to no key after the s-th.

    Returns:
      [B, H, S, d] in the dtype of q, k and v, which is one.
    """
    return _attention_forward(q, k, v, mask, causal)[0]


def _probabilities(q, k, mask, causal):
    scores = _batched(q, k, 3) * (q.shape[-1] ** -0.5)
    if mask is not None:
        scores = jnp.where(mask[:, None, None, :], scores, _MASKED)
    if causal:
        scores = jnp.where(jnp.tri(*scores.shape[-2:], dtype=bool), scores, _MASKED)
    scores = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    return (scores / scores.sum(axis=-1, keepdims=True)).astype(q.dtype)


def _attention_forward(q, k, v, mask, causal):
    # Heads come as transposed views. XLA:CPU would take them as they are, and multiply them the slow way.
    q, k, v = row_major(q), row_major(k), row_major(v)
    p = _probabilities(q, k, mask, causal)
    return _batched(p, v, 2), (q, k, v, p)


def _attention_backward(causal, residuals, g):
    # Where p is 0, as at keys that are masked, the gradients are too: there is no need to know which those are.
    del causal
    q, k, v, p = residuals
    # With the barrier p's transposed copy waits for the backward pass, and is not kept beside p till then.
    p, g = jax.lax.optimization_barrier((p, row_major(g.astype(v.dtype))))
    d_v = _batched(transposed_copy(p), g, 2)
    d_p = _batched(g, v, 3)
    p32 = p.astype(jnp.float32)
    d_scores = p32 * (d_p - (d_p * p32).sum(axis=-1, keepdims=True)) * (q.shape[-1] ** -0.5)
    d_scores = d_scores.astype(q.dtype)
    d_q = _batched(d_scores, k, 2)
    d_k = _batched(transposed_copy(d_scores), q, 2)
    return d_q, d_k, d_v, None


attention.defvjp(_attention_forward, _attention_backward)
