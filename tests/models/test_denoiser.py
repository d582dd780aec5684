"""What the denoiser may depend on, and what it is before training."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sunfish_jax.diffusion.process import posterior_scale
from sunfish_jax.models import layers
from sunfish_jax.models.denoiser import (
    KERNEL_SUFFIXES,
    TextDenoiser,
    compute_params,
    init_params,
    quantized_kernels,
)
from sunfish_jax.models.prompt import Prompt
from sunfish_jax.ops.rows import PackedRows

ROWS, LENGTH, PROMPT_LENGTH = 3, 12, 5


@pytest.fixture(scope="module")
def model():
    return TextDenoiser(
        vocab_size=50,
        num_layers=2,
        num_heads=2,
        width=32,
        embedding_dim=16,
        mlp_ratio=2,
        conditioning_dim=16,
        conv_width=3,
        dropout=0.1,
        dtype=jnp.dtype("float32"),
        remat=False,
        prompt_dim=24,
    )


@functools.partial(jax.jit, static_argnums=0)
def untrained(model):
    return init_params(model, jax.random.key(0))


def moved(params):
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32), params)


@pytest.fixture(scope="module")
def variables(model):
    """Parameters away from their initial zeros, as after some training."""
    return {"params": moved(untrained(model))}


@pytest.fixture(scope="module")
def inputs(model):
    rng = np.random.default_rng(0)
    z, x_hat = (jnp.asarray(rng.normal(size=(ROWS, LENGTH, model.embedding_dim)), jnp.float32) for _ in range(2))
    gamma = jnp.asarray([-1.0, 1.0, 3.0])
    return z, gamma, x_hat, jnp.zeros((ROWS, LENGTH), bool)


def in_eight_bits(model):
    return dataclasses.replace(model, dtype=jnp.dtype("bfloat16"), quantized=True)


def prompt_of(seed, mask=None):
    states = np.random.default_rng(seed).normal(size=(ROWS, PROMPT_LENGTH, 24)).astype(np.float16)
    return Prompt(inputs=states, mask=np.ones((ROWS, PROMPT_LENGTH), bool) if mask is None else mask)


@functools.partial(jax.jit, static_argnames=("model", "method"))
def apply(model, variables, *arguments, method):
    return model.apply(variables, *arguments, method=method)


@functools.partial(jax.jit, static_argnums=0)
def logits(model, variables, inputs, prompt):
    keys_values = apply(model, variables, prompt, method="encode_prompt")
    return apply(model, variables, vocabulary(model, variables), *inputs, keys_values, method="logits")


def vocabulary(model, variables):
    return apply(model, variables, method="vocabulary")


def test_untrained_logits_are_the_single_token_posterior(model, inputs):
    params = untrained(model)
    params["log_unigram"] = jnp.linspace(-3.0, 0.0, model.vocab_size)
    z, gamma, *_ = inputs
    embeddings = vocabulary(model, {"params": params}).embeddings
    expected = posterior_scale(gamma)[:, None, None] * (z @ embeddings.T) + params["log_unigram"]
    np.testing.assert_allclose(logits(model, {"params": params}, inputs, prompt_of(0)), expected, atol=1e-4)


def test_embeddings_have_norm_sqrt_dim(model, variables):
    embeddings = vocabulary(model, variables).embeddings
    np.testing.assert_allclose(jnp.linalg.norm(embeddings, axis=-1), 4.0, rtol=1e-5)


def test_layers_are_traced_once_for_all(model, inputs, monkeypatch):
    def traced_layers(num_layers, width):
        deeper = dataclasses.replace(model, num_layers=num_layers, width=width, parent=None)
        params = jax.eval_shape(lambda: untrained(deeper))
        traced.clear()
        jax.eval_shape(lambda params: logits(deeper, {"params": params}, inputs, prompt_of(0)), params)
        return len(traced)

    traced = []
    attention = layers.attention
    monkeypatch.setattr(layers, "attention", lambda *arguments: traced.append(1) or attention(*arguments))
    # Widths that no other test has: their layers would not be traced again.
    assert traced_layers(2, width=40) == traced_layers(5, width=48) > 0


@pytest.mark.parametrize("quantized", [False, True])
def test_rows_do_not_see_each_other(model, variables, inputs, quantized):
    model = in_eight_bits(model) if quantized else model
    before = logits(model, variables, inputs, prompt_of(0))
    z, gamma, x_hat, known = inputs
    other = prompt_of(0)
    other.inputs[1] = 3.0
    changed = (z.at[1].add(1.0), gamma.at[1].add(1.0), x_hat.at[1].add(1.0), known.at[1].set(True))
    after = logits(model, variables, changed, other)
    np.testing.assert_array_equal(before[0], after[0])
    np.testing.assert_array_equal(before[2], after[2])
    assert np.abs(before[1] - after[1]).max() > 0.1


def test_packed_rows_are_as_by_themselves(model, variables):
    """Values and gradients of rows in two packs, one of them missing, against each row alone."""
    lengths = np.array([[3, LENGTH], [5, 0]])
    size, dim = LENGTH + 5, model.embedding_dim
    rng = np.random.default_rng(3)
    z, x_hat = (jnp.asarray(rng.normal(size=(2, size, dim)), jnp.float32) for _ in range(2))
    gamma = jnp.asarray([-1.0, 1.0, 2.0, 0.0])
    known, tokens = rng.random((2, size)) < 0.3, rng.integers(0, model.vocab_size, (2, size))
    weight = jnp.asarray(rng.normal(size=(2, size)), jnp.float32)
    prompt = Prompt(rng.normal(size=(4, PROMPT_LENGTH, 24)).astype(np.float16), np.ones((4, PROMPT_LENGTH), bool))

    def losses(variables, tokens, z, gamma, x_hat, known, prompt, **packing):
        keys_values = model.apply(variables, prompt, method="encode_prompt")
        given = vocabulary(model, variables), tokens, z, gamma, x_hat, known, keys_values
        return model.apply(variables, *given, **packing, method="cross_entropy")

    # Compiled quickly: each row alone is a program of its own.
    jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

    @jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def packed(variables, z):
        rows = PackedRows.in_packs(jnp.asarray(lengths), size, LENGTH)
        nats = losses(variables, tokens, z, gamma, x_hat, known, prompt, packed=rows)
        return jnp.sum(jnp.where(rows.inside.reshape(nats.shape), nats, 0.0) * weight), nats

    @jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def alone(variables, z):
        total, nats = 0.0, []
        for row, (pack, start, stop) in enumerate([(0, 0, 3), (0, 3, LENGTH + 3), (1, 0, 5)]):
            place = np.s_[pack : pack + 1, start:stop]
            own = jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], prompt)
            given = tokens[place], z[place], gamma[row : row + 1], x_hat[place], known[place], own
            nats.append(losses(variables, *given)[0])
            total += jnp.sum(nats[-1] * weight[place])
        return total, nats

    (got, got_nats), got_gradients = packed(variables, z)
    (want, (first, second, third)), want_gradients = alone(variables, z)
    np.testing.assert_allclose(got_nats[0, : LENGTH + 3], np.concatenate([first, second]), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got_nats[1, :5], third, rtol=1e-4, atol=1e-4)
    assert float(got) == pytest.approx(float(want), rel=1e-4)
    pairs = zip(jax.tree.leaves_with_path(got_gradients), jax.tree.leaves(want_gradients), strict=True)
    for (path, a), b in pairs:
        tolerance = 1e-4 * max(1.0, float(np.abs(b).max()))
        np.testing.assert_allclose(a, b, atol=tolerance, err_msg=jax.tree_util.keystr(path))
    assert not np.asarray(got_gradients[1])[1, 5:].any()


@pytest.mark.parametrize("index", range(4))
def test_every_input_matters_at_every_position(model, variables, inputs, index):
    changed = list(inputs)
    changed[index] = ~inputs[3] if index == 3 else inputs[index] + 0.5
    difference = logits(model, variables, inputs, prompt_of(0)) - logits(model, variables, changed, prompt_of(0))
    assert np.abs(difference).max(axis=-1).min() > 1e-4


def test_both_neighbours_matter(model, variables, inputs):
    z = inputs[0]
    before = logits(model, variables, inputs, prompt_of(0))
    for position in (0, LENGTH - 1):
        after = logits(model, variables, (z.at[:, position].add(1.0), *inputs[1:]), prompt_of(0))
        assert np.abs(after - before)[:, LENGTH // 2].max() > 1e-4


def test_the_prompt_is_read_through_its_mask_alone(model, variables, inputs):
    mask = np.ones((ROWS, PROMPT_LENGTH), bool)
    mask[:, 3:] = False
    prompt = prompt_of(0, mask)
    before = logits(model, variables, inputs, prompt)
    hidden = Prompt(inputs=np.where(mask[..., None], prompt.inputs, np.float16(7.0)), mask=mask)
    np.testing.assert_array_equal(before, logits(model, variables, inputs, hidden))
    assert np.abs(before - logits(model, variables, inputs, prompt_of(1, mask))).max() > 1e-3


def test_a_prompt_may_come_with_more_padding(model, variables, inputs):
    prompt = prompt_of(0)
    wider = Prompt(
        inputs=np.pad(prompt.inputs, ((0, 0), (0, 3), (0, 0))), mask=np.pad(prompt.mask, ((0, 0), (0, 3)))
    )
    np.testing.assert_allclose(
        logits(model, variables, inputs, prompt), logits(model, variables, inputs, wider), atol=1e-4
    )


def test_no_prompt_is_the_null_prompt_whatever_the_states_are(model, variables, inputs):
    none = np.zeros((ROWS, PROMPT_LENGTH), bool)
    first = logits(model, variables, inputs, prompt_of(0, none))
    np.testing.assert_array_equal(first, logits(model, variables, inputs, prompt_of(1, none)))
    assert np.isfinite(first).all()
    changed = {"params": variables["params"] | {"null_prompt": -variables["params"]["null_prompt"]}}
    assert np.abs(first - logits(model, changed, inputs, prompt_of(0, none))).max() > 1e-3


def test_several_prompts_in_one_pass_are_as_in_passes_of_their_own(model, variables, inputs):
    given = prompt_of(0, np.arange(PROMPT_LENGTH) < np.array([[2], [PROMPT_LENGTH], [4]]))
    # The null prompt of one position, which is not attended to but passed on.
    none = Prompt(np.zeros((ROWS, 1, 24), np.float16), np.zeros((ROWS, 1), bool))
    prompts = [apply(model, variables, prompt, method="encode_prompt") for prompt in (given, none, prompt_of(3))]
    given = vocabulary(model, variables), *inputs
    together = apply(model, variables, *given, *prompts, method="features")
    alone = [apply(model, variables, *given, prompt, method="features") for prompt in prompts]
    np.testing.assert_allclose(together, np.concatenate(alone), atol=1e-4)
    padded = prompt_of(5, np.zeros((ROWS, PROMPT_LENGTH), bool))
    np.testing.assert_allclose(
        logits(model, variables, inputs, none), logits(model, variables, inputs, padded), atol=1e-4
    )
    assert np.abs(alone[0] - alone[1]).max() > 1e-2


def test_cross_entropy_is_that_of_the_logits(model, variables, inputs):
    tokens = jnp.asarray(np.random.default_rng(2).integers(0, model.vocab_size, (ROWS, LENGTH)))
    keys_values = apply(model, variables, prompt_of(0), method="encode_prompt")
    given = vocabulary(model, variables), tokens, *inputs, keys_values
    losses = apply(model, variables, *given, method="cross_entropy")
    log_probabilities = jax.nn.log_softmax(logits(model, variables, inputs, prompt_of(0)))
    expected = -jnp.take_along_axis(log_probabilities, tokens[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(losses, expected, atol=1e-4)


@pytest.mark.parametrize("quantized", [False, True])
def test_rematerialisation_changes_no_gradient(model, variables, inputs, quantized):
    model = in_eight_bits(model) if quantized else model
    tokens = jnp.zeros((ROWS, LENGTH), jnp.int32)
    seeds = jnp.arange(ROWS, dtype=jnp.uint32)

    def gradient(remat):
        chosen = dataclasses.replace(model, remat=remat)

        @jax.jit
        @jax.grad
        def of_loss(variables):
            keys_values = chosen.apply(variables, prompt_of(0), method="encode_prompt")
            given = vocabulary(chosen, variables), tokens, *inputs, keys_values
            losses = chosen.apply(variables, *given, dropout_seeds=seeds, method="cross_entropy")
            return losses.sum()

        return jax.device_get(of_loss(variables))

    for plain, again in zip(jax.tree.leaves(gradient(False)), jax.tree.leaves(gradient(True)), strict=True):
        np.testing.assert_allclose(plain, again, atol=1e-4 * max(1.0, np.abs(plain).max()))


def test_eight_bits_change_the_logits_a_little(model, variables, inputs):
    narrow = dataclasses.replace(model, dtype=jnp.dtype("bfloat16"))
    models = model, narrow, in_eight_bits(model)
    exact, rounded, coarse = (logits(m, variables, inputs, prompt_of(0)) for m in models)
    # Beside how much logits vary.
    assert 1e-4 < np.std(coarse - rounded) / np.std(exact) < 0.03
    assert np.std(coarse - exact) / np.std(exact) < 0.03


def test_every_kernel_of_a_layer_reads_or_writes_the_residual_stream(model, variables):
    """Muon takes them together by these names; one that is in neither would be taken by itself, unnoticed."""
    layer = variables["params"]["layers_0"]
    assert not layers.READERS.keys() & layers.WRITERS.keys()
    both = layers.READERS | layers.WRITERS
    assert both.keys() == {name for name in layer if name.endswith(KERNEL_SUFFIXES)}
    assert {layer[name].shape[dimension] for name, dimension in both.items()} == {model.width}


def test_kernels_are_the_same_quantized_before_and_within(model, variables, inputs):
    quantized = in_eight_bits(model)
    made_before = jax.jit(quantized_kernels, static_argnums=0)(
        quantized, compute_params(variables["params"], jnp.bfloat16)
    )
    (collection,) = made_before.values()
    kernels = {"attention_in", "attention_out", "cross_in", "cross_out", "mlp_in", "mlp_out"}
    assert collection.keys() == {"layers_0", "layers_1", "prompt_kernel"}
    assert collection["layers_0"].keys() == collection["layers_1"].keys() == kernels
    within = logits(quantized, variables, inputs, prompt_of(0))
    np.testing.assert_array_equal(within, logits(quantized, variables | made_before, inputs, prompt_of(0)))
    # They are what is multiplied with, not the kernels beside them.
    for part in ("layers_0", "prompt_kernel"):
        other = {layers.QUANTIZED: collection | {part: jax.tree.map(jnp.zeros_like, collection[part])}}
        assert np.abs(within - logits(quantized, variables | other, inputs, prompt_of(0))).max() > 0.1
    assert quantized_kernels(model, variables["params"]) == {}


def test_without_training_on_estimates_they_are_ignored(model, inputs):
    params = untrained(model)
    # Everything but the estimates' own kernel moved from zero.
    params = moved(params) | {"estimate_kernel": params["estimate_kernel"]}
    z, gamma, x_hat, known = inputs
    first = logits(model, {"params": params}, (z, gamma, x_hat, known), prompt_of(0))
    second = logits(model, {"params": params}, (z, gamma, x_hat + 1.0, known), prompt_of(0))
    np.testing.assert_array_equal(first, second)
