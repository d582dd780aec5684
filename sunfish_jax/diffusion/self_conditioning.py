"""Self-conditioning in training: for some packs of rows, a first estimate is an input."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


def self_conditioned_packs(num_passes: int, num_packs: int, num_devices: int, every: int) -> np.ndarray:
    """Which of each device's packs get a first estimate: one in `every`, counted over all devices and steps.

    Args:
      num_passes: A, forward passes of a step.
      num_packs: P, packs of a pass on each device; device d has those numbered (a * num_devices + d) * P + p.
      num_devices: how many devices.
      every: one pack in this many; 0 for none.

    Returns:
      [turns, num_devices, n, m] int32 indices of the device's A * P packs, -1 where a device has fewer: n groups of
      no more packs than a pass has. Step t takes turn t modulo their number, which is 1 where `every` divides the
      packs of a step.
    """
    passes = np.arange(num_passes)[:, None, None]
    devices = np.arange(num_devices)[:, None]
    numbers = (passes * num_devices + devices) * num_packs + np.arange(num_packs)
    of_device = numbers.transpose(1, 0, 2).reshape(num_devices, -1)
    turns = every // math.gcd(every, numbers.size) if every else 1
    chosen = [
        np.flatnonzero((turn * numbers.size + own) % every == 0) if every else own[:0]
        for turn in range(turns)
        for own in of_device
    ]
    most = max(map(len, chosen))
    groups = math.ceil(most / num_packs)
    size = math.ceil(most / max(1, groups))
    padded = np.full((len(chosen), groups * size), -1, np.int32)
    for padded_packs, packs in zip(padded, chosen, strict=True):
        padded_packs[: len(packs)] = packs
    return padded.reshape(turns, num_devices, groups, size)


def first_estimates(
    estimate: Callable[[jax.Array], jax.Array], shape: tuple[int, int, int], chosen: jax.Array
) -> jax.Array:
    """The self-conditioning input x_hat: a first pass's estimate of the chosen packs, zeros for the others.

    From Chen, Zhang and Hinton, "Analog bits" (arXiv 2208.04202); no gradient flows through the first pass.

    Args:
      estimate: takes indices of packs [m] and returns their estimates [m, n, D].
      shape: (K, n, D), of all packs.
      chosen: [groups, m] indices of packs, -1 for none; a group of m at a time.

    Returns:
      [K, n, D] float32.
    """
    x_hat = jnp.zeros(shape)
    if not chosen.size:
        return x_hat
    packs = jnp.maximum(chosen, 0)
    found = jax.lax.stop_gradient(jax.lax.map(estimate, packs)) * (chosen >= 0)[..., None, None]
    return x_hat.at[packs].add(found)
