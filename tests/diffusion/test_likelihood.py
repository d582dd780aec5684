"""The likelihood bound on sources whose entropy is known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sunfish_jax.diffusion import likelihood, process, schedules

VOCAB, DIM, LENGTH = 4, 8, 8
RNG = np.random.default_rng(0)
TABLE = RNG.normal(size=(VOCAB, DIM))
TABLE = jnp.asarray(TABLE * np.sqrt(DIM) / np.linalg.norm(TABLE, axis=1, keepdims=True), jnp.float32)
START = np.array([0.6, 0.2, 0.1, 0.1])
TRANSITION = np.array([[0.05, 0.8, 0.1, 0.05], [0.1, 0.1, 0.75, 0.05], [0.6, 0.1, 0.1, 0.2], [0.7, 0.1, 0.1, 0.1]])
SCHEDULE = schedules.make_schedule("gumbel", DIM, VOCAB)


def entropy(p):
    return -np.sum(p * np.log(p), axis=-1)


def source_entropy():
    """Nats of a sequence of the Markov source."""
    total, marginal = entropy(START), START
    for _ in range(LENGTH - 1):
        total += marginal @ entropy(TRANSITION)
        marginal = marginal @ TRANSITION
    return total


def draw_sequences(num_rows, seed=1):
    u = np.random.default_rng(seed).random((num_rows, LENGTH, 1))
    tokens = np.zeros((num_rows, LENGTH), np.int32)
    tokens[:, 0] = np.sum(u[:, 0] > np.cumsum(START)[:-1], axis=1)
    for i in range(1, LENGTH):
        tokens[:, i] = np.sum(u[:, i] > np.cumsum(TRANSITION, axis=1)[tokens[:, i - 1], :-1], axis=1)
    return tokens


def negative_log_likelihood(tokens):
    return -np.log(START[tokens[:, 0]]) - np.log(TRANSITION[tokens[:, :-1], tokens[:, 1:]]).sum(axis=1)


def token_evidence(z, gamma):
    return process.posterior_scale(gamma)[:, None, None] * (z @ TABLE.T)


def exact_denoise(z, gamma, x_hat):
    """The posterior of every token given all of z, by forward-backward: a model trained to perfection."""
    evidence = token_evidence(z, gamma).swapaxes(0, 1)
    log_transition = jnp.log(jnp.asarray(TRANSITION, jnp.float32))

    def forward(message, evidence):
        after = jax.nn.logsumexp((message + evidence)[:, :, None] + log_transition, axis=1)
        return after, message

    def backward(message, evidence):
        before = jax.nn.logsumexp((message + evidence)[:, None, :] + log_transition, axis=2)
        return before, message

    start = jnp.broadcast_to(jnp.log(jnp.asarray(START, jnp.float32)), evidence.shape[1:])
    _, before = jax.lax.scan(forward, start, evidence)
    _, after = jax.lax.scan(backward, jnp.zeros_like(start), evidence, reverse=True)
    return (before + evidence + after).swapaxes(0, 1)


@functools.cache
def bound_of(denoise, *, num_rows=256, self_conditioning=False, schedule=SCHEDULE):
    tokens = draw_sequences(num_rows)
    mask = np.ones_like(tokens, bool)
    bound = jax.jit(
        functools.partial(
            likelihood.likelihood_bound,
            lambda z, gamma, x_hat: denoise(z, gamma, x_hat),
            TABLE,
            num_draws=64,
            self_conditioning=self_conditioning,
        )
    )(schedule, tokens, mask, key=jax.random.key(2))
    return tokens, jax.tree.map(np.asarray, bound)


def check_against_source(tokens, bound):
    """Not below the source's entropy and not more than 5 % above it, as the recipe asks.

    The sequences' own negative log-likelihoods stand for their share of the entropy, and what is left is the
    entropy: this takes the luck of which sequences were drawn out of the figure.
    """
    excess = np.asarray(bound.total, np.float64) - negative_log_likelihood(tokens)
    standard_error = excess.std(ddof=1) / np.sqrt(len(excess))
    figure = source_entropy() + excess.mean()
    assert figure > source_entropy() - 3 * standard_error, "below the entropy: the model is told the answer"
    assert figure < 1.05 * source_entropy(), "more than 5 % above the entropy"


def test_the_source_is_what_it_says():
    """The reference itself: sequences' mean negative log-likelihood is the entropy."""
    nats = negative_log_likelihood(draw_sequences(20_000))
    assert abs(nats.mean() - source_entropy()) < 4 * nats.std() / np.sqrt(20_000)


def test_exact_denoiser_is_the_posterior_by_brute_force():
    rng = np.random.default_rng(3)
    z = rng.normal(size=(1, 3, DIM))
    gamma = np.array([1.0])
    alpha, variance = np.sqrt(1 / (1 + np.exp(1.0))), 1 / (1 + np.exp(-1.0))
    table, posterior = np.asarray(TABLE, np.float64), np.zeros((3, VOCAB))
    for x in np.ndindex(VOCAB, VOCAB, VOCAB):
        prior = START[x[0]] * TRANSITION[x[0], x[1]] * TRANSITION[x[1], x[2]]
        weight = prior * np.exp(-np.sum((z[0] - alpha * table[list(x)]) ** 2) / (2 * variance))
        for i in range(3):
            posterior[i, x[i]] += weight
    posterior /= posterior.sum(axis=1, keepdims=True)
    logits = exact_denoise(jnp.asarray(z, jnp.float32), jnp.asarray(gamma, jnp.float32), None)
    np.testing.assert_allclose(jax.nn.softmax(logits)[0], posterior, rtol=2e-4)


def test_with_the_exact_posterior_the_bound_is_the_entropy():
    tokens, bound = bound_of(exact_denoise)
    check_against_source(tokens, bound)
    # No slack but for the prior's: the figure itself, not merely its being within 5 %.
    excess = bound.total - negative_log_likelihood(tokens)
    standard_error = excess.std() / np.sqrt(len(excess))
    assert standard_error < 0.01 * source_entropy()
    assert abs(excess.mean()) < 3 * standard_error + 0.01


def test_a_denoiser_that_ignores_context_pays_for_it():
    """With each token's own exact posterior the bound is the sum of the marginal entropies."""
    marginals = np.stack([START @ np.linalg.matrix_power(TRANSITION, i) for i in range(LENGTH)])
    tokens, bound = bound_of(lambda z, gamma, x_hat: token_evidence(z, gamma) + jnp.log(marginals))
    excess = bound.total + np.log(marginals[np.arange(LENGTH), tokens]).sum(axis=1)
    assert abs(excess.mean()) < 3 * excess.std() / np.sqrt(len(excess)) + 0.01
    with pytest.raises(AssertionError, match="more than 5 %"):
        check_against_source(tokens, bound)


@pytest.mark.parametrize("share", [1.0, 0.1])
def test_a_denoiser_that_is_handed_the_clean_token_is_caught(share):
    """Entirely, or at a tenth of the sequences' positions only."""
    tokens = draw_sequences(256)
    handed = np.random.default_rng(5).random(tokens.shape) < share
    answer = 40.0 * jax.nn.one_hot(tokens, VOCAB) * handed[..., None]
    cheated = bound_of(lambda z, gamma, x_hat: exact_denoise(z, gamma, x_hat) + answer)
    with pytest.raises(AssertionError, match="below the entropy"):
        check_against_source(*cheated)


def test_self_conditioning_is_recomputed_from_the_same_z():
    """Carried over from another noise level, x_hat would tell of other noise: the network is handed an answer."""
    passes = []

    def watched(z, gamma, x_hat):
        jax.debug.callback(lambda *a: passes.append([np.array(x) for x in a]), z, gamma, x_hat, ordered=True)
        return token_evidence(z, gamma)

    bound_of(watched, num_rows=2, self_conditioning=True)
    jax.effects_barrier()
    assert len(passes) == 2 * 65
    for (z, gamma, x_hat), (z_again, gamma_again, x_hat_again) in zip(passes[::2], passes[1::2], strict=True):
        np.testing.assert_array_equal(z, z_again)
        np.testing.assert_array_equal(gamma, gamma_again)
        np.testing.assert_array_equal(x_hat, 0)
        logits = np.exp((np.log1p(np.exp(-gamma)) - gamma) / 2)[:, None, None] * (z @ np.asarray(TABLE).T)
        p = np.exp(logits - logits.max(axis=-1, keepdims=True))
        estimate = p / p.sum(axis=-1, keepdims=True) @ np.asarray(TABLE)
        np.testing.assert_allclose(x_hat_again, estimate, rtol=1e-3, atol=1e-3)


def test_the_second_estimate_is_the_one_that_is_scored():
    """A network that is right only when it is given its own estimate."""

    def second_time_lucky(z, gamma, x_hat):
        return jnp.where(jnp.any(x_hat != 0), exact_denoise(z, gamma, x_hat), 0.0)

    check_against_source(*bound_of(second_time_lucky, self_conditioning=True))


@pytest.mark.parametrize(
    "schedule",
    [
        SCHEDULE,
        # Most of it lies below the range: what is left must be scaled up to a density.
        schedules.GumbelSchedule(jnp.float32(-4.0), jnp.float32(0.0), jnp.float32(0.0)),
        schedules.make_schedule("sqrt", DIM, VOCAB),
    ],
    ids=["gumbel", "cut", "sqrt"],
)
def test_importance_weights_give_the_integral_whatever_the_schedule(schedule):
    """A denoiser that always guesses alike has diff = 1/2 |e - m|^2 (e^-gamma_0 - e^-gamma_1)."""
    tokens = np.tile(np.arange(VOCAB, dtype=np.int32), (64, 1))
    bound = jax.jit(
        lambda schedule, key: likelihood.likelihood_bound(
            lambda z, gamma, x_hat: jnp.zeros((*z.shape[:2], VOCAB)),
            TABLE,
            schedule,
            tokens,
            np.ones_like(tokens, bool),
            key=key,
            num_draws=256,
            self_conditioning=False,
        )
    )(schedule, jax.random.key(0))
    table = np.asarray(TABLE, np.float64)
    distance = np.sum((table - table.mean(axis=0)) ** 2)
    # e^-gamma = rho / D.
    expected = 0.5 * distance * (64 - 0.0025) / DIM
    np.testing.assert_allclose(np.mean(bound.diff), expected, rtol=5e-3)
    np.testing.assert_allclose(bound.recon, VOCAB * np.log(VOCAB), rtol=1e-5)


def test_terms_are_those_of_a_float64_loop_and_padding_is_told_apart():
    """Every pass's z and gamma are caught on the way, and the terms computed anew from them."""
    tokens = draw_sequences(3)
    mask = np.arange(LENGTH) < np.array([[8], [5], [1]])
    passes = []

    def watched(z, gamma, x_hat):
        jax.debug.callback(lambda *a: passes.append([np.array(x, np.float64) for x in a]), z, gamma, ordered=True)
        return token_evidence(z, gamma) + jnp.roll(z, 1, axis=1)[..., :VOCAB]

    bound = likelihood.likelihood_bound(
        watched, TABLE, SCHEDULE, tokens, mask, key=jax.random.key(9), num_draws=16, self_conditioning=False
    )
    jax.effects_barrier()
    table, num_draws = np.asarray(TABLE, np.float64), len(passes) - 1
    assert num_draws == 16
    gamma_0, gamma_1 = np.log(DIM / 64), np.log(DIM / 0.0025)
    mu, beta = np.log(DIM) - 1.92, 0.85
    cdf = lambda gamma: np.exp(-np.exp(-(gamma - mu) / beta))  # noqa: E731
    recon, diff = np.zeros(tokens.shape), np.zeros(tokens.shape)
    for i, (z, gamma) in enumerate(passes):
        for row in range(3):
            g = gamma[row]
            scale = np.sqrt(1 / (1 + np.exp(g))) * (1 + np.exp(-g))
            logits = scale * z[row] @ table.T + np.roll(z[row], 1, axis=0)[:, :VOCAB]
            p = np.exp(logits - logits.max(axis=1, keepdims=True))
            p /= p.sum(axis=1, keepdims=True)
            if i == 0:
                np.testing.assert_allclose(g, gamma_0, rtol=1e-5)
                recon[row] = -np.log(p[np.arange(LENGTH), tokens[row]])
                continue
            gumbel = np.exp(-(g - mu) / beta) * cdf(g) / beta / (cdf(gamma_1) - cdf(gamma_0))
            pi = 0.5 * gumbel + 0.5 / (gamma_1 - gamma_0)
            error = np.sum((table[tokens[row]] - p @ table) ** 2, axis=1)
            diff[row] += 0.5 * np.exp(-g) / pi * error / num_draws
    variance = 1 / (1 + np.exp(-gamma_1))
    prior = 0.5 * np.sum(variance + (1 - variance) * table[tokens] ** 2 - 1 - np.log(variance), axis=-1)
    np.testing.assert_allclose(bound.prior, (prior * mask).sum(axis=1), rtol=1e-4)
    np.testing.assert_allclose(bound.recon, (recon * mask).sum(axis=1), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(bound.diff, (diff * mask).sum(axis=1), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(bound.padding, ((prior + recon + diff) * ~mask).sum(axis=1), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(bound.total, (prior + recon + diff).sum(axis=1), rtol=1e-3)


def test_noise_levels_are_stratified_and_cover_the_range():
    gamma, log_pi = likelihood._draw_levels(jax.random.key(0), SCHEDULE, -2.0, 8.0, 64)
    # Half the strata are uniform over the range, so no gap is wider than two of its 32.
    gaps = np.diff(np.sort(np.concatenate([[-2.0], gamma, [8.0]])))
    assert gaps.max() < 2 * 10 / 32
    assert np.exp(-log_pi).max() <= 2 * 10 + 1e-3
