"""Which of XLA:CPU's two libraries multiplies the matrices of a gradient: its fast one, or in float32 Eigen."""

import jax
import jax.numpy as jnp

# What is left to the fast library: reductions, with the products that lead into them.
_WITHOUT_PRODUCTS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}


def in_eigen(dtype: jnp.dtype) -> bool:
    """Whether forward and backward passes multiply matrices of this dtype in Eigen.

    In float32 Eigen is the faster one for the products of layers, if they come without a transposed operand
    (docs/performance.md); it has no bfloat16 instructions.
    """
    return jax.default_backend() == "cpu" and jnp.dtype(dtype) == jnp.float32


def compiler_options(dtype: jnp.dtype) -> dict[str, str]:
    """What to jit gradients with whose products are of this dtype."""
    return _WITHOUT_PRODUCTS if in_eigen(dtype) else {}
