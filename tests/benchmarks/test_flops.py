"""The counted arithmetic against XLA's own count, and what must not be counted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flops import forward_flops, useful_flops
from ml_collections import ConfigDict

from sunfish_jax.data.batches import PackedBatch
from sunfish_jax.models.denoiser import TextDenoiser, init_params
from sunfish_jax.models.prompt import Prompt

ROWS, LENGTH, PROMPT_LENGTH = 4, 48, 16


@pytest.fixture(scope="module")
def model():
    # Wide enough that XLA's count, which has element-wise work in it, is nearly all of matrix products.
    return TextDenoiser(
        vocab_size=1000,
        num_layers=2,
        num_heads=4,
        width=384,
        embedding_dim=96,
        mlp_ratio=4,
        conditioning_dim=128,
        conv_width=0,
        dropout=0.0,
        dtype=jnp.dtype("float32"),
        remat=False,
        prompt_dim=256,
    )


def diffusion(**changes) -> ConfigDict:
    return ConfigDict({"conditioning_dropout": 0.0, "self_conditioning_every": 0} | changes)


def make_batch(tokens=LENGTH, length=LENGTH, prompt=PROMPT_LENGTH, known=0, rows_per_pack=1) -> PackedBatch:
    """One pass of rows of `length` positions each."""
    packs = ROWS // rows_per_pack
    positions = np.tile(np.arange(length), (1, packs, rows_per_pack))
    prompt_positions = np.broadcast_to(np.arange(PROMPT_LENGTH), (1, packs, rows_per_pack, PROMPT_LENGTH))
    return PackedBatch(
        tokens=np.zeros(positions.shape, np.int32),
        padding_mask=positions < tokens,
        known_mask=positions < known,
        lengths=np.full((1, packs, rows_per_pack), length, np.int32),
        prompt=Prompt(inputs=np.zeros((*prompt_positions.shape, 256), np.float16), mask=prompt_positions < prompt),
        longest=length,
    )


def shapes(model):
    z = jax.ShapeDtypeStruct((ROWS, LENGTH, model.embedding_dim), jnp.float32)
    return (
        jax.eval_shape(lambda: init_params(model, jax.random.key(0))),
        jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32),
        z,
        jax.ShapeDtypeStruct((ROWS,), jnp.float32),
        z,
        jax.ShapeDtypeStruct((ROWS, LENGTH), bool),
        Prompt(
            inputs=jax.ShapeDtypeStruct((ROWS, PROMPT_LENGTH, model.prompt_dim), jnp.float16),
            mask=jax.ShapeDtypeStruct((ROWS, PROMPT_LENGTH), bool),
        ),
    )


def xla_flops(function, *arguments) -> float:
    return jax.jit(function).lower(*arguments).cost_analysis()["flops"]


def test_a_forward_pass_costs_what_xla_counts(model):
    def logits(params, tokens, z, gamma, x_hat, known_mask, prompt):
        keys_values = model.apply({"params": params}, prompt, method="encode_prompt")
        vocabulary = model.apply({"params": params}, method="vocabulary")
        given = (vocabulary, z, gamma, x_hat, known_mask, keys_values)
        return model.apply({"params": params}, *given, method="logits")

    parts = forward_flops(model, np.full(ROWS, LENGTH), np.full(ROWS, PROMPT_LENGTH))
    # The single-token posterior: logits and the mean embedding.
    expected = sum(parts.values()) + 2 * parts["vocabulary"]
    assert xla_flops(logits, *shapes(model)) == pytest.approx(expected, rel=0.02)


def test_a_training_pass_costs_what_xla_counts(model):
    def loss(params, tokens, noise, *given):
        # As in training, where z is a function of the embeddings.
        z = model.apply({"params": params}, method="vocabulary").embeddings[tokens] + noise
        return model.apply({"params": params}, tokens, z, *given).sum()

    twice = forward_flops(model, np.full(ROWS, LENGTH), np.zeros(ROWS))["vocabulary"]
    # The single-token posterior's logits are made a second time.
    expected = useful_flops(model, make_batch(), diffusion()) + twice
    assert xla_flops(jax.grad(loss), *shapes(model)) == pytest.approx(expected, rel=0.02)


def test_self_conditioning_adds_one_forward_pass_of_its_rows(model):
    parts = forward_flops(model, np.full(1, LENGTH), np.zeros(1))
    body = sum(parts[name] for name in ("input", "layers", "head", "noise")) + 3 * parts["vocabulary"]
    attention = 4 * LENGTH * (LENGTH + PROMPT_LENGTH) * model.num_layers * model.width
    plain = useful_flops(model, make_batch(), diffusion())
    with_pass = useful_flops(model, make_batch(), diffusion(self_conditioning_every=2))
    assert with_pass - plain == pytest.approx(ROWS / 2 * (body + attention))


def test_rows_count_the_same_in_packs(model):
    settings = diffusion(conditioning_dropout=0.1)
    given = {"tokens": 20, "prompt": 5, "known": 3}
    alone, packed = make_batch(**given), make_batch(**given, rows_per_pack=2)
    assert useful_flops(model, packed, settings) == pytest.approx(useful_flops(model, alone, settings))
    # A row that is missing counts nothing.
    missing = packed.replace(
        lengths=np.array([[[LENGTH, 0], [LENGTH, LENGTH]]]),
        padding_mask=packed.padding_mask & (np.arange(2 * LENGTH) < np.array([[[LENGTH], [2 * LENGTH]]])),
    )
    assert useful_flops(model, missing, settings) == pytest.approx(0.75 * useful_flops(model, alone, settings))


def test_padding_counts_nothing(model):
    settings = diffusion(self_conditioning_every=3)
    short, padded = make_batch(tokens=20, length=20), make_batch(tokens=20, length=48)
    assert useful_flops(model, short, settings) == useful_flops(model, padded, settings)


def test_given_tokens_are_not_predicted(model):
    parts = forward_flops(model, np.full(ROWS, 10), np.zeros(ROWS))
    less = useful_flops(model, make_batch(), diffusion()) - useful_flops(model, make_batch(known=10), diffusion())
    assert less == pytest.approx(3 * parts["head"] + 4 * parts["vocabulary"])


def test_a_dropped_prompt_is_the_null_prompts_one_token(model):
    none = useful_flops(model, make_batch(prompt=0), diffusion())
    assert useful_flops(model, make_batch(), diffusion(conditioning_dropout=1.0)) == pytest.approx(none)
