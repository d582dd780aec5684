"""What the training loss is computed on: noisy rows and, for some of them, a first estimate."""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from sunfish_jax.diffusion.process import diffuse


@flax.struct.dataclass
class NoisyRows:
    """Rows of one forward pass with their noise.

    Attributes:
      tokens: [B, S] int32.
      known_mask: [B, S] bool, True where the clean embedding is given.
      gamma: [B] float32 noise levels.
      noise: [B, S, D] standard normal.
    """

    tokens: jax.Array
    known_mask: jax.Array
    gamma: jax.Array
    noise: jax.Array

    def noisy_embeddings(self, table: jax.Array) -> jax.Array:
        """z [B, S, D]: alpha e + sigma n, and e itself where known; `table` is E [V, D]."""
        clean = table[self.tokens]
        return jnp.where(self.known_mask[..., None], clean, diffuse(clean, self.noise, self.gamma))


def self_conditioned_rows(num_passes: int, num_rows: int, num_devices: int, every: int) -> np.ndarray:
    """Which of each device's rows get a first estimate: one in `every` of the step's, numbered over all devices.

    Args:
      num_passes: A, forward passes of a step.
      num_rows: B, rows of a pass on each device; device d has those numbered (a * num_devices + d) * B + b.
      num_devices: how many devices.
      every: one row in this many; 0 for none.

    Returns:
      [num_devices, n, m] int32 indices of the device's A * B rows, -1 where a device has fewer: n groups of no more
      rows than a pass has.
    """
    passes = np.arange(num_passes)[:, None, None]
    devices = np.arange(num_devices)[:, None]
    numbers = (passes * num_devices + devices) * num_rows + np.arange(num_rows)
    of_device = numbers.transpose(1, 0, 2).reshape(num_devices, -1)
    chosen = [np.flatnonzero(row % every == 0) if every else row[:0] for row in of_device]
    most = max(map(len, chosen))
    groups = -(-most // num_rows)
    size = -(-most // max(1, groups))
    padded = np.full((num_devices, groups * size), -1, np.int32)
    for row, rows in zip(padded, chosen, strict=True):
        row[: len(rows)] = rows
    return padded.reshape(num_devices, groups, size)


def first_estimates(
    estimate: Callable[[jax.Array], jax.Array], shape: tuple[int, int, int], chosen: jax.Array
) -> jax.Array:
    """The self-conditioning input x_hat: a first pass's estimate of the chosen rows, zeros for the others.

    From Chen, Zhang and Hinton, "Analog bits" (arXiv 2208.04202); no gradient flows through the first pass.

    Args:
      estimate: takes row indices [m] and returns their estimates [m, S, D].
      shape: (R, S, D), of all rows.
      chosen: [n, m] indices of rows, -1 for none; a group of m at a time.

    Returns:
      [R, S, D] float32.
    """
    x_hat = jnp.zeros(shape)
    if not chosen.size:
        return x_hat
    rows = jnp.maximum(chosen, 0)
    found = jax.lax.stop_gradient(jax.lax.map(estimate, rows)) * (chosen >= 0)[..., None, None]
    return x_hat.at[rows].add(found)
