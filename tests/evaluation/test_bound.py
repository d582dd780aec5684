import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stubs import LogitsAsFeatures

from sunfish_jax.data.padded_rows import PaddedBatch
from sunfish_jax.diffusion.process import posterior_scale
from sunfish_jax.diffusion.schedules import make_schedule
from sunfish_jax.evaluation.bound import bits_per_byte
from sunfish_jax.evaluation.text_rows import TextRows
from sunfish_jax.models.prompt import Prompt

VOCAB, DIM, LENGTH, ROWS = 8, 16, 5, 64
SCHEDULE = make_schedule("gumbel", DIM, VOCAB)


class Stub(LogitsAsFeatures):
    """The exact posterior of independent, evenly drawn tokens; a prompt halves the vocabulary.

    A row whose prompt is 0 holds the tokens 0-3 alone, one whose prompt is 1 the others.
    """

    def setup(self):
        self.table = self.param("table", nn.initializers.normal(1.0), (VOCAB, DIM))

    def embeddings(self):
        return self.table * DIM**0.5 / jnp.linalg.norm(self.table, axis=-1, keepdims=True)

    def encode_prompt(self, prompt):
        possible = jnp.arange(VOCAB) // 4 == prompt.inputs[:, :1]
        return jnp.where(possible | ~prompt.mask[:, :1], 0.0, -1e9)

    def logits(self, vocabulary, z, gamma, x_hat, known_mask, prompt):
        return posterior_scale(gamma)[:, None, None] * (z @ vocabulary.embeddings.T) + prompt[:, None]


PARAMS = {"table": jax.random.normal(jax.random.key(0), (VOCAB, DIM))}


@pytest.fixture(scope="module")
def text():
    """Two batches; the last row of the second is empty."""
    rng = np.random.default_rng(0)
    batches, row_bytes = [], []
    for i in range(2):
        half = rng.integers(2, size=(1, ROWS, 1), dtype=np.int32)
        tokens = (4 * half + rng.integers(4, size=(1, ROWS, LENGTH))).astype(np.int32)
        mask = np.ones(tokens.shape, bool)
        if i:
            mask[0, -1] = False
        batches.append(PaddedBatch(tokens, mask, ~mask & False, Prompt(half, np.ones(half.shape, bool))))
        row_bytes.append(np.full(ROWS, 2 * LENGTH) * mask[0, :, 0])
    return TextRows(batches, row_bytes)


def test_the_bound_is_near_the_entropy_and_a_prompt_is_worth_what_it_tells(text):
    for rows, bits_per_token in ((text, 2), (text.without_prompts(), 3)):
        bound = bits_per_byte(Stub(), PARAMS, SCHEDULE, rows, num_draws=64)
        # A token stands for two bytes.
        assert bound.value == pytest.approx(bits_per_token / 2, rel=0.05)
        assert bound.value > bits_per_token / 2 - 3 * bound.standard_error
        assert sum(bound.terms.values()) == pytest.approx(bound.value)
        assert (bound.num_rows, bound.num_bytes) == (2 * ROWS - 1, (2 * ROWS - 1) * 2 * LENGTH)


def test_the_standard_error_is_that_of_repeated_measurements(text):
    """Many figures from eight rows each scatter as the standard error of each says."""
    batch, num_bytes = text.without_prompts().rows[0], text.row_bytes[0]
    values, errors = [], []
    for start in range(0, ROWS, 8):
        part = jax.tree.map(lambda leaf, start=start: leaf[:, start : start + 8], batch)
        rows = TextRows([part], [num_bytes[start : start + 8]])
        bound = bits_per_byte(Stub(), PARAMS, SCHEDULE, rows, num_draws=8)
        values.append(bound.value)
        errors.append(bound.standard_error)
    assert 0.4 < np.std(values, ddof=1) / np.mean(errors) < 2.0
    assert all(map(math.isfinite, errors))
