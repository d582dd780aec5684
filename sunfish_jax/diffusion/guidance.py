"""Classifier-free guidance: how strongly a sample follows its prompt."""

from collections.abc import Callable

import jax

# denoise(z [B, S, D], gamma [B], x_hat [B, S, D]) -> logits [B, S, V], all fp32. Whatever else the network is
# told (the prompt, which tokens are known) is closed over.
Denoise = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def guided(
    conditional: Denoise,
    unconditional: Denoise,
    guidance_scale: float,
    gamma_interval: tuple[jax.Array, jax.Array],
) -> Denoise:
    """A denoiser whose logits are `unconditional + guidance_scale (conditional - unconditional)`.

    Guidance combines logits (Ho and Salimans, arXiv 2207.12598). Above 1 it sharpens, which pays in the
    middle of the noise range only; elsewhere the prompt is followed plainly, in one pass (arXiv 2404.07724).
    Below 1 it weakens the prompt, and acts at every level: a plain pass at the ends would bring it back.

    Args:
      conditional: the network with the prompt.
      unconditional: the network with the null prompt.
      guidance_scale: 1 is no guidance, 0 ignores the prompt. Static: at 1 and 0 a single network is compiled.
      gamma_interval: the lowest and the highest noise level at which a scale above 1 acts. For quantiles of
        the schedule, pass `schedule.gamma(jnp.array([low, high]))`; (0, 1) is everywhere.

    Returns:
      A denoiser for rows that are all at one noise level, as they are in sampling.
    """
    if guidance_scale == 1:
        return conditional
    if guidance_scale == 0:
        return unconditional

    def combined(z: jax.Array, gamma: jax.Array, x_hat: jax.Array) -> jax.Array:
        without = unconditional(z, gamma, x_hat)
        return without + guidance_scale * (conditional(z, gamma, x_hat) - without)

    if guidance_scale < 1:
        return combined

    low, high = gamma_interval

    def within_the_interval(z: jax.Array, gamma: jax.Array, x_hat: jax.Array) -> jax.Array:
        acts = (low <= gamma[0]) & (gamma[0] <= high)
        return jax.lax.cond(acts, combined, conditional, z, gamma, x_hat)

    return within_the_interval
