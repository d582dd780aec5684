"""What the training loss is computed on: noisy rows and, for some of them, a first estimate."""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

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


def self_conditioned_rows(first_row: jax.Array, num_rows: int, every: int) -> tuple[jax.Array, jax.Array]:
    """Which local rows have a global index divisible by `every`.

    The choice follows the global index, so it is the same however rows are spread over devices, while the number
    of candidates is static, so a compiled step pays for no more than those.

    Args:
      first_row: [] global index of this device's first row.
      num_rows: rows on this device.
      every: one row in this many.

    Returns:
      Local indices [ceil(num_rows / every)], and whether each is one of the rows (the last may fall outside).
    """
    candidates = (-first_row) % every + every * jnp.arange(-(-num_rows // every))
    return jnp.minimum(candidates, num_rows - 1), candidates < num_rows


def first_estimate(
    estimate: Callable[[jax.Array], jax.Array], z: jax.Array, first_row: jax.Array, every: int
) -> jax.Array:
    """The self-conditioning input x_hat: a first pass's estimate in one row of `every`, zeros in the others.

    From Chen, Zhang and Hinton, "Analog bits" (arXiv 2208.04202); no gradient flows through the first pass.

    Args:
      estimate: takes local row indices [n] and returns their estimates [n, S, D].
      z: [B, S, D] noisy embeddings.
      first_row: [] global index of the first of these rows.
      every: one row in this many; 0 for none.

    Returns:
      [B, S, D].
    """
    if not every:
        return jnp.zeros_like(z)
    rows, inside = self_conditioned_rows(first_row, z.shape[0], every)
    estimates = jax.lax.stop_gradient(estimate(rows)) * inside[:, None, None]
    return jnp.zeros_like(z).at[rows].add(estimates)
