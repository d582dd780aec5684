import io

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from encoders import FrozenEncoder
from ml_collections import ConfigDict
from stubs import LogitsAsFeatures

from configs import nano
from sunfish_jax.diffusion.process import posterior_scale
from sunfish_jax.diffusion.samplers import Known
from sunfish_jax.diffusion.schedules import make_schedule
from sunfish_jax.generation import generator
from sunfish_jax.generation.options import SampleOptions
from sunfish_jax.generation.output import StepCounter
from sunfish_jax.models.denoiser import init_params, make_model
from sunfish_jax.models.prompt import Prompt

VOCAB, DIM, LENGTH = 11, 8, 6
SCHEDULE = make_schedule("gumbel", DIM, VOCAB)
PLAIN = generator.Settings("ddim", 5, 1.0, (0.0, 1.0), 1.0)
encoded = []


class Stub(LogitsAsFeatures):
    """Prefers token 1 by 2 nats and, told a prompt, its token by 1 nat besides; `prior` makes noise matter."""

    prior: float = 0.0
    dtype: jnp.dtype = jnp.dtype("float32")
    quantized: bool = False

    def setup(self):
        self.table = self.param("table", nn.initializers.normal(1.0), (VOCAB, DIM))

    def embeddings(self):
        return self.table * DIM**0.5 / jnp.linalg.norm(self.table, axis=-1, keepdims=True)

    def encode_prompt(self, prompt):
        jax.debug.callback(lambda: encoded.append(1))
        return jnp.where(prompt.mask[:, 0, None], jax.nn.one_hot(prompt.inputs[:, 0], VOCAB), 0.0)

    def logits(self, vocabulary, z, gamma, x_hat, known_mask, prompt):
        prior = posterior_scale(gamma)[:, None, None] * (z @ vocabulary.embeddings.T)
        return self.prior * prior + 2 * jax.nn.one_hot(1, VOCAB) + prompt[:, None]


PARAMS = {"table": jax.random.normal(jax.random.key(0), (VOCAB, DIM))}


def prompts(*tokens):
    tokens = np.array(tokens, np.int32)[:, None]
    return Prompt(np.maximum(tokens, 0), tokens >= 0)


def generate(prompt, keys, settings=PLAIN, prior=0.0, **kwargs):
    return generator.generate(
        Stub(prior), PARAMS, SCHEDULE, prompt, keys, kwargs.pop("length", LENGTH), settings, **kwargs
    )


@pytest.mark.parametrize(
    ("scale", "interval", "token"),
    [(0.0, (0.0, 1.0), 1), (1.0, (0.0, 1.0), 1), (3.0, (0.0, 1.0), 4), (3.0, (0.1, 0.9), 1)],
)
def test_guidance_strengthens_the_prompt_within_its_interval(scale, interval, token):
    settings = generator.Settings("ddim", 5, scale, interval, 1.0)
    tokens = generate(prompts(4, -1), generator.sample_keys(0, np.arange(2)), settings)
    assert (tokens[0] == token).all()
    assert (tokens[1] == 1).all()


def test_a_sample_depends_on_its_own_seed_index_and_prompt_alone(monkeypatch):
    # DDPM, which draws noise in every step.
    settings = generator.Settings("ddpm", 8, 1.5, (0.1, 0.9), 1.0)
    keys = generator.sample_keys(3, np.arange(5))
    several = generate(prompts(2, 3, 4, 5, -1), keys, settings, prior=1.0)
    alone = generate(prompts(4), generator.sample_keys(3, np.array([2])), settings, prior=1.0)
    np.testing.assert_array_equal(alone[0], several[2])
    # Two at a time, the last turn with one repeated.
    monkeypatch.setattr(generator, "_POSITIONS_AT_ONCE", 2 * LENGTH)
    np.testing.assert_array_equal(generate(prompts(2, 3, 4, 5, -1), keys, settings, prior=1.0), several)
    assert len(np.unique(several, axis=0)) == 5
    other_seed = generate(prompts(2, 3, 4, 5, -1), generator.sample_keys(4, np.arange(5)), settings, prior=1.0)
    assert (other_seed != several).any()


def test_texts_for_different_prompts_begin_with_different_noise():
    prompts = ["a dog", "a dog", "a cat", None]
    keys = jax.random.key_data(generator.text_keys(3, prompts, np.array([0, 1, 0, 0])))
    assert len(np.unique(keys, axis=0)) == 4
    alone = jax.random.key_data(generator.text_keys(3, ["a cat"], np.array([0])))
    np.testing.assert_array_equal(alone[0], keys[2])


def test_compiled_once_and_prompts_encoded_once():
    generator._generate.clear_cache()
    settings = generator.Settings("ddim", 20, 2.0, (0.0, 1.0), 1.0)
    for seed in range(3):
        encoded.clear()
        generate(prompts(seed + 1, 2), generator.sample_keys(seed, np.arange(2)), settings)
        # Once for the prompts and once for the null prompt, however many steps.
        assert len(encoded) == 2
    assert generator._generate._cache_size() == 1


def test_constraint_keeps_known_tokens_and_what_is_not_allowed_out():
    rng = np.random.default_rng(0)
    known = Known(rng.integers(VOCAB, size=(3, LENGTH), dtype=np.int32), rng.random((3, LENGTH)) < 0.5)
    allowed = np.zeros((2, VOCAB), bool)
    allowed[0, [7, 8]] = allowed[1, 9] = True
    kinds = rng.integers(2, size=(3, LENGTH), dtype=np.int32)
    settings = generator.Settings("ddim", 5, 3.0, (0.0, 1.0), 0.7)
    tokens = generate(
        prompts(4, -1, 2),
        generator.sample_keys(0, np.arange(3)),
        settings,
        constraint=generator.Constraint(known, kinds, allowed),
    )
    np.testing.assert_array_equal(tokens[known.mask], known.tokens[known.mask])
    assert set(tokens[~known.mask & (kinds == 0)]) <= {7, 8}
    assert set(tokens[~known.mask & (kinds == 1)]) == {9}


class CopyingStub(Stub):
    """Finds the given tokens in z where they are, and puts elsewhere what x_hat says of the first position."""

    def logits(self, vocabulary, z, gamma, x_hat, known_mask, prompt):
        heard = jnp.where(known_mask[..., None], z, x_hat[:, :1])
        return 10 * heard @ vocabulary.embeddings.T


def test_what_the_network_makes_of_a_given_token_is_what_it_hears_next():
    known = Known(np.full((1, LENGTH), 7, np.int32), np.arange(LENGTH)[None] == 0)
    # Kind 0, which stands at the given token too, rules that token out; kind 1 allows all.
    allowed = np.ones((2, VOCAB), bool)
    allowed[0, 7] = False
    constraint = generator.Constraint(known, np.where(known.mask, 0, 1), allowed)
    keys = generator.sample_keys(0, np.arange(1))
    tokens = generator.generate(
        CopyingStub(), PARAMS, SCHEDULE, prompts(-1), keys, LENGTH, PLAIN, constraint=constraint
    )
    np.testing.assert_array_equal(tokens, known.tokens)


def test_step_counter_counts_every_pass_of_every_turn(monkeypatch):
    monkeypatch.setattr(generator, "_POSITIONS_AT_ONCE", 2 * LENGTH)
    stream = io.StringIO()
    generate(prompts(1, 2, 3), generator.sample_keys(0, np.arange(3)), counter=StepCounter(stream))
    lines = [f"\rsamples 1-2 of 3: step {step}/5" for step in range(1, 6)]
    lines += ["\n"] + [f"\rsample 3 of 3: step {step}/5" for step in range(1, 6)] + ["\n"]
    assert stream.getvalue() == "".join(lines)


def test_options_take_the_place_of_the_runs_settings():
    sampling = ConfigDict(
        {
            "scheduler": "ddim",
            "num_steps": 64,
            "guidance_scale": 1.5,
            "guidance_interval": (0.1, 0.9),
            "temperature": 1.0,
            "max_gap": 8,
        }
    )
    options = SampleOptions(num_steps=10, guidance_scale=0.0)
    assert generator.Settings.make(sampling, options) == generator.Settings("ddim", 10, 0.0, (0.1, 0.9), 1.0)
    assert generator.Settings.make(sampling).num_steps == 64


def test_a_row_of_fewer_positions_is_that_row_alone():
    config = nano.get_config()
    config.model.num_layers, config.model.compute_dtype = 2, "float32"
    model = make_model(config, VOCAB, FrozenEncoder(output_dim=24))
    rng = np.random.default_rng(0)
    # Away from the zeros that it begins with.
    params = jax.jit(lambda: init_params(model, jax.random.key(0)))()
    params = jax.tree.map(lambda p: p + 0.1 * rng.normal(size=p.shape).astype(np.float32), params)
    schedule = make_schedule("gumbel", config.model.embedding_dim, VOCAB)
    prompt = Prompt(rng.normal(size=(3, 5, 24)).astype(np.float16), np.ones((3, 5), bool))
    settings = generator.Settings("ddpm", 6, 2.0, (0.1, 0.9), 1.0)
    keys, lengths = generator.sample_keys(0, np.arange(3)), np.array([9, 16, 4])
    together = generator.generate(model, params, schedule, prompt, keys, 16, settings, lengths=lengths)
    for row, length in enumerate(lengths):
        one = generator.take_rows((prompt, keys), np.array([row]))
        (alone,) = generator.generate(model, params, schedule, *one, int(length), settings)
        np.testing.assert_array_equal(together[row, :length], alone)
    assert len(np.unique(together)) > 3


def test_lengths_are_as_often_drawn_as_rows_have_them():
    counts = np.array([0, 0, 300, 0, 100, 600])
    keys = generator.sample_keys(1, np.arange(4000))
    drawn = generator.drawn_lengths(keys, counts, 5)
    np.testing.assert_allclose(np.bincount(drawn, minlength=6) / 4000, counts / 1000, atol=0.025)
    np.testing.assert_array_equal(generator.drawn_lengths(keys, counts, 4), np.minimum(drawn, 4))
    np.testing.assert_array_equal(generator.drawn_lengths(keys[7:9], counts, 5), drawn[7:9])
