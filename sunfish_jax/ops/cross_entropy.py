"""The vocabulary head: cross-entropy, and the mean embedding under the predicted distribution."""

import jax
import jax.numpy as jnp

from sunfish_jax.ops.dense import input_gradient, kernel_gradient


def token_logits(features: jax.Array, table: jax.Array, bias: jax.Array) -> jax.Array:
    """features @ table + bias, accumulated and kept in float32.

    Args:
      features: [..., D].
      table: [D, V]; its dtype is the one multiplied in.
      bias: [V] float32.

    Returns:
      [..., V] float32.
    """
    # XLA:CPU's fast library wants two dimensions.
    rows = features.reshape(-1, features.shape[-1]).astype(table.dtype)
    logits = jnp.dot(rows, table, preferred_element_type=jnp.float32)
    return (logits + bias).reshape(*features.shape[:-1], -1)


def expected_embedding(logits: jax.Array, table: jax.Array) -> jax.Array:
    """softmax(logits) @ table, the mean embedding x_hat.

    The division by the softmax's sum comes after the product, where the array is narrow. The sum is that of what is
    multiplied, rounded: so the weights add up to one, and float32 ones need not be stored.

    Args:
      logits: [..., V] float32.
      table: [V, D]; its dtype is the one multiplied in.

    Returns:
      [..., D] float32.
    """
    rows = logits.reshape(-1, logits.shape[-1])
    weights = jnp.exp(rows - rows.max(axis=-1, keepdims=True)).astype(table.dtype)
    # Without the barrier XLA may leave the rounding out, and store float32.
    weights = jax.lax.optimization_barrier(weights)
    total = weights.astype(jnp.float32).sum(axis=-1, keepdims=True)
    mean = jnp.dot(weights, table, preferred_element_type=jnp.float32) / total
    return mean.reshape(*logits.shape[:-1], -1)


@jax.custom_vjp
def cross_entropy(features: jax.Array, table: jax.Array, bias: jax.Array, targets: jax.Array) -> jax.Array:
    """-log softmax(features @ table + bias)[targets] in nats.

    Args:
      features: [N, D].
      table: [D, V], so that its gradient is made the way it is stored; its dtype is the one multiplied in.
      bias: [V] float32, a constant: no gradient flows to it.
      targets: [N] int32 in [0, V).

    Returns:
      [N] float32.
    """
    return _cross_entropy_forward(features, table, bias, targets)[0]


def _cross_entropy_forward(features, table, bias, targets):
    logits = token_logits(features, table, bias)
    highest = logits.max(axis=-1, keepdims=True)
    exponentials = jnp.exp(logits - highest)
    total = exponentials.sum(axis=-1, keepdims=True)
    at_target = jnp.take_along_axis(logits, targets[:, None], axis=1)
    loss = (jnp.log(total) + highest - at_target)[:, 0]
    # d loss / d logits = softmax - onehot(target), kept unnormalised and narrow: half the traffic of float32.
    is_target = jnp.arange(logits.shape[1]) == targets[:, None]
    slope = jnp.where(is_target, exponentials - total, exponentials).astype(table.dtype)
    return loss, (features, table, jnp.zeros_like(bias), slope, total)


def _cross_entropy_backward(residuals, g):
    features, table, no_gradient, slope, total = residuals
    scale = g[:, None] / total
    d_features = scale * input_gradient(slope, table)
    d_table = kernel_gradient((features.astype(jnp.float32) * scale).astype(table.dtype), slope)
    return d_features.astype(features.dtype), d_table, no_gradient, None


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)
