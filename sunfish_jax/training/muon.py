"""Muon, which orthogonalises a layer's kernels side by side."""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sunfish_jax.models.layers import READERS, WRITERS
from sunfish_jax.ops.orthogonalize import orthogonalize
from sunfish_jax.training.sharding import DATA_AXIS

_MOMENTUM = 0.95
# Keeps a matrix of zeros from being divided by zero.
_SMALLEST = 1e-30


class _Block(NamedTuple):
    """One kernel of those that are orthogonalised as one matrix: its place among all, and whether it is turned."""

    place: int
    transposed: bool

    def turned(self, matrix: jax.Array) -> jax.Array:
        return matrix.T if self.transposed else matrix


def scale_by_muon(compute_dtype: jnp.dtype, mesh: Mesh | None = None) -> optax.GradientTransformation:
    """The direction of Muon: Nesterov momentum, orthogonalised (Jordan et al. 2024).

    The kernels of a layer that read its residual stream of width W are orthogonalised as one [W, ...] matrix, and
    those that write to it as another: most of Muon's products are among Gram matrices, of which a layer has two
    then, not six. Each kernel is given entries of root mean square 1 before, so that small gradients do not make
    it move less than its neighbours.

    An orthogonal [M, N] matrix has entries of root mean square 1 / sqrt(max(M, N)); they are scaled to 0.2, about
    that of Adam's updates, so that both go by one learning rate (Liu et al. 2025, arXiv 2502.16982).

    Args:
      compute_dtype: what the matrix products are computed in.
      mesh: the devices that share them; None for one.
    """

    def direction(updates, params=None):
        del params
        leaves, tree = jax.tree.flatten_with_path(updates)
        groups = _side_by_side([path for path, _ in leaves])
        momenta = [
            [block.turned(_normalized(leaves[block.place][1], compute_dtype)) for block in group]
            for group in groups
        ]
        together = _orthogonalized([jnp.concatenate(parts, axis=1) for parts in momenta], compute_dtype, mesh)
        directions = [None] * len(leaves)
        for group, parts, matrix in zip(groups, momenta, together, strict=True):
            ends = np.cumsum([part.shape[1] for part in parts])[:-1]
            for block, part in zip(group, jnp.split(matrix, ends, axis=1), strict=True):
                directions[block.place] = block.turned(part)
        return jax.tree.unflatten(tree, directions)

    return optax.chain(optax.trace(_MOMENTUM, nesterov=True), optax.stateless(direction))


def _side_by_side(paths: Sequence[tuple]) -> list[list[_Block]]:
    """Which of the kernels with these paths are orthogonalised as one matrix: all others are by themselves."""
    groups = defaultdict(list)
    for place, (*module, name) in enumerate(paths):
        # A layer's kernels alone have these names.
        kind = next((kind for kind in (READERS, WRITERS) if name.key in kind), {name.key: 0})
        groups[*module, *kind].append(_Block(place, transposed=kind[name.key] == 1))
    return list(groups.values())


def _normalized(matrix: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """With entries of root mean square 1; zeros stay zeros."""
    return (matrix * jax.lax.rsqrt(jnp.mean(jnp.square(matrix)) + _SMALLEST)).astype(dtype)


def _orthogonalized(matrices: Sequence[jax.Array], dtype: jnp.dtype, mesh: Mesh | None) -> list[jax.Array]:
    """The nearest orthogonal matrices, times what gives their entries a root mean square of 0.2; float32."""
    directions = [None] * len(matrices)
    for shape in sorted({matrix.shape for matrix in matrices}):
        places = [place for place, matrix in enumerate(matrices) if matrix.shape == shape]
        stack = jnp.stack([matrices[place] for place in places])
        if mesh is not None and len(stack) >= mesh.size:
            # Whole matrices on each device: of parts of them, every device would work out all Gram matrices.
            stack = jax.lax.with_sharding_constraint(stack, NamedSharding(mesh, P(DATA_AXIS)))
        for place, matrix in zip(places, 0.2 * max(shape) ** 0.5 * orthogonalize(stack, dtype), strict=True):
            directions[place] = matrix
    return directions
