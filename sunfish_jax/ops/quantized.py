"""Matrix products in eight bits, which processors with VNNI instructions make faster than in bfloat16.

A matrix is rounded to multiples of a step of each row or column, so that a product of integers is exact but for
that rounding: y_ij = s_i t_j sum_k a_ik b_kj (Dettmers et al. 2022, arXiv 2208.07339). Gradients take the rounding
for the identity, as in training with eight bits elsewhere, where those of kernels are often left in 16 (Wortsman et
al. 2023, arXiv 2304.13013): here they are not (docs/experiments.md).
"""

import math

import flax.struct
import jax
import jax.numpy as jnp

# int8 without its lowest value, so that the range is symmetric.
_LARGEST = 127.0
# Keeps a row of zeros from being divided by zero.
_SMALLEST = 1e-30
# Of a row or a column, whose maxima are made at once.
_PARTS = 32


@flax.struct.dataclass
class Quantized:
    """A matrix, nearly: `values * steps`.

    Attributes:
      values: [N, K] int8.
      steps: float32, [N, 1] or [1, K].
    """

    values: jax.Array
    steps: jax.Array


@flax.struct.dataclass
class QuantizedKernel:
    """A kernel [K, M] for the two ways in which a dense layer and its gradient multiply with it.

    The steps of both matrices must be those of what is not summed over.

    Attributes:
      by_column: for x @ kernel, a step for each of the M columns.
      by_row: for g @ kernel.T, a step for each of the K rows.
    """

    by_column: Quantized
    by_row: Quantized


def quantize(x: jax.Array, axis: int) -> Quantized:
    """The nearest multiples of steps that are a 127th of the largest absolute value along an axis.

    What is not finite in x makes its step so, and with it all that is multiplied by that.

    Args:
      x: [N, K], rounded to bfloat16.
      axis: 1 for a step for each row, 0 for one for each column.
    """
    x = x.astype(jnp.bfloat16)
    steps = jnp.maximum(_largest(x, axis).astype(jnp.float32), _SMALLEST) / _LARGEST
    return Quantized(jnp.round(x.astype(jnp.float32) * (1.0 / steps)).astype(jnp.int8), steps)


def _largest(x: jax.Array, axis: int) -> jax.Array:
    """max |x| along an axis of a bfloat16 matrix, which stays with length 1; NaN where there is one.

    Without the sign, the bits of floating-point numbers are integers in the order of absolute values, infinity and
    then NaN above all. A maximum of integers XLA makes in a loop of its own, in two thirds of the time of the fast
    library's, of which every one is a program to load at the start.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.int16) & jnp.int16(0x7FFF)
    rows, columns = x.shape
    # Parts of a row, or of a column, with each other first: a loop over x itself, vectorised over what is not
    # compared. XLA divides a whole column of its own accord, but stores the bits of all of x for that.
    if axis == 1:
        bits = bits.reshape(rows, math.gcd(columns, _PARTS), -1)
    else:
        bits = bits.reshape(math.gcd(rows, _PARTS), -1, columns)
    bits = jax.lax.optimization_barrier(jnp.max(bits, axis))
    return jax.lax.bitcast_convert_type(jnp.max(bits, axis, keepdims=True), jnp.bfloat16)


def quantize_kernel(kernel: jax.Array) -> QuantizedKernel:
    """A kernel [K, M] both ways; no gradient flows."""
    kernel = jax.lax.stop_gradient(kernel)
    return QuantizedKernel(by_column=quantize(kernel, 0), by_row=quantize(kernel, 1))


def quantized_product(left: Quantized, right: Quantized, transposed: bool = False) -> jax.Array:
    """left @ right or, transposed, left @ right.T.

    Args:
      left: [N, K] with a step for each row.
      right: [K, M] with a step for each column; transposed, [M, K] with a step for each row. The sums of up to
        133,000 terms K fit into int32 whatever they are.

    Returns:
      [N, M] float32.
    """
    dimensions = (((1,), (1 if transposed else 0,)), ((), ()))
    y = jax.lax.dot_general(left.values, right.values, dimensions, preferred_element_type=jnp.int32)
    return y.astype(jnp.float32) * left.steps * right.steps.reshape(1, -1)
