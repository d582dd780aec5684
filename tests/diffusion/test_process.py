"""The forward process against float64 closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sunfish_jax.diffusion import process

GAMMAS = np.linspace(-12.0, 12.0, 97)


def test_alpha_and_sigma_are_the_square_roots_of_sigmoids():
    """Also at the ends, where 1 - sigma^2 would have lost all its digits."""
    gamma = jnp.asarray(GAMMAS, jnp.float32)
    np.testing.assert_allclose(process.alpha(gamma), np.sqrt(1 / (1 + np.exp(GAMMAS))), rtol=3e-6)
    np.testing.assert_allclose(process.sigma(gamma), np.sqrt(1 / (1 + np.exp(-GAMMAS))), rtol=3e-6)


def test_posterior_scale_is_alpha_over_sigma_squared():
    alpha = np.sqrt(1 / (1 + np.exp(GAMMAS)))
    variance = 1 / (1 + np.exp(-GAMMAS))
    np.testing.assert_allclose(
        process.posterior_scale(jnp.asarray(GAMMAS, jnp.float32)), alpha / variance, rtol=1e-5
    )


def test_posterior_scale_gives_bayes_rule():
    """softmax(posterior_scale z E^T) is the posterior computed from Gaussian densities."""
    rng = np.random.default_rng(0)
    table = rng.normal(size=(7, 5))
    table *= np.sqrt(5) / np.linalg.norm(table, axis=1, keepdims=True)
    z, gamma = rng.normal(size=5), 0.7
    alpha, variance = np.sqrt(1 / (1 + np.exp(gamma))), 1 / (1 + np.exp(-gamma))
    density = np.exp(-np.sum((z - alpha * table) ** 2, axis=1) / (2 * variance))
    logits = process.posterior_scale(jnp.float32(gamma)) * jnp.asarray(table @ z, jnp.float32)
    np.testing.assert_allclose(jax.nn.softmax(logits), density / density.sum(), rtol=1e-5)


def test_diffuse_gives_each_row_its_own_noise_level():
    rng = np.random.default_rng(1)
    x, noise = rng.normal(size=(2, 3, 4, 5)), rng.normal(size=(2, 3, 4, 5))
    gamma = rng.normal(size=(2, 3)) * 3
    expected = np.empty_like(x)
    for i in range(2):
        for j in range(3):
            variance = 1 / (1 + np.exp(-gamma[i, j]))
            expected[i, j] = np.sqrt(1 - variance) * x[i, j] + np.sqrt(variance) * noise[i, j]
    actual = process.diffuse(*(jnp.asarray(value, jnp.float32) for value in (x, noise, gamma)))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_gamma_of_snr_is_the_signal_to_noise_ratio_of_a_token():
    for snr in process.HELD_OUT_SNRS:
        gamma = process.gamma_of_snr(snr, 64)
        variance = 1 / (1 + np.exp(-gamma))
        # |alpha e|^2 over the variance of one dimension of the noise, |e|^2 = 64.
        np.testing.assert_allclose(64 * (1 - variance) / variance, snr, rtol=1e-9)


def test_stratified_uniforms_put_one_draw_in_each_stratum_in_random_order():
    draws = np.stack([process.stratified_uniforms(jax.random.key(seed), 32) for seed in range(50)])
    gaps = np.diff(np.sort(draws, axis=1), axis=1)
    np.testing.assert_allclose(gaps, 1 / 32, atol=3e-5)
    assert draws.min() >= 9.9e-6 and draws.max() <= 1 - 9.9e-6
    # Rotated: each place of the batch is uniform over seeds. Permuted: no place goes with a quantile.
    assert len(np.unique(np.floor(draws[:, 0] * 32))) > 15
    assert not np.any(np.all(np.diff(draws, axis=1) % 1 < 0.05, axis=1))
    np.testing.assert_array_equal(process.stratified_uniforms(jax.random.key(3), 32), draws[3])


def test_rows_with_given_tokens_are_noised_more():
    uniforms = jnp.linspace(1e-5, 1 - 1e-5, 10_000)
    np.testing.assert_array_equal(process.noise_quantiles(uniforms, jnp.zeros(10_000, bool)), uniforms)
    draws = process.noise_quantiles(uniforms, jnp.ones(10_000, bool))
    for quantile in (0.5, 0.9, 0.99):
        # P(u^(1/8) < q) = q^8
        assert np.mean(draws < quantile) == pytest.approx(quantile**8, abs=1e-3)
    assert draws.max() == np.float32(1 - 1e-5)


def test_stratified_uniforms_are_clipped_away_from_the_ends():
    draws = np.concatenate([process.stratified_uniforms(jax.random.key(seed), 400_000) for seed in range(2)])
    assert draws.min() == np.float32(1e-5)
    assert draws.max() == np.float32(1 - 1e-5)
