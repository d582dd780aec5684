"""Classifier-free guidance: how strongly a sample follows its prompt."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

# denoise(z [B, S, D], gamma [B], x_hat [B, S, D], kept) -> logits [B, S, V], kept; all fp32. Whatever else the
# network is told (the prompt, which tokens are known) is closed over; `kept`, a pytree, goes from pass to pass.
Denoise = Callable[[jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]
# (z, gamma, x_hat, k pytrees of what the network is told, of leading axis B) -> what logits are an affine function
# of, [k*B, S, F]: all rows as told first, then all as told next, and so on.
Features = Callable[..., jax.Array]

# Guided passes for which one pass without the prompt serves: what the prompt changes differs little from one to
# the next (docs/experiments.md).
PASSES_A_DIFFERENCE = 2


@flax.struct.dataclass
class PromptDifference:
    """What guidance keeps from pass to pass.

    Attributes:
      features: [B, S, F] float32, with the prompt less without it, as last made.
      passes: [] int32, guided passes so far.
    """

    features: jax.Array
    passes: jax.Array


def guided(
    features: Features,
    with_prompt: Any,
    without_prompt: Any,
    guidance_scale: float,
    gamma_interval: tuple[jax.Array, jax.Array],
    shape: tuple[int, int, int],
) -> tuple[Denoise, PromptDifference | None]:
    """Features whose logits are `unconditional + guidance_scale (conditional - unconditional)`.

    Guidance combines logits (Ho and Salimans, arXiv 2207.12598). Logits are affine in the features and the factors
    of the two sum to one, so the features are combined, and the wide product with the vocabulary is made once.

    Above 1 guidance sharpens, which pays in the middle of the noise range only; elsewhere the prompt is followed
    plainly (arXiv 2404.07724), at half the cost. Where it acts the difference of the two is made in the first of
    every `PASSES_A_DIFFERENCE` passes, and added again in the others. Below 1 the prompt is weakened in every pass:
    plain logits at the ends would bring it back.

    Args:
      features: what the logits are made of.
      with_prompt: what it is told of the prompts.
      without_prompt: what it is told instead of them.
      guidance_scale: 1 is no guidance, 0 ignores the prompt. Static: at 1 and 0 nothing else is compiled.
      gamma_interval: the lowest and the highest noise level at which a scale above 1 acts. For quantiles of
        the schedule, pass `schedule.gamma(jnp.array([low, high]))`; (0, 1) is everywhere.
      shape: (B, S, F), of what `features` returns for one thing told.

    Returns:
      A function of (z, gamma, x_hat, kept) to features [B, S, F] and what to keep for the next pass, for rows that
      are all at one noise level, as they are in sampling; and what is kept before the first.
    """

    def both(*noisy: jax.Array) -> tuple[jax.Array, jax.Array]:
        # One pass told both, rather than two: weights are read once, and what comes before the prompt is the same.
        conditional, unconditional = jnp.split(features(*noisy, with_prompt, without_prompt), 2)
        return conditional, conditional - unconditional

    if guidance_scale <= 1:

        def in_every_pass(z, gamma, x_hat, kept):
            if guidance_scale in (0, 1):
                return features(z, gamma, x_hat, with_prompt if guidance_scale else without_prompt), kept
            conditional, difference = both(z, gamma, x_hat)
            return conditional + (guidance_scale - 1.0) * difference, kept

        return in_every_pass, None

    low, high = gamma_interval

    def within_the_interval(z, gamma, x_hat, kept: PromptDifference):
        acts = (low <= gamma[0]) & (gamma[0] <= high)
        conditional, difference = jax.lax.cond(
            acts & (kept.passes % PASSES_A_DIFFERENCE == 0),
            both,
            lambda *noisy: (features(*noisy, with_prompt), kept.features),
            z,
            gamma,
            x_hat,
        )
        strength = jnp.where(acts, guidance_scale - 1.0, 0.0)
        return conditional + strength * difference, PromptDifference(difference, kept.passes + acts)

    return within_the_interval, PromptDifference(jnp.zeros(shape), jnp.zeros((), jnp.int32))
