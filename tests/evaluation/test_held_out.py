import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stubs import LogitsAsFeatures

from sunfish_jax.data.padded_rows import PaddedBatch
from sunfish_jax.diffusion import process
from sunfish_jax.evaluation import held_out
from sunfish_jax.models.prompt import Prompt

VOCAB, DIM, LENGTH = 12, 8, 16


class Stub(LogitsAsFeatures):
    """A denoiser that knows the single-token posterior and, if told, which token follows which.

    In its texts token v is followed by v + 1: `context` reads it off the noisy left neighbour.
    `first_estimate` is worth that many nats to a model that sees its own estimate.
    """

    context: bool = False
    first_estimate: float = 0.0

    def setup(self):
        self.raw = self.param("raw", nn.initializers.normal(1.0), (VOCAB, DIM))

    def embeddings(self):
        return self.raw * DIM**0.5 / jnp.linalg.norm(self.raw, axis=-1, keepdims=True)

    def encode_prompt(self, prompt):
        return prompt.mask

    def logits(self, vocabulary, z, gamma, x_hat, known_mask, prompt):
        scores = process.posterior_scale(gamma)[:, None, None] * (z @ vocabulary.embeddings.T)
        if self.context:
            left = jnp.pad(scores, ((0, 0), (1, 0), (0, 0)))[:, :-1]
            scores = scores + jnp.roll(jnp.log(jax.nn.softmax(left) + 1e-3), 1, axis=-1)
        return scores * (1 + self.first_estimate * jnp.any(x_hat != 0))


def rows(num_batches=5, batch=6):
    rng = np.random.default_rng(0)
    for _ in range(num_batches):
        tokens = (rng.integers(VOCAB, size=(1, batch, 1)) + np.arange(LENGTH)) % VOCAB
        lengths = rng.integers(LENGTH // 2, LENGTH + 1, size=(1, batch, 1))
        prompt = Prompt(np.zeros((1, batch, 4), np.int32), np.zeros((1, batch, 4), bool))
        mask = np.arange(LENGTH) < lengths
        yield PaddedBatch(tokens.astype(np.int32), mask, np.zeros_like(mask), prompt)


def evaluate(model, table=None):
    raw = jax.random.normal(jax.random.key(3), (VOCAB, DIM)) if table is None else table
    params = {"raw": raw}
    return held_out.held_out_cross_entropy(model, params, list(rows()))


def test_the_single_token_posterior_matches_a_float64_loop():
    """At each level the mean over real tokens, whatever the padding holds."""
    raw = jax.random.normal(jax.random.key(3), (VOCAB, DIM))
    table = np.asarray(raw, np.float64)
    table *= math.sqrt(DIM) / np.linalg.norm(table, axis=-1, keepdims=True)
    figures = evaluate(Stub(), raw)
    means = []
    for snr in process.HELD_OUT_SNRS:
        # The same quantity from other noise, so agreement is up to sampling.
        rng = np.random.default_rng(1)
        gamma = math.log(DIM / snr)
        alpha, sigma = math.sqrt(1 / (1 + math.exp(gamma))), math.sqrt(1 / (1 + math.exp(-gamma)))
        tokens = rng.integers(VOCAB, size=4000)
        z = alpha * table[tokens] + sigma * rng.normal(size=(4000, DIM))
        logits = alpha / sigma**2 * z @ table.T
        log_probs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
        means.append(-log_probs[np.arange(4000), tokens].mean())
        assert figures[f"held_out/rho_{snr:g}"] == pytest.approx(means[-1], abs=0.15)
    assert figures["held_out/mean"] == pytest.approx(np.mean(means), abs=0.05)


def test_a_model_without_context_gains_nothing_from_it():
    figures = evaluate(Stub())
    for snr in process.HELD_OUT_SNRS:
        # The same noise and, up to a constant, the same logits.
        assert figures[f"context/none_{snr:g}"] == pytest.approx(figures[f"context/true_{snr:g}"], abs=1e-4)
        assert figures[f"context/shuffled_{snr:g}"] == pytest.approx(figures[f"context/true_{snr:g}"], abs=1e-4)
    assert figures["held_out/self_conditioning_gain"] == 0


def test_a_model_with_context_loses_it_when_words_are_shuffled():
    figures = evaluate(Stub(context=True))
    assert figures["context/none_2.4"] > figures["context/true_2.4"] + 0.5
    assert figures["context/shuffled_2.4"] > figures["context/true_2.4"] + 0.5
    assert figures["context/gain"] > 0.3


def test_self_conditioning_gain_has_the_right_sign():
    # Sharpening a calibrated posterior makes it worse.
    assert evaluate(Stub(first_estimate=1.0))["held_out/self_conditioning_gain"] < -0.05


def test_every_length_is_looked_at_closely():
    """Of two lengths, of which the shorter has four batches, the longer has a share in the detail too."""
    (wide,) = rows(num_batches=1)
    short = jax.tree.map(lambda leaf: leaf[:, :, : LENGTH // 2] if leaf.ndim == 3 else leaf, wide)
    short = short.replace(prompt=wide.prompt)
    raw = jax.random.normal(jax.random.key(3), (VOCAB, DIM))
    params = {"raw": raw}

    def true_context(batches):
        figures = held_out.held_out_cross_entropy(Stub(context=True), params, batches)
        return figures["context/true_2.4"]

    assert true_context([short] * 4 + [wide]) != true_context([short] * 4)
    assert true_context([short] * 4) == true_context([short])


def test_figures_repeat_and_compile_once():
    held_out._features.clear_cache()
    assert evaluate(Stub()) == evaluate(Stub())
    assert held_out._features._cache_size() == 1


def test_nearest_neighbour_distance():
    # More rows than one block holds; unit vectors at right angles, then with one of them there twice.
    class Table(LogitsAsFeatures):
        def setup(self):
            self.table = self.param("table", nn.initializers.zeros, (600, 600))

        def embeddings(self):
            return self.table

    def distance(table):
        return float(held_out.nearest_neighbour_distance(Table(), {"table": jnp.asarray(table)}))

    assert distance(3 * np.eye(600)) == pytest.approx(math.sqrt(2))
    table = np.eye(600)
    table[599] = table[0]
    assert distance(table) == pytest.approx(math.sqrt(2) * 598 / 600, abs=2e-3)
