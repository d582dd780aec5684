"""An upper bound on the negative log-likelihood of text, in nats.

For any denoiser, the continuous-time variational bound (Kingma et al., arXiv 2107.00630; for text Plaid, arXiv
2305.18619) on `-ln p(tokens)` is the sum over tokens of

    prior = sum_d 1/2 (sigma_1^2 + alpha_1^2 e_d^2 - 1 - ln sigma_1^2)
    recon = cross-entropy of the token given z at gamma_0
    diff  = 1/2 E_{gamma ~ pi} [ e^(-gamma) / pi(gamma) |e - x_hat|^2 ],  pi over [gamma_0, gamma_1]

where pi may be any distribution: it decides how noisy the estimate is, and not its mean.
"""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from sunfish_jax.diffusion import process
from sunfish_jax.diffusion.schedules import Schedule

# (z [B, S, D], gamma [B], x_hat [B, S, D]) -> logits [B, S, V], all float32: one pass of the network.
Predict = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

# Signal-to-noise ratios of a token between which the bound integrates. What is still uncertain at the first is
# paid in `recon`; what is still visible at the second, in `prior`.
CLEANEST_SNR, NOISIEST_SNR = 64.0, 0.0025


@flax.struct.dataclass
class Bound:
    """The bound of each sequence, in nats; arrays of [B] fp32.

    Attributes:
      prior, recon, diff: the three terms, summed over the real tokens, end of text included.
      padding: all three, summed over the padding. It belongs to the bound: the padding's noisy embeddings
        tell the network where the text ends, and that must be paid for like everything else it is told.
    """

    prior: jax.Array
    recon: jax.Array
    diff: jax.Array
    padding: jax.Array

    @property
    def total(self) -> jax.Array:
        """[B] the upper bound on the negative log-likelihood of the sequence."""
        return self.prior + self.recon + self.diff + self.padding


def likelihood_bound(
    predict: Predict,
    embedding_table: jax.Array,
    schedule: Schedule,
    tokens: jax.Array,
    padding_mask: jax.Array,
    *,
    key: jax.Array,
    num_draws: int = 64,
    self_conditioning: bool = True,
) -> Bound:
    """Estimates the bound of each sequence, without bias; to be called under `jax.jit`.

    Each of the `num_draws + 1` estimates, of two network passes with self-conditioning, takes every row once, so
    what it needs is the memory of one forward pass (logits [B, S, V] in fp32). Rows differ in their noise and in
    their noise levels.

    Args:
      predict: the network without dropout or guidance, with its prompt, or the null prompt, closed over.
      embedding_table: [V, D] embeddings of norm sqrt(D).
      schedule: where the draws of gamma are concentrated.
      tokens: [B, S] int32.
      padding_mask: [B, S] bool, True at real tokens.
      key: random key.
      num_draws: noise levels for each sequence, static; stratified. At least 64 for a usable figure.
      self_conditioning: whether the network takes its own first estimate. That is computed in a pass of its
        own from the same z: carried over from another noise level it would tell of other noise, and the
        figure would bound nothing.

    Returns:
      The terms of each sequence. Bits per byte are `sum(total) / ln 2 / bytes`.
    """
    num_rows = tokens.shape[0]
    embedding_dim = embedding_table.shape[1]
    clean = embedding_table[tokens]
    gamma_0 = process.gamma_of_snr(CLEANEST_SNR, embedding_dim)
    gamma_1 = process.gamma_of_snr(NOISIEST_SNR, embedding_dim)

    levels_key, noise_key = jax.random.split(key)
    level_keys = jax.random.split(levels_key, num_rows)
    gamma, log_pi = jax.vmap(
        lambda row_key: _draw_levels(row_key, schedule, gamma_0, gamma_1, num_draws), out_axes=1
    )(level_keys)
    diff_weight = 0.5 * jnp.exp(-gamma - log_pi) / num_draws

    # The first pass gives recon, the others diff: as one scan they compile one network.
    first = jnp.zeros((1, num_rows))
    gamma = jnp.concatenate([first + gamma_0, gamma])
    diff_weight = jnp.concatenate([first, diff_weight])
    recon_weight = jnp.zeros(num_draws + 1).at[0].set(1.0)

    def one_pass(sums, i_gamma_and_weights):
        i, gamma, recon_weight, diff_weight = i_gamma_and_weights
        z = process.diffuse(clean, jax.random.normal(jax.random.fold_in(noise_key, i), clean.shape), gamma)
        logits = predict(z, gamma, jnp.zeros_like(z))
        if self_conditioning:
            logits = predict(z, gamma, jax.nn.softmax(logits) @ embedding_table)
        x_hat = jax.nn.softmax(logits) @ embedding_table
        picked = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
        cross_entropy = jax.nn.logsumexp(logits, axis=-1) - picked
        squared_error = jnp.sum((clean - x_hat) ** 2, axis=-1)
        recon, diff = sums
        return (recon + recon_weight * cross_entropy, diff + diff_weight[:, None] * squared_error), None

    zeros = jnp.zeros(tokens.shape)
    (recon, diff), _ = jax.lax.scan(
        one_pass, (zeros, zeros), (jnp.arange(num_draws + 1), gamma, recon_weight, diff_weight)
    )
    # sigma^2 - 1 = -alpha^2 and -ln sigma^2 = softplus(-gamma): the differences, not near-equal numbers.
    alpha_squared = process.alpha(jnp.float32(gamma_1)) ** 2
    log_variance = -jax.nn.softplus(-jnp.float32(gamma_1))
    squared_norm = jnp.sum(clean**2, axis=-1)
    prior = 0.5 * (alpha_squared * (squared_norm - embedding_dim) - embedding_dim * log_variance)

    def over_real(terms: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(padding_mask, terms, 0.0), axis=-1)

    padding = jnp.sum(jnp.where(padding_mask, 0.0, prior + recon + diff), axis=-1)
    return Bound(prior=over_real(prior), recon=over_real(recon), diff=over_real(diff), padding=padding)


def _draw_levels(
    key: jax.Array, schedule: Schedule, gamma_0: float, gamma_1: float, num_draws: int
) -> tuple[jax.Array, jax.Array]:
    """Stratified draws of gamma from pi, [num_draws], and ln pi of each.

    pi is half the schedule, cut to [gamma_0, gamma_1], and half uniform. The schedule alone has so little mass
    at the ends that a single draw there would carry the weight of hundreds.
    """
    u = process.stratified_uniforms(key, num_draws)
    low, high = schedule.cdf(jnp.float32(gamma_0)), schedule.cdf(jnp.float32(gamma_1))
    of_schedule = schedule.gamma(low + (high - low) * (2.0 * u))
    of_uniform = gamma_0 + (gamma_1 - gamma_0) * (2.0 * u - 1.0)
    # Rounding of the cdf near 1 may lead outside.
    gamma = jnp.clip(jnp.where(u < 0.5, of_schedule, of_uniform), gamma_0, gamma_1)
    density = jnp.exp(schedule.log_pdf(gamma)) / (high - low)
    return gamma, jnp.log(0.5 * density + 0.5 / (gamma_1 - gamma_0))
