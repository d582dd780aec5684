"""Classifier-free guidance: how strongly a sample follows its prompt."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# denoise(z [B, S, D], gamma [B], x_hat [B, S, D]) -> logits [B, S, V], all fp32. Whatever else the network is
# told (the prompt, which tokens are known) is closed over.
Denoise = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
# The same, given also k pytrees of what it is told, of leading axis B; returns what logits are an affine function
# of, [k*B, S, F]: all rows as told first, then all as told next, and so on.
Features = Callable[..., jax.Array]


def guided(
    features: Features,
    with_prompt: Any,
    without_prompt: Any,
    guidance_scale: float,
    gamma_interval: tuple[jax.Array, jax.Array],
) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """Features whose logits are `unconditional + guidance_scale (conditional - unconditional)`.

    Guidance combines logits (Ho and Salimans, arXiv 2207.12598). Logits are affine in the features and the factors
    of the two sum to one, so the features are combined, and the wide product with the vocabulary is made once.

    Above 1 guidance sharpens, which pays in the middle of the noise range only; elsewhere the prompt is followed
    plainly (arXiv 2404.07724), at half the cost. Below 1 it weakens the prompt, and acts at every level: plain
    logits at the ends would bring it back.

    Args:
      features: what the logits are made of.
      with_prompt: what it is told of the prompts.
      without_prompt: what it is told instead of them.
      guidance_scale: 1 is no guidance, 0 ignores the prompt. Static: at 1 and 0 nothing else is compiled.
      gamma_interval: the lowest and the highest noise level at which a scale above 1 acts. For quantiles of
        the schedule, pass `schedule.gamma(jnp.array([low, high]))`; (0, 1) is everywhere.

    Returns:
      A function of (z, gamma, x_hat) to [B, S, F], for rows that are all at one noise level, as they are in
      sampling.
    """
    if guidance_scale in (0, 1):
        told = with_prompt if guidance_scale else without_prompt
        return lambda z, gamma, x_hat: features(z, gamma, x_hat, told)

    def combined(*noisy: jax.Array) -> jax.Array:
        # One pass told both, rather than two: weights are read once, and what comes before the prompt is the same.
        conditional, unconditional = jnp.split(features(*noisy, with_prompt, without_prompt), 2)
        return unconditional + guidance_scale * (conditional - unconditional)

    if guidance_scale < 1:
        return combined

    low, high = gamma_interval

    def within_the_interval(z: jax.Array, gamma: jax.Array, x_hat: jax.Array) -> jax.Array:
        acts = (low <= gamma[0]) & (gamma[0] <= high)
        return jax.lax.cond(acts, combined, lambda *noisy: features(*noisy, with_prompt), z, gamma, x_hat)

    return within_the_interval
