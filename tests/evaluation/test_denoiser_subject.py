from pathlib import Path

import jax
import numpy as np
import pytest
from alphabet import MODEL, NO_PROMPT, PARAMS, SCHEDULE, TOKENIZER
from ml_collections import ConfigDict

from sunfish_jax.diffusion.samplers import Known
from sunfish_jax.evaluation import run as evaluation
from sunfish_jax.generation.generator import sample_keys
from sunfish_jax.generation.options import Settings
from sunfish_jax.workdir.run import Run


@pytest.fixture
def denoiser():
    settings = Settings("ddpm", 32, 1.5, (0.1, 0.9), 1.0)
    config = ConfigDict({"eval": {"bound_draws": 64}})
    run = Run(Path("workdir"), config, TOKENIZER, None, MODEL, PARAMS, SCHEDULE, 7, "corpus", None)
    return evaluation.Denoiser(run, settings)


def test_gaps_hold_the_letters_between_and_nothing_follows_the_end(denoiser):
    given = [*TOKENIZER.encode(" a b c d e f g h"), TOKENIZER.eos_token_id]
    tokens = np.full((2, 16), TOKENIZER.pad_token_id, np.int32)
    tokens[:, : len(given)] = given
    mask = np.zeros((2, 16), bool)
    mask[:, : len(given)] = True
    mask[0, 2] = mask[1, 4:6] = False
    hidden = np.where(mask, tokens, 0)
    prompt = jax.tree.map(lambda leaf: np.repeat(leaf, 2, axis=0), NO_PROMPT)

    filled = denoiser.fill(Known(hidden, mask), prompt, sample_keys(0, np.arange(2)))

    np.testing.assert_array_equal(filled, tokens)


def test_gaps_are_filled_in_one_pass(denoiser, monkeypatch):
    passes = []
    monkeypatch.setattr(evaluation, "generate", lambda *arguments, **_: passes.append(arguments[6].num_steps))
    denoiser.fill(Known(np.zeros((1, 4), np.int32), np.ones((1, 4), bool)), NO_PROMPT, sample_keys(0, np.arange(1)))
    assert passes == [1]


def test_what_is_only_compared_with_gets_a_quarter_of_the_draws(denoiser, monkeypatch):
    draws = []
    monkeypatch.setattr(evaluation, "bits_per_byte", lambda *arguments, num_draws: draws.append(num_draws))
    for rough in (False, True):
        denoiser.likelihood(None, rough)
    assert draws == [64, 16]
