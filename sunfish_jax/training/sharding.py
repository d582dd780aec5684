"""How a run is laid out over devices: packs of a batch, and the arrays of the state."""

from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sunfish_jax.errors import UserError

DATA_AXIS = "data"

# Arrays smaller than this are held whole on every device: splitting them would save nothing.
_SMALLEST_SPLIT = 2**16


def make_mesh(num_devices: int) -> Mesh:
    """A mesh of one axis over the first devices.

    Raises:
      UserError: there are not as many devices.
    """
    available = jax.devices()
    if num_devices > len(available):
        raise UserError(
            f"train.num_devices is {num_devices}, but there are {len(available)} devices "
            f"({available[0].platform}); ask for at most that many"
        )
    return jax.make_mesh((num_devices,), (DATA_AXIS,), axis_types=(AxisType.Auto,), devices=available[:num_devices])


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Batch arrays [A, P, ...]: each device holds a share of every microbatch's packs."""
    return NamedSharding(mesh, P(None, DATA_AXIS))


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """Every large array split over the devices along its largest divisible dimension, the others replicated.

    Parameters, moments and averages are read whole only while gradients are computed, so a device keeps
    1 / num_devices of them in between (the ZeRO partition of Rajbhandari et al. 2020, arXiv 1910.02054).

    Args:
      state: a pytree of arrays or of their shapes.
      mesh: from `make_mesh`.

    Returns:
      The same pytree of NamedShardings.
    """

    def sharding(leaf):
        spec = [None] * leaf.ndim
        dimensions = [i for i in range(leaf.ndim) if leaf.shape[i] % mesh.size == 0]
        if mesh.size > 1 and leaf.size >= _SMALLEST_SPLIT and dimensions:
            spec[max(dimensions, key=lambda i: leaf.shape[i])] = DATA_AXIS
        return NamedSharding(mesh, P(*spec))

    return jax.tree.map(sharding, state)
