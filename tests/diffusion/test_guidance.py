"""Guidance: which network runs when, and what comes of the two."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sunfish_jax.diffusion import schedules
from sunfish_jax.diffusion.guidance import guided

EVERYWHERE = (jnp.float32(-jnp.inf), jnp.float32(jnp.inf))


def counted(value):
    """A denoiser that says `value` everywhere, and counts how often it really runs."""
    calls = []

    def denoise(z, gamma, x_hat):
        jax.debug.callback(lambda: calls.append(1))
        return jnp.full((*z.shape[:2], 3), value) + z[..., :1] + x_hat[..., :1]

    return denoise, calls


def evaluate(scale, gamma, interval=EVERYWHERE):
    conditional, conditional_calls = counted(5.0)
    unconditional, unconditional_calls = counted(2.0)
    denoise = jax.jit(guided(conditional, unconditional, scale, interval))
    ones = jnp.ones((2, 4, 6))
    logits = denoise(0.25 * ones, jnp.full(2, gamma), 0.5 * ones)
    jax.effects_barrier()
    return np.asarray(logits) - 0.75, (len(conditional_calls), len(unconditional_calls))


@pytest.mark.parametrize(
    ("scale", "expected", "passes"),
    [(1.0, 5.0, (1, 0)), (0.0, 2.0, (0, 1)), (0.5, 3.5, (1, 1)), (2.0, 8.0, (1, 1)), (1.5, 6.5, (1, 1))],
)
def test_logits_and_passes_by_scale(scale, expected, passes):
    logits, counts = evaluate(scale, 1.0)
    np.testing.assert_allclose(logits, expected)
    assert counts == passes


@pytest.mark.parametrize("gamma", [0.9, 2.1])
def test_outside_the_interval_a_single_pass_runs(gamma):
    logits, counts = evaluate(2.0, gamma, (jnp.float32(1.0), jnp.float32(2.0)))
    np.testing.assert_allclose(logits, 5.0)
    assert counts == (1, 0)


@pytest.mark.parametrize("gamma", [1.0, 1.5, 2.0])
def test_inside_the_interval_it_acts(gamma):
    logits, counts = evaluate(2.0, gamma, (jnp.float32(1.0), jnp.float32(2.0)))
    np.testing.assert_allclose(logits, 8.0)
    assert counts == (1, 1)


@pytest.mark.parametrize(("scale", "expected"), [(0.0, 2.0), (0.5, 3.5)])
def test_a_weakened_prompt_does_not_come_back_outside_the_interval(scale, expected):
    logits, _ = evaluate(scale, 9.0, (jnp.float32(1.0), jnp.float32(2.0)))
    np.testing.assert_allclose(logits, expected)


def test_the_interval_of_all_quantiles_is_everywhere():
    interval = schedules.make_schedule("gumbel", 64, 100).gamma(jnp.array([0.0, 1.0]))
    for gamma in (-30.0, 30.0):
        np.testing.assert_allclose(evaluate(2.0, gamma, tuple(interval))[0], 8.0)
