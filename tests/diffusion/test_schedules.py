"""Noise schedules against their papers' definitions in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sunfish_jax.diffusion import schedules
from sunfish_jax.diffusion.names import SCHEDULES
from sunfish_jax.errors import UserError

QUANTILES = np.linspace(0.001, 0.999, 999)


def all_schedules():
    return {name: schedules.make_schedule(name, 64, 4096) for name in SCHEDULES}


@pytest.mark.parametrize("name", SCHEDULES)
def test_gamma_grows_with_the_quantile_and_cdf_inverts_it(name):
    schedule = all_schedules()[name]
    gamma = np.asarray(schedule.gamma(jnp.asarray(QUANTILES, jnp.float32)))
    assert np.all(np.diff(gamma) > 0)
    np.testing.assert_allclose(schedule.cdf(gamma), QUANTILES, atol=2e-5)


@pytest.mark.parametrize("name", SCHEDULES)
def test_density_is_the_derivative_of_the_cdf(name):
    schedule = all_schedules()[name]
    with jax.enable_x64(True):
        gamma = np.asarray(schedule.gamma(jnp.asarray(QUANTILES)), np.float64)
        slope = np.asarray((schedule.cdf(gamma + 1e-5) - schedule.cdf(gamma - 1e-5)) / 2e-5)
        np.testing.assert_allclose(np.exp(schedule.log_pdf(gamma)), slope, rtol=1e-5)


def test_gumbel_starts_where_the_recipe_says():
    schedule = all_schedules()["gumbel"]
    u = np.array([0.1, 0.5, 0.9])
    expected = (np.log(64) - 1.92) - 0.85 * np.log(-np.log(u))
    np.testing.assert_allclose(schedule.gamma(jnp.asarray(u, jnp.float32)), expected, rtol=1e-5)
    # In pure noise the prediction is the entropy of a uniform guess.
    np.testing.assert_allclose(schedule.predicted_cross_entropy(30.0), np.log(4096), rtol=1e-5)
    np.testing.assert_allclose(schedule.predicted_cross_entropy(expected), u * np.log(4096), rtol=1e-4)


def ddpm_alpha_squared(t):
    """The product of 1 - beta over 100,000 steps, beta going from 0.1 to 20 per unit of time."""
    time = (np.arange(100_000) + 0.5) / 100_000 * t
    return np.prod(1 - (0.1 + 19.9 * time) * t / 100_000)


@pytest.mark.parametrize(
    ("name", "alpha_squared"),
    [
        ("linear", ddpm_alpha_squared),
        ("cosine", lambda t: np.cos(np.pi * t / 2) ** 2),
        ("sqrt", lambda t: 1 - np.sqrt(t + 1e-4)),
    ],
)
def test_fixed_schedules_follow_their_papers(name, alpha_squared):
    """gamma at the time t of the paper; u runs over the same time, cut at the ends."""
    schedule = all_schedules()[name]
    start, end = (float(schedule.time_at(bound)) for bound in (schedule.gamma_min, schedule.gamma_max))
    assert -1e-6 < start < 0.01 and 0.99 < end <= 1
    for u in (0.05, 0.3, 0.5, 0.8, 0.97):
        clean = alpha_squared(start + (end - start) * u)
        np.testing.assert_allclose(schedule.gamma(jnp.float32(u)), np.log((1 - clean) / clean), atol=5e-3)


@pytest.mark.parametrize("name", ["linear", "cosine", "sqrt"])
def test_fixed_schedules_are_bounded(name):
    schedule = all_schedules()[name]
    ends = np.asarray(schedule.gamma(jnp.array([0.0, 1.0])))
    np.testing.assert_allclose(ends, [schedule.gamma_min, schedule.gamma_max], atol=2e-2)
    assert np.all(np.isneginf(schedule.log_pdf(jnp.array([-20.0, 20.0]))))
    np.testing.assert_allclose(schedule.cdf(jnp.array([-20.0, 20.0])), [0.0, 1.0], atol=1e-6)


def test_an_unknown_schedule_is_an_error_that_names_the_choices():
    with pytest.raises(UserError, match=r"'cosin'.*gumbel, linear, cosine, sqrt"):
        schedules.make_schedule("cosin", 64, 4096)


def test_fitting_recovers_the_curve_that_cross_entropy_follows():
    """Noise levels are drawn from the schedule as it is being fitted, and the measure is noisy."""
    optimizer = optax.adam(2e-2)
    schedule = all_schedules()["gumbel"]
    opt_state = optimizer.init(schedule)
    true = schedules.GumbelSchedule(jnp.float32(1.2), jnp.log(1.4), jnp.log(5.0))

    @jax.jit
    def step(carry, key):
        schedule, opt_state = carry
        u_key, noise_key = jax.random.split(key)
        gamma = schedule.gamma(jax.random.uniform(u_key, (64,), minval=1e-5, maxval=1 - 1e-5))
        measured = true.predicted_cross_entropy(gamma) + 0.3 * jax.random.normal(noise_key, (64,))
        return schedules.fit_schedule(schedule, opt_state, optimizer, gamma, measured, jnp.ones_like(gamma)), None

    (fitted, _), _ = jax.lax.scan(step, (schedule, opt_state), jax.random.split(jax.random.key(0), 2000))
    np.testing.assert_allclose(fitted.mu, 1.2, atol=0.15)
    np.testing.assert_allclose(np.exp(fitted.log_beta), 1.4, atol=0.15)
    np.testing.assert_allclose(np.exp(fitted.log_entropy), 5.0, atol=0.25)


@pytest.mark.parametrize("measured", [0.0, 1e6])
def test_fitting_stays_within_bounds_however_far_a_step_goes(measured):
    optimizer = optax.sgd(1e6)
    schedule = all_schedules()["gumbel"]
    gamma = jnp.linspace(-2.0, 8.0, 16)
    fitted, _ = schedules.fit_schedule(
        schedule, optimizer.init(schedule), optimizer, gamma, jnp.full(16, measured), jnp.ones(16)
    )
    slack = 1e-4
    assert schedules.MU_RANGE[0] - slack <= fitted.mu <= schedules.MU_RANGE[1] + slack
    low, high = schedules.BETA_RANGE
    assert low - slack <= np.exp(fitted.log_beta) <= high + slack
    low, high = schedules.ENTROPY_RANGE
    assert low - slack <= np.exp(fitted.log_entropy) <= high + slack


def test_one_absurd_measure_moves_the_fit_no_more_than_a_clipped_one():
    """Twice the entropy is as much as one row can say."""
    optimizer = optax.sgd(1e-2)
    schedule = all_schedules()["gumbel"]
    gamma, entropy = jnp.linspace(0.0, 5.0, 8), np.log(4096)
    usual = jnp.full(8, 3.0)
    for wild, clipped in ((1e9, 2 * entropy), (-5.0, 0.0)):
        ends = []
        for value in (wild, clipped):
            measured = usual.at[3].set(value)
            opt_state = optimizer.init(schedule)
            ends.append(
                schedules.fit_schedule(schedule, opt_state, optimizer, gamma, measured, jnp.ones_like(gamma))[0]
            )
        np.testing.assert_allclose(jax.tree.leaves(ends[0]), jax.tree.leaves(ends[1]), rtol=1e-6)


def test_rows_without_weight_do_not_count():
    """Rows with clean anchors are easier than their noise level says, and must be left out of the fit."""
    optimizer = optax.sgd(1e-2)
    schedule = all_schedules()["gumbel"]
    opt_state = optimizer.init(schedule)
    gamma, measured = jnp.linspace(0.0, 5.0, 8), jnp.linspace(1.0, 6.0, 8)
    weight = jnp.array([1.0, 0, 1, 1, 0, 0, 1, 1])
    counted = np.flatnonzero(weight)
    ends = [
        schedules.fit_schedule(schedule, opt_state, optimizer, *arguments)[0]
        for arguments in ((gamma, measured, weight), (gamma[counted], measured[counted], jnp.ones(5)))
    ]
    np.testing.assert_allclose(jax.tree.leaves(ends[0]), jax.tree.leaves(ends[1]), rtol=1e-6)
    none = schedules.fit_schedule(schedule, opt_state, optimizer, gamma, measured, jnp.zeros(8))[0]
    np.testing.assert_array_equal(jax.tree.leaves(none), jax.tree.leaves(schedule))


def test_fixed_schedules_are_not_fitted():
    optimizer = optax.adam(0.1)
    schedule = all_schedules()["cosine"]
    opt_state = optimizer.init(schedule)
    after = schedules.fit_schedule(schedule, opt_state, optimizer, jnp.zeros(4), jnp.ones(4), jnp.ones(4))
    assert after == (schedule, opt_state)
