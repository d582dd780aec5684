"""Dropout from a counter-based hash: no stored mask, and far cheaper than threefry on a CPU."""

import jax
import jax.numpy as jnp


def _mix(x: jax.Array) -> jax.Array:
    """A bijective mixing of 32-bit words (the `lowbias32` constants of C. Wellons' hash-prospector)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def dropout(x: jax.Array, seeds: jax.Array | None, site: jax.Array | int, rate: float) -> jax.Array:
    """Sets a share of the elements to zero and scales up the rest.

    The mask is a function of the group's seed and the place within the group, so it does not depend on how groups
    are spread over microbatches or devices, and the backward pass makes it again instead of reading it.

    Args:
      x: [N, W], G groups of as many positions each, one after the other.
      seeds: [G] uint32, new at every training step; None for no dropout.
      site: [] which use of dropout in the network this is; each gets masks of its own.
      rate: the share dropped, in [0, 1).

    Returns:
      [N, W].
    """
    if seeds is None or rate == 0.0:
        return x
    groups = x.reshape(len(seeds), -1, x.shape[-1])
    seeds = _mix(seeds + jnp.uint32(site) * jnp.uint32(0x9E3779B9))[:, None, None]
    place = jax.lax.broadcasted_iota(jnp.uint32, (1, *groups.shape[1:]), 1) * jnp.uint32(groups.shape[2])
    place = place + jax.lax.broadcasted_iota(jnp.uint32, (1, *groups.shape[1:]), 2)
    keep = _mix(place ^ seeds) >= jnp.uint32(round(rate * 2**32))
    return jnp.where(keep, groups / (1.0 - rate), 0.0).reshape(x.shape)
