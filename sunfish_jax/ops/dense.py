"""Matrix products whose gradients stay on XLA:CPU's fast path."""

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from sunfish_jax.ops.eigen import in_eigen
from sunfish_jax.ops.quantized import Quantized, QuantizedKernel, quantize, quantized_product


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
def dense(x: jax.Array, kernel: jax.Array, quantized: QuantizedKernel | None = None) -> jax.Array:
    """x @ kernel, computed in the kernel's dtype and accumulated in float32.

    Args:
      x: [N, K], any float dtype; cast to the kernel's.
      kernel: [K, M].
      quantized: the same kernel in eight bits, to multiply with it and its gradients so: x and the gradient of the
        result are quantised too.

    Returns:
      [N, M] float32: XLA:CPU may take half as long again for a bfloat16 result.
    """
    return _dense_forward(x, kernel, quantized)[0]


def _dense_forward(x, kernel, quantized):
    low = _narrow(x, kernel, quantized)
    # A zero-size array carries the input's dtype to the backward pass, where the gradient must have it.
    return _times(low, kernel, quantized), (low, kernel, quantized, jnp.zeros((0,), x.dtype))


def _dense_backward(residuals, g):
    x, kernel, quantized, like_x = residuals
    g = _narrow(g, kernel, quantized)
    return (
        input_gradient(g, kernel, quantized).astype(like_x.dtype),
        kernel_gradient(x, g, quantized is not None),
        None,
    )


def _narrow(x, kernel, quantized):
    """x in the kernel's dtype."""
    low = x.astype(kernel.dtype)
    # Read twice to be quantised by row, and twice by column: not to be made again for each.
    return low if quantized is None else jax.lax.optimization_barrier(low)


def _times(x, kernel, quantized):
    """x @ kernel."""
    if quantized is not None:
        return quantized_product(quantize(x, 1), quantized.by_column)
    return jnp.dot(x, kernel, preferred_element_type=jnp.float32)


def _times_transposed(x, kernel, quantized):
    """x @ kernel.T."""
    if quantized is not None:
        return quantized_product(quantize(x, 1), quantized.by_row, transposed=True)
    return jax.lax.dot_general(x, kernel, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def input_gradient(g: jax.Array, kernel: jax.Array, quantized: QuantizedKernel | None = None) -> jax.Array:
    """g @ kernel.T, float32, for g [N, M] and kernel [K, M]: the gradient with respect to a dense layer's input."""
    if quantized is None and in_eigen(kernel.dtype):
        return jnp.dot(g, transposed_copy(kernel), preferred_element_type=jnp.float32)
    return _times_transposed(g, kernel, quantized)


def kernel_gradient(x: jax.Array, g: jax.Array, in_eight_bits: bool = False) -> jax.Array:
    """x.T @ g for x [N, K] and g [N, M]: the gradient with respect to a dense layer's kernel.

    Rounded to the dtype of g only in name where the result is summed in float32: XLA leaves the two casts out.
    """
    if in_eight_bits:
        columns = quantize(x, 0)
        rows = Quantized(transposed_copy(columns.values), columns.steps.T)
        return quantized_product(rows, quantize(g, 0)).astype(g.dtype)
    return jnp.dot(transposed_copy(x), g, preferred_element_type=jnp.float32).astype(g.dtype)


dense.defvjp(_dense_forward, _dense_backward)


@jax.custom_vjp
def squared_relu_mlp(
    x: jax.Array,
    kernel_in: jax.Array,
    kernel_out: jax.Array,
    quantized_in: QuantizedKernel | None = None,
    quantized_out: QuantizedKernel | None = None,
) -> jax.Array:
    """relu(x @ kernel_in)^2 @ kernel_out.T, keeping one narrow array for the backward pass.

    What is kept is the square: its root gives relu(x @ kernel_in) back, which the gradient of the square needs.
    With the second kernel stored the other way round its gradient too needs a transposed copy of a narrow array
    only, [N, K].

    Args:
      x: [N, K], cast to the kernels' dtype.
      kernel_in: [K, M].
      kernel_out: [K, M].
      quantized_in, quantized_out: the same kernels, as for `dense`.

    Returns:
      [N, K] in float32.
    """
    return _mlp_forward(x, kernel_in, kernel_out, quantized_in, quantized_out)[0]


def _mlp_forward(x, kernel_in, kernel_out, quantized_in, quantized_out):
    low = _narrow(x, kernel_in, quantized_in)
    hidden = _times(low, kernel_in, quantized_in)
    squared = _narrow(jnp.square(jax.nn.relu(hidden)), kernel_out, quantized_out)
    y = _times_transposed(squared, kernel_out, quantized_out)
    kernels = (kernel_in, kernel_out, quantized_in, quantized_out)
    return y, (low, squared, kernels, jnp.zeros((0,), x.dtype))


def _mlp_backward(residuals, g):
    low, squared, (kernel_in, kernel_out, quantized_in, quantized_out), like_x = residuals
    g = _narrow(g, kernel_out, quantized_out)
    d_kernel_out = kernel_gradient(g, squared, quantized_out is not None)
    d_squared = _times(g, kernel_out, quantized_out)
    d_hidden = 2.0 * jnp.sqrt(squared.astype(jnp.float32)) * d_squared
    d_hidden = _narrow(d_hidden, kernel_in, quantized_in)
    d_kernel_in = kernel_gradient(low, d_hidden, quantized_in is not None)
    d_x = input_gradient(d_hidden, kernel_in, quantized_in).astype(like_x.dtype)
    return d_x, d_kernel_in, d_kernel_out, None, None


squared_relu_mlp.defvjp(_mlp_forward, _mlp_backward)
