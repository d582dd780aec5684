"""Which of XLA:CPU's two libraries multiplies the matrices of a gradient: its fast one, or in float32 Eigen."""

import jax
import jax.numpy as jnp

# What is left to the fast library: reductions, with the products that lead into them.
_WITHOUT_PRODUCTS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}
# With more, a pass's arrays leave the cache: 4,000 took 1.15 times as long for each as 2,000 (Zen 3).
_POSITIONS_AT_ONCE = 2048


def in_eigen(dtype: jnp.dtype) -> bool:
    """Whether forward and backward passes multiply matrices of this dtype in Eigen.

    In float32 Eigen is the faster one for the products of layers, if they come without a transposed operand
    (docs/performance.md); it has no bfloat16 instructions.
    """
    return jax.default_backend() == "cpu" and jnp.dtype(dtype) == jnp.float32


def compiler_options(dtype: jnp.dtype) -> dict[str, str]:
    """What to jit gradients with whose products are of this dtype."""
    return _WITHOUT_PRODUCTS if in_eigen(dtype) else {}


def passes_at_once(dtype: jnp.dtype, num_passes: int, positions: int) -> int:
    """How many of `num_passes` passes to make as one: Eigen gains from more rows, the fast library does not.

    Args:
      dtype: of the products.
      num_passes: a multiple of the result.
      positions: of each pass, on one device.
    """
    if not in_eigen(dtype):
        return 1
    few_enough = range(1, 1 + max(1, min(num_passes, _POSITIONS_AT_ONCE // positions)))
    return max(count for count in few_enough if num_passes % count == 0)
