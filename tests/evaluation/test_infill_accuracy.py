import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from stubs import LogitsAsFeatures

from sunfish_jax.data.padded_rows import PaddedBatch
from sunfish_jax.diffusion.process import posterior_scale
from sunfish_jax.diffusion.schedules import make_schedule
from sunfish_jax.evaluation.infill_accuracy import GAP_SIZES, choose_gaps, infill_accuracy
from sunfish_jax.generation.generator import Constraint, generate
from sunfish_jax.generation.options import Settings
from sunfish_jax.models.prompt import Prompt

VOCAB, DIM = 20, 16


class Counting(LogitsAsFeatures):
    """Token v is followed by v + 1: each position believes what its neighbours, two on each side, say."""

    vocab_size: int = VOCAB
    dtype: jnp.dtype = jnp.dtype("float32")
    quantized: bool = False

    def setup(self):
        self.table = self.param("table", nn.initializers.normal(1.0), (VOCAB, DIM))

    def embeddings(self):
        return self.table * DIM**0.5 / jnp.linalg.norm(self.table, axis=-1, keepdims=True)

    def encode_prompt(self, prompt):
        return prompt.mask

    def logits(self, vocabulary, z, gamma, x_hat, known_mask, prompt):
        similarity = z @ vocabulary.embeddings.T
        prior = posterior_scale(gamma)[:, None, None] * similarity
        belief = jax.nn.softmax(jnp.where(known_mask[..., None], 100 * similarity, prior))
        logits = prior
        for distance in (1, 2):
            left = jnp.pad(belief, ((0, 0), (distance, 0), (0, 0)))[:, :-distance]
            right = jnp.pad(belief, ((0, 0), (0, distance), (0, 0)))[:, distance:]
            logits += jnp.log(jnp.roll(left, distance, axis=-1) + 1e-3)
            logits += jnp.log(jnp.roll(right, -distance, axis=-1) + 1e-3)
        return logits


def batch(rng, rows=8, length=48):
    tokens = (rng.integers(VOCAB, size=(1, rows, 1)) + np.arange(length)) % VOCAB
    mask = np.arange(length) < rng.integers(30, length + 1, size=(1, rows, 1))
    prompt = Prompt(np.zeros((1, rows, 1)), mask[..., :1])
    return PaddedBatch(tokens.astype(np.int32), mask, np.zeros_like(mask), prompt)


def test_gaps_are_filled_from_their_surroundings():
    rng = np.random.default_rng(0)
    model, settings = Counting(), Settings("ddim", 16, 1.5, (0.1, 0.9), 1.0)
    params = {"table": jax.random.normal(jax.random.key(0), (VOCAB, DIM))}
    schedule = make_schedule("gumbel", DIM, VOCAB)
    rows = [batch(rng, rows=24), batch(rng, rows=24)]

    def fill(known, prompt, keys):
        constraint = Constraint(known, np.zeros_like(known.tokens), np.ones((1, VOCAB), bool))
        return generate(model, params, schedule, prompt, keys, 48, settings, constraint=constraint)

    accuracies = infill_accuracy(fill, rows, most_frequent=7)
    assert tuple(accuracies) == GAP_SIZES
    for size, accuracy in accuracies.items():
        # A neighbour on each side is at most two tokens away in all but the longest gaps.
        assert accuracy.true > (0.9 if size <= 4 else 0.5)
        # 1 in 20 by chance, which all tokens of a gap share: the others follow from the first.
        assert accuracy.shuffled < 0.25
        assert 0 <= accuracy.standard_error < 0.15
        assert 0 < accuracy.margin_error < 0.15
        assert accuracy.num_tokens >= 10 * size
    gaps = [choose_gaps(rows[i].padding_mask[0], np.random.default_rng((0, i))) for i in range(2)]
    for size, accuracy in accuracies.items():
        there = np.concatenate([row.tokens[0][gap == size] for row, gap in zip(rows, gaps, strict=True)])
        assert accuracy.num_tokens == len(there)
        assert accuracy.unigram == (there == 7).mean()


def test_gaps_have_their_sizes_apart_and_spare_the_end():
    mask = np.arange(256) < np.random.default_rng(1).integers(0, 257, size=(50, 1))
    gaps = choose_gaps(mask, np.random.default_rng(0))
    sizes, betweens = set(), set()
    for row, real in zip(gaps, mask, strict=True):
        assert not row[max(0, real.sum() - 1) :].any()
        edges = np.flatnonzero(np.diff(np.concatenate([[0], row, [0]])))
        for start, end in zip(edges[::2], edges[1::2], strict=True):
            assert (row[start:end] == end - start).all()
        sizes |= set((edges[1::2] - edges[::2]).tolist())
        betweens |= set((edges[2::2] - edges[1:-1:2]).tolist())
    assert sizes == set(GAP_SIZES)
    assert min(betweens) >= 8
