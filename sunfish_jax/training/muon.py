"""Muon: momentum whose matrices are replaced by the nearest orthogonal ones, each attention head's by itself."""

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sunfish_jax.models.layers import HEAD_COLUMNS, HEAD_ROWS
from sunfish_jax.ops.orthogonalize import orthogonalize
from sunfish_jax.training.sharding import DATA_AXIS

_MOMENTUM = 0.95


def scale_by_muon(
    head_dim: int, compute_dtype: jnp.dtype, mesh: Mesh | None = None
) -> optax.GradientTransformation:
    """The direction of Muon: Nesterov momentum, orthogonalised (Jordan et al. 2024).

    Attention's kernels are orthogonalised head by head: what one head learns does not scale what another does, and
    the Gram matrices are [d, d] instead of [W, W], which leaves `micro` 44 % of the products.

    An orthogonal [M, N] matrix has entries of root mean square 1 / sqrt(max(M, N)); they are scaled to 0.2, about
    that of Adam's updates, so that both go by one learning rate (Liu et al. 2025, arXiv 2502.16982).

    Args:
      head_dim: d, columns or rows of attention's kernels that belong to one head.
      compute_dtype: what the matrix products are computed in.
      mesh: the devices that share the work; None for one.
    """

    def direction(updates, params=None):
        del params
        kernels, tree = jax.tree.flatten_with_path(updates)
        names = [path[-1].key for path, _ in kernels]
        blocks = [
            _heads(name, kernel.astype(compute_dtype), head_dim)
            for name, (_, kernel) in zip(names, kernels, strict=True)
        ]
        orthogonal = [None] * len(blocks)
        for shape in sorted({block.shape[1:] for block in blocks}):
            places = [place for place, block in enumerate(blocks) if block.shape[1:] == shape]
            stack = jnp.concatenate([blocks[place] for place in places])
            if mesh is not None and len(stack) >= mesh.size:
                # Whole matrices on each device: of parts of them, every device would work out all Gram matrices.
                stack = jax.lax.with_sharding_constraint(stack, NamedSharding(mesh, P(DATA_AXIS)))
            stack = 0.2 * max(shape) ** 0.5 * orthogonalize(stack, compute_dtype)
            first = 0
            for place in places:
                last = first + len(blocks[place])
                orthogonal[place] = _joined(names[place], stack[first:last], kernels[place][1].shape)
                first = last
        return jax.tree.unflatten(tree, orthogonal)

    return optax.chain(optax.trace(_MOMENTUM, nesterov=True), optax.stateless(direction))


def _heads(name: str, kernel: jax.Array, head_dim: int) -> jax.Array:
    """[n, d, W] for the n heads of an attention kernel, [1, M, N] for any other."""
    if name in HEAD_COLUMNS:
        kernel = kernel.T
    elif name not in HEAD_ROWS:
        return kernel[None]
    return kernel.reshape(-1, head_dim, kernel.shape[1])


def _joined(name: str, heads: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """The kernel [M, N] of that shape whose heads these are: undoes `_heads`."""
    return heads.reshape(shape[::-1]).T if name in HEAD_COLUMNS else heads.reshape(shape)
