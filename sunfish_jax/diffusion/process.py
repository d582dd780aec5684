"""The forward process: clean token embeddings to noise, at a noise level gamma.

`gamma = ln(sigma^2 / alpha^2)` is the negative log signal-to-noise ratio of one dimension, so it grows with
the noise. The process is variance preserving: `alpha^2 = sigmoid(-gamma)`, `sigma^2 = sigmoid(gamma)`, and
`z = alpha e + sigma n` with `n ~ N(0, I)` (Kingma et al., Variational Diffusion Models, arXiv 2107.00630).
Clean embeddings `e` have `D = embedding_dim` dimensions and norm `sqrt(D)`.
"""

import math

import jax
import jax.numpy as jnp

# Signal-to-noise ratios of a whole token, `rho = D e^-gamma`, at which held-out cross-entropy is reported.
# The training loss follows the learned schedule and stays near half its entropy, so it measures no progress.
HELD_OUT_SNRS = (25.0, 9.0, 5.0, 2.4, 1.0, 0.14)

# Quantiles nearer to 0 or 1 than this are not drawn: a Gumbel schedule sends them to infinity.
QUANTILE_MARGIN = 1e-5

# What is given of a row is needed most where noise hides the rest: the levels of other rows are seldom so high.
_GIVEN_POWER = 1 / 8


def alpha(gamma: jax.Array) -> jax.Array:
    """The factor on the clean embedding: sqrt(sigmoid(-gamma))."""
    return jnp.exp(-0.5 * jax.nn.softplus(gamma))


def sigma(gamma: jax.Array) -> jax.Array:
    """The standard deviation of the noise: sqrt(sigmoid(gamma))."""
    return jnp.exp(-0.5 * jax.nn.softplus(-gamma))


def posterior_scale(gamma: jax.Array) -> jax.Array:
    """alpha / sigma^2, the factor that turns `z E^T` into the log posterior over tokens.

    For one token with a uniform prior, p(token v | z) is the softmax over v of `alpha / sigma^2 z . E_v`, all
    rows of E having one norm (Gulrajani and Hashimoto, Plaid, arXiv 2305.18619).
    """
    return jnp.exp(0.5 * (jax.nn.softplus(-gamma) - gamma))


def diffuse(x: jax.Array, noise: jax.Array, gamma: jax.Array) -> jax.Array:
    """Noises clean embeddings.

    Args:
      x: [..., S, D] clean embeddings.
      noise: [..., S, D] standard normal noise.
      gamma: [...] noise level of each row.

    Returns:
      [..., S, D] the noised embeddings `alpha x + sigma noise`.
    """
    gamma = gamma[..., None, None]
    return alpha(gamma) * x + sigma(gamma) * noise


def gamma_of_snr(snr: float, embedding_dim: int) -> float:
    """The gamma at which a token of norm sqrt(embedding_dim) has the signal-to-noise ratio `snr`."""
    return math.log(embedding_dim / snr)


def stratified_uniforms(key: jax.Array, n: int) -> jax.Array:
    """`n` uniform draws that cover [0, 1] evenly: one in each n-th of it, in random order.

    One rotation U common to all makes each draw uniform by itself: `(i / n + U) mod 1`. The variance of a
    batch's mean loss is much lower than with independent draws (arXiv 2107.00630, appendix I.1).

    Args:
      key: random key.
      n: number of draws, static.

    Returns:
      [n] fp32, clipped to [1e-5, 1 - 1e-5].
    """
    rotation_key, order_key = jax.random.split(key)
    rotation = jax.random.uniform(rotation_key)
    u = (jnp.arange(n, dtype=jnp.float32) / n + rotation) % 1.0
    return jnp.clip(jax.random.permutation(order_key, u), QUANTILE_MARGIN, 1.0 - QUANTILE_MARGIN)


def noise_quantiles(uniforms: jax.Array, given: jax.Array) -> jax.Array:
    """The quantile of the schedule that each row's noise level is at: more noise where something is given.

    Args:
      uniforms: draws of `stratified_uniforms`, of any shape.
      given: bool, True for rows with given tokens.

    Returns:
      u, and u^(1/8), whose density is 8 u^7, for rows with given tokens; no nearer to 1 than `uniforms` come.
    """
    return jnp.where(given, jnp.minimum(uniforms**_GIVEN_POWER, 1.0 - QUANTILE_MARGIN), uniforms)
