"""Guidance: what the network is told when, and what comes of the two."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sunfish_jax.diffusion import schedules
from sunfish_jax.diffusion.guidance import guided

EVERYWHERE = (jnp.float32(-jnp.inf), jnp.float32(jnp.inf))


def run(scale, gammas, zs, interval=EVERYWHERE):
    """The logits of one pass after another, and the rows of each.

    The network says what it is told, 5 with the prompt and 2 without, times the noise level, beside what it reads.
    """
    passes = []

    def features(z, gamma, x_hat, *told):
        jax.debug.callback(lambda: passes.append(sum(len(part) for part in told)))
        rows = z[..., :3] + x_hat[..., :3]
        return jnp.concatenate([gamma[:, None, None] * part[:, None, None] + rows for part in told])

    denoise, kept = guided(features, jnp.full(2, 5.0), jnp.full(2, 2.0), scale, interval, (2, 4, 3))
    denoise = jax.jit(denoise)
    logits = []
    for gamma, z in zip(gammas, zs, strict=True):
        of_pass, kept = denoise(z, jnp.full(2, gamma), 0.5 * z, kept)
        jax.effects_barrier()
        logits.append(np.asarray(of_pass) - 1.5 * np.asarray(z)[..., :3])
    return logits, passes


def evaluate(scale, gamma, interval=EVERYWHERE):
    """What it says in one pass, over the noise level."""
    (logits,), passes = run(scale, [gamma], [jnp.arange(48.0).reshape(2, 4, 6)], interval)
    return logits / gamma, passes


@pytest.mark.parametrize(
    ("scale", "expected", "rows"), [(1.0, 5.0, 2), (0.0, 2.0, 2), (0.5, 3.5, 4), (2.0, 8.0, 4), (1.5, 6.5, 4)]
)
def test_logits_and_rows_of_the_only_pass_by_scale(scale, expected, rows):
    logits, passes = evaluate(scale, 1.0)
    np.testing.assert_allclose(logits, expected)
    assert passes == [rows]


@pytest.mark.parametrize("gamma", [0.9, 2.1])
def test_outside_the_interval_only_the_prompt_is_read(gamma):
    logits, passes = evaluate(2.0, gamma, (jnp.float32(1.0), jnp.float32(2.0)))
    np.testing.assert_allclose(logits, 5.0)
    assert passes == [2]


@pytest.mark.parametrize("gamma", [1.0, 1.5, 2.0])
def test_inside_the_interval_it_acts(gamma):
    logits, passes = evaluate(2.0, gamma, (jnp.float32(1.0), jnp.float32(2.0)))
    np.testing.assert_allclose(logits, 8.0)
    assert passes == [4]


@pytest.mark.parametrize(("scale", "expected"), [(0.0, 2.0), (0.5, 3.5)])
def test_a_weakened_prompt_does_not_come_back_outside_the_interval(scale, expected):
    logits, _ = evaluate(scale, 9.0, (jnp.float32(1.0), jnp.float32(2.0)))
    np.testing.assert_allclose(logits, expected)


def test_the_interval_of_all_quantiles_is_everywhere():
    interval = schedules.make_schedule("gumbel", 64, 100).gamma(jnp.array([0.0, 1.0]))
    for gamma in (-30.0, 30.0):
        np.testing.assert_allclose(evaluate(2.0, gamma, tuple(interval))[0], 8.0)


def test_a_difference_serves_two_passes():
    interval = (jnp.float32(1.0), jnp.float32(2.0))
    gammas = [3.0, 2.0, 1.75, 1.5, 1.25, 1.0, 0.5]
    zs = [jnp.full((2, 4, 6), float(i)) for i in range(len(gammas))]
    logits, passes = run(3.0, gammas, zs, interval)
    assert passes == [2, 4, 2, 4, 2, 4, 2]
    # The difference is (5 - 2) times the noise level at which it was made, and comes twice on top.
    made_at = [0.0, 2.0, 2.0, 1.5, 1.5, 1.0, 0.0]
    for got, gamma, made in zip(logits, gammas, made_at, strict=True):
        np.testing.assert_allclose(got, 5.0 * gamma + 2 * 3.0 * made, rtol=1e-5)


def test_a_weakened_prompt_is_weakened_anew_in_every_pass():
    gammas = [2.0, 1.5, 1.0]
    logits, passes = run(0.5, gammas, [jnp.zeros((2, 4, 6))] * 3)
    assert passes == [4, 4, 4]
    for got, gamma in zip(logits, gammas, strict=True):
        np.testing.assert_allclose(got, 3.5 * gamma)
