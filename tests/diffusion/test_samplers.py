"""Samplers against plain float64 loops, and against a distribution they must reproduce."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sunfish_jax.diffusion import process, samplers, schedules
from sunfish_jax.diffusion.names import SCHEDULERS
from sunfish_jax.errors import UserError

VOCAB, DIM, LENGTH, ROWS = 11, 6, 5, 3


def make_table(vocab=VOCAB, dim=DIM, seed=0):
    table = np.random.default_rng(seed).normal(size=(vocab, dim))
    return table * np.sqrt(dim) / np.linalg.norm(table, axis=1, keepdims=True)


TABLE = make_table()
MIXING = np.random.default_rng(1).normal(size=(DIM, VOCAB))


def toy_logits(z, gamma, x_hat, xp):
    """A network that depends on its neighbours, its noise level and its previous estimate."""
    scale = xp.exp(0.5 * (xp.log1p(xp.exp(-gamma)) - gamma))[:, None, None]
    neighbours = xp.tanh(xp.roll(z, 1, axis=1) + 0.1 * gamma[:, None, None])
    return scale * (z @ TABLE.T) + neighbours @ MIXING + 0.7 * x_hat @ MIXING[:, ::-1]


def softmax(logits):
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def quantile_to_gamma(u):
    """The Gumbel schedule as it starts, in float64."""
    return np.log(DIM) - 1.92 - 0.85 * np.log(-np.log(u))


def reference_passes(scheduler, num_steps, noises, temperature=1.0, known=None):
    """What each network pass is given (z, gamma, x_hat), by the recipe's formulas, and the tokens."""
    u = np.linspace(1 - 1e-3, 1e-3, num_steps)
    gamma = quantile_to_gamma(u)
    alpha, sigma = np.sqrt(1 / (1 + np.exp(gamma))), np.sqrt(1 / (1 + np.exp(-gamma)))
    z, x_hat, h_prev = noises[0].astype(np.float64), np.zeros_like(noises[0], np.float64), None
    passes = []
    for i in range(num_steps):
        if known is not None:
            z = np.where(known.mask[..., None], TABLE[known.tokens], z)
        passes.append((z, gamma[i], x_hat))
        logits = toy_logits(z, np.full(ROWS, gamma[i]), x_hat, np)
        x_hat_prev, x_hat = x_hat, softmax(logits / temperature) @ TABLE
        if i == num_steps - 1:
            break
        if scheduler == "ddpm":
            c = -np.expm1(gamma[i + 1] - gamma[i])
            mean = (1 - c) * (alpha[i + 1] / alpha[i]) * z + c * alpha[i + 1] * x_hat
            z = mean + np.sqrt(c) * sigma[i + 1] * noises[i + 1]
        elif scheduler == "ddim" or h_prev is None:
            eps = (z - alpha[i] * x_hat) / sigma[i]
            z = alpha[i + 1] * x_hat + sigma[i + 1] * eps
            h_prev = (gamma[i] - gamma[i + 1]) / 2
        else:
            h = (gamma[i] - gamma[i + 1]) / 2
            r = h_prev / h
            d = (1 + 1 / (2 * r)) * x_hat - 1 / (2 * r) * x_hat_prev
            z = (sigma[i + 1] / sigma[i]) * z - alpha[i + 1] * np.expm1(-h) * d
            h_prev = h
    return passes, np.argmax(logits, axis=-1)


def keys_of(key, rows):
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))


def run(scheduler, num_steps, keys, watch=None, **arguments):
    """Samples with the toy network; `watch` collects what each pass was given."""

    def denoise(z, gamma, x_hat, kept):
        if watch is not None:
            # The arrays are copied: the callback may be handed a view of memory that is used again.
            jax.debug.callback(lambda *a: watch.append([np.array(x) for x in a]), z, gamma, x_hat, ordered=True)
        return toy_logits(z, gamma, x_hat, jnp), kept

    table = jnp.asarray(TABLE, jnp.float32)
    steps = samplers.make_steps(schedules.make_schedule("gumbel", DIM, VOCAB), num_steps, scheduler)
    tokens = jax.jit(
        lambda steps, keys: samplers.sample(denoise, table, steps, keys=keys, length=LENGTH, **arguments)
    )(steps, keys)
    jax.effects_barrier()
    return np.asarray(tokens)


def noises_of(keys, num_steps):
    """Pass i of a row draws from fold_in(its key, i)."""
    return np.stack(
        [[jax.random.normal(jax.random.fold_in(key, i), (LENGTH, DIM)) for key in keys] for i in range(num_steps)]
    )


def assert_passes_agree(watched, expected):
    assert len(watched) == len(expected)
    for (z, gamma, x_hat), (expected_z, expected_gamma, expected_x_hat) in zip(watched, expected, strict=True):
        np.testing.assert_allclose(gamma, expected_gamma, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(z, expected_z, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(x_hat, expected_x_hat, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("scheduler", "num_steps"), [("ddim", 1), ("ddim", 12), ("ddpm", 12), ("dpmpp", 12)])
def test_every_pass_is_that_of_a_float64_loop(scheduler, num_steps):
    keys, watched = keys_of(jax.random.key(4), ROWS), []
    tokens = run(scheduler, num_steps, keys, watch=watched, temperature=0.8)
    expected, expected_tokens = reference_passes(scheduler, num_steps, noises_of(keys, num_steps), 0.8)
    assert_passes_agree(watched, expected)
    np.testing.assert_array_equal(tokens, expected_tokens)


def test_steps_keep_the_digits_that_float32_would_lose():
    """1,000 steps: neighbouring levels differ in the fourth digit, the factors in the eighth."""
    steps = samplers.make_steps(schedules.make_schedule("gumbel", DIM, VOCAB), 1000, "ddim")
    beta, mu = np.float64(np.exp(np.float64(np.float32(np.log(0.85))))), np.float64(np.float32(np.log(DIM) - 1.92))
    gamma = mu - beta * np.log(-np.log(np.linspace(0.999, 0.001, 1000)))
    alpha, sigma = np.sqrt(1 / (1 + np.exp(gamma))), np.sqrt(1 / (1 + np.exp(-gamma)))
    factor = alpha[1:] - alpha[:-1] * sigma[1:] / sigma[:-1]
    np.testing.assert_allclose(steps.x_hat[:-1], factor, rtol=1e-6)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_samples_follow_the_distribution_that_the_denoiser_knows(scheduler):
    """With the exact posterior of a single token as the denoiser, tokens must come out as often as they are."""
    frequencies = np.array([0.55, 0.25, 0.15, 0.05])
    table = jnp.asarray(make_table(4, 8, seed=3), jnp.float32)

    def posterior(z, gamma, x_hat, kept):
        return process.posterior_scale(gamma)[:, None, None] * (z @ table.T) + jnp.log(frequencies), kept

    steps = samplers.make_steps(schedules.make_schedule("gumbel", 8, 4), 100, scheduler)
    tokens = jax.jit(lambda keys: samplers.sample(posterior, table, steps, keys=keys, length=100))(
        keys_of(jax.random.key(0), 100)
    )
    counts = np.bincount(np.asarray(tokens).ravel(), minlength=4) / 10_000
    np.testing.assert_allclose(counts, frequencies, atol=0.02)


@pytest.mark.parametrize("scheduler", ["ddpm", "dpmpp"])
def test_known_tokens_are_clean_in_every_pass_and_come_back(scheduler):
    rng = np.random.default_rng(7)
    known = samplers.Known(
        tokens=rng.integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32), mask=rng.random((ROWS, LENGTH)) < 0.5
    )
    keys, watched = keys_of(jax.random.key(5), ROWS), []
    tokens = run(scheduler, 6, keys, watch=watched, known=known)
    np.testing.assert_array_equal(tokens[known.mask], known.tokens[known.mask])
    for z, _, _ in watched:
        np.testing.assert_allclose(z[known.mask], TABLE[known.tokens[known.mask]], rtol=1e-5)
    expected, expected_tokens = reference_passes(scheduler, 6, noises_of(keys, 6), known=known)
    assert_passes_agree(watched, expected)
    np.testing.assert_array_equal(tokens[~known.mask], expected_tokens[~known.mask])


def test_known_tokens_come_back_though_the_network_would_say_otherwise():
    known = samplers.Known(tokens=np.full((1, LENGTH), 2, np.int32), mask=np.arange(LENGTH)[None] < 3)
    table = jnp.asarray(TABLE, jnp.float32)
    steps = samplers.make_steps(schedules.make_schedule("gumbel", DIM, VOCAB), 3, "ddim")
    stubborn = jax.nn.one_hot(jnp.full((1, LENGTH), 9), VOCAB) * 50
    tokens = samplers.sample(
        lambda z, gamma, x_hat, kept: (stubborn, kept),
        table,
        steps,
        keys=keys_of(jax.random.key(0), 1),
        length=LENGTH,
        known=known,
    )
    np.testing.assert_array_equal(tokens, [[2, 2, 2, 9, 9]])


def test_a_row_does_not_depend_on_the_rows_beside_it():
    keys, alone, together = keys_of(jax.random.key(6), ROWS), [], []
    run("ddpm", 5, keys[:1], watch=alone)
    run("ddpm", 5, keys, watch=together)
    for one, many in zip(alone, together, strict=True):
        np.testing.assert_allclose(one[0][0], many[0][0], rtol=1e-5, atol=1e-5)
    assert not np.allclose(together[0][0][0], together[0][0][1])


def test_the_callback_hears_of_every_pass_in_order():
    seen = []
    run("ddim", 7, keys_of(jax.random.key(0), ROWS), step_callback=seen.append)
    assert seen == [1, 2, 3, 4, 5, 6, 7]


def test_in_bfloat16_only_the_mean_embedding_is_rounded():
    keys, exact, rounded = keys_of(jax.random.key(4), ROWS), [], []
    run("ddim", 5, keys, watch=exact)
    run("ddim", 5, keys, watch=rounded, compute_dtype=jnp.bfloat16)
    np.testing.assert_array_equal(exact[0][0], rounded[0][0])
    difference = np.abs(exact[1][2] - rounded[1][2])
    assert 0 < difference.max() < 2e-2 * np.abs(exact[1][2]).max()


def test_any_number_of_steps_traces_one_network():
    traced = []

    def denoise(z, gamma, x_hat, kept):
        traced.append(z.shape)
        return toy_logits(z, gamma, x_hat, jnp), kept

    steps = samplers.make_steps(schedules.make_schedule("gumbel", DIM, VOCAB), 50, "ddpm")
    table = jnp.asarray(TABLE, jnp.float32)
    text = (
        jax.jit(lambda s: samplers.sample(denoise, table, s, keys=keys_of(jax.random.key(0), 2), length=LENGTH))
        .lower(steps)
        .as_text()
    )
    assert len(traced) == 1
    # Nothing is sent to the host when nobody watches.
    assert "callback" not in text


def test_bad_arguments_are_one_line():
    schedule = schedules.make_schedule("gumbel", DIM, VOCAB)
    with pytest.raises(UserError, match="num_steps is 0"):
        samplers.make_steps(schedule, 0, "ddim")
    with pytest.raises(UserError, match=r"'euler'.*ddim, ddpm, dpmpp"):
        samplers.make_steps(schedule, 10, "euler")


def test_what_a_pass_keeps_comes_to_the_next():
    seen = []

    def denoise(z, gamma, x_hat, kept):
        jax.debug.callback(lambda kept: seen.append(int(kept)), kept)
        return toy_logits(z, gamma, x_hat, jnp), 2 * kept

    steps = samplers.make_steps(schedules.make_schedule("gumbel", DIM, VOCAB), 4, "ddim")
    table = jnp.asarray(TABLE, jnp.float32)
    sample = jax.jit(
        lambda steps: samplers.sample(
            denoise, table, steps, keys=keys_of(jax.random.key(0), 2), length=LENGTH, kept=3
        )
    )
    jax.block_until_ready(sample(steps))
    jax.effects_barrier()
    assert sorted(seen) == [3, 6, 12, 24]
