"""Matrix products whose gradients stay on XLA:CPU's fast path."""

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from sunfish_jax.ops.eigen import in_eigen


def transposed_copy(x: jax.Array) -> jax.Array:
    """Swaps the last two dimensions and stores the result row by row.

    XLA:CPU hands a dot to its fast library only when the left operand is contracted over its last dimension in
    the default layout. A bare transpose is folded back into the slow form; the layout constraint keeps the copy.

    Args:
      x: [..., M, N].

    Returns:
      [..., N, M].
    """
    # What the same loop were to put together first would be read the slow way.
    return row_major(jnp.swapaxes(jax.lax.optimization_barrier(x), -1, -2))


def row_major(x: jax.Array) -> jax.Array:
    """x itself, stored in the order of its dimensions when it is next read; on a CPU only."""
    if jax.default_backend() != "cpu":
        return x
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


@jax.custom_vjp
def dense(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x @ kernel, computed in the kernel's dtype and accumulated in float32.

    Args:
      x: [N, K], any float dtype; cast to the kernel's.
      kernel: [K, M].

    Returns:
      [N, M] float32: XLA:CPU may take half as long again for a bfloat16 result.
    """
    return _dense_forward(x, kernel)[0]


def _dense_forward(x, kernel):
    y = jnp.dot(x.astype(kernel.dtype), kernel, preferred_element_type=jnp.float32)
    # A zero-size array carries the input's dtype to the backward pass, where the gradient must have it.
    return y, (x.astype(kernel.dtype), kernel, jnp.zeros((0,), x.dtype))


def _dense_backward(residuals, g):
    x, kernel, like_x = residuals
    g = g.astype(kernel.dtype)
    return input_gradient(g, kernel).astype(like_x.dtype), kernel_gradient(x, g)


def input_gradient(g: jax.Array, kernel: jax.Array) -> jax.Array:
    """g @ kernel.T, float32, for g [N, M] and kernel [K, M]: the gradient with respect to a dense layer's input."""
    if in_eigen(kernel.dtype):
        return jnp.dot(g, transposed_copy(kernel), preferred_element_type=jnp.float32)
    return _times_transposed(g, kernel)


def _times_transposed(left, right):
    return jax.lax.dot_general(left, right, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def kernel_gradient(x: jax.Array, g: jax.Array) -> jax.Array:
    """x.T @ g for x [N, K] and g [N, M]: the gradient with respect to a dense layer's kernel.

    Rounded to the dtype of g only in name where the result is summed in float32: XLA leaves the two casts out.
    """
    return jnp.dot(transposed_copy(x), g, preferred_element_type=jnp.float32).astype(g.dtype)


dense.defvjp(_dense_forward, _dense_backward)


@jax.custom_vjp
def squared_relu_mlp(x: jax.Array, kernel_in: jax.Array, kernel_out: jax.Array) -> jax.Array:
    """relu(x @ kernel_in)^2 @ kernel_out.T, keeping one narrow array for the backward pass.

    What is kept is the square: its root gives relu(x @ kernel_in) back, which the gradient of the square needs.
    With the second kernel stored the other way round its gradient too needs a transposed copy of a narrow array
    only, [N, K].

    Args:
      x: [N, K], cast to the kernels' dtype.
      kernel_in: [K, M].
      kernel_out: [K, M].

    Returns:
      [N, K] in float32.
    """
    return _mlp_forward(x, kernel_in, kernel_out)[0]


def _mlp_forward(x, kernel_in, kernel_out):
    low = x.astype(kernel_in.dtype)
    hidden = jnp.dot(low, kernel_in, preferred_element_type=jnp.float32)
    squared = jnp.square(jax.nn.relu(hidden)).astype(kernel_in.dtype)
    y = _times_transposed(squared, kernel_out)
    return y, (low, squared, kernel_in, kernel_out, jnp.zeros((0,), x.dtype))


def _mlp_backward(residuals, g):
    low, squared, kernel_in, kernel_out, like_x = residuals
    g = g.astype(kernel_out.dtype)
    d_kernel_out = kernel_gradient(g, squared)
    d_squared = jnp.dot(g, kernel_out, preferred_element_type=jnp.float32)
    d_hidden = (2.0 * jnp.sqrt(squared.astype(jnp.float32)) * d_squared).astype(kernel_in.dtype)
    d_kernel_in = kernel_gradient(low, d_hidden)
    return input_gradient(d_hidden, kernel_in).astype(like_x.dtype), d_kernel_in, d_kernel_out


squared_relu_mlp.defvjp(_mlp_forward, _mlp_backward)
