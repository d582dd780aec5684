"""No slow form of matrix product may come back into the compiled step, by our doing or by an upgrade of JAX."""

import re

import jax
import jax.numpy as jnp
import pytest
from encoders import FrozenEncoder
from jaxprs import equations

from configs import micro
from sunfish_jax.data.batches import PackedBatch
from sunfish_jax.models.denoiser import compute_params, init_params, make_model
from sunfish_jax.models.prompt import Prompt
from sunfish_jax.ops.compiled_text import (
    count_matrix_products,
    float32_matrix_products,
    slow_matrix_products,
)
from sunfish_jax.ops.dense import dense
from sunfish_jax.training.sharding import make_mesh
from sunfish_jax.training.state import create_state
from sunfish_jax.training.step import make_train_step

ENCODER = FrozenEncoder(output_dim=384)

pytestmark = [
    pytest.mark.skipif(jax.default_backend() != "cpu", reason="the text of XLA:CPU"),
    pytest.mark.usefixtures("compiled_as_shipped"),
]


def abstract_batch(config, size=512, rows=4, longest=144, prompt_length=16):
    shape = (config.train.accumulate_steps, 2, size)
    states = (*shape[:2], rows, prompt_length, ENCODER.output_dim)
    return PackedBatch(
        tokens=jax.ShapeDtypeStruct(shape, jnp.int32),
        padding_mask=jax.ShapeDtypeStruct(shape, bool),
        known_mask=jax.ShapeDtypeStruct(shape, bool),
        lengths=jax.ShapeDtypeStruct((*shape[:2], rows), jnp.int32),
        prompt=Prompt(
            inputs=jax.ShapeDtypeStruct(states, jnp.float16), mask=jax.ShapeDtypeStruct(states[:4], bool)
        ),
        longest=longest,
    )


def two_layers(dtype):
    """micro's shapes with two of its layers: every kind of product, at a fraction of the compile time."""
    config = micro.get_config()
    config.model.num_layers = 2
    config.model.compute_dtype = dtype
    config.train.accumulate_steps = 2
    return config


def step_and_arguments(dtype):
    config = two_layers(dtype)
    model = make_model(config, config.tokenizer.vocab_size, ENCODER)
    state = jax.eval_shape(lambda: create_state(config, model))
    return make_train_step(config, model, make_mesh(1)), state, abstract_batch(config)


def compiled_texts(dtype):
    """Of the step's two programs, apart: a name in one may be that of something else in the other."""
    step, state, batch = step_and_arguments(dtype)
    gradients = step.gradients.lower(state, batch)
    update = step.update.lower(state, gradients.out_info)
    return {"gradients": gradients.compile().as_text(), "update": update.compile().as_text()}


# A layer has six dense products and four of attention, each with two gradients: 60 in two layers, and as many again
# are in the first pass of self-conditioning, forward only, and around the layers. Muon has eleven products for each
# of nine shapes of kernels, those of a layer side by side.
AT_LEAST = {"gradients": 80, "update": 9 * 11}


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_every_matrix_product_of_the_step_is_fast(dtype):
    texts = compiled_texts(dtype)
    for program, text in texts.items():
        assert count_matrix_products(text) >= AT_LEAST[program]
        assert slow_matrix_products(text) == []
        assert float32_matrix_products(text) == []
    # Of the six dense products of two layers, and of the prompts' keys and values: forward, both gradients, and
    # once more in the first estimates.
    in_eight_bits = re.findall(r"= s32\[[\d,]+\]\S* dot\(", texts["gradients"])
    assert len(in_eight_bits) == (4 * (2 * 6 + 1) if dtype == "int8" else 0)


def test_kernels_are_quantized_once_a_step():
    step, state, batch = step_and_arguments("int8")
    jaxpr = step.gradients.trace(state, batch).jaxpr

    def quantized(jaxpr):
        return [
            e for e in equations(jaxpr) if e.primitive.name == "convert_element_type" and is_kernel(e.outvars[0])
        ]

    def is_kernel(variable):
        return variable.aval.dtype == jnp.int8 and variable.aval.shape == (512, 3 * 512)

    scans = [e.params["jaxpr"] for e in equations(jaxpr) if e.primitive.name == "scan"]
    # Self-attention's of two layers, by row and by column; none where passes are made.
    assert len(quantized(jaxpr)) == 2 * 2
    assert scans and not any(quantized(scan) for scan in scans)


def test_every_matrix_product_of_float32_gradients_is_left_to_eigen():
    texts = compiled_texts("float32")
    # Outside the fast library, but for the few that lead into a reduction.
    slow = len(slow_matrix_products(texts["gradients"]))
    assert slow >= 0.9 * count_matrix_products(texts["gradients"]) >= 0.9 * AT_LEAST["gradients"]
    # As they are stored: of a transposed operand Eigen makes a copy of its own, piece by piece.
    backward = [line for line in texts["gradients"].splitlines() if " dot(" in line and "transpose(jvp" in line]
    assert len(backward) >= 2 * 2 * 10
    assert not any("lhs_contracting_dims={0}" in line or "rhs_contracting_dims={1}" in line for line in backward)
    assert slow_matrix_products(texts["update"]) == []


def test_a_single_plain_dense_layer_is_noticed(monkeypatch):
    def plain_for_the_prompt(x, kernel, quantized=None):
        # Keys and values of two layers as wide as 512.
        if kernel.shape != (512, 2 * 2 * 512):
            return dense(x, kernel, quantized)
        return jnp.dot(x.astype(kernel.dtype), kernel).astype(jnp.float32)

    monkeypatch.setattr("sunfish_jax.models.denoiser.dense", plain_for_the_prompt)
    config = two_layers("bfloat16")
    model = make_model(config, config.tokenizer.vocab_size, ENCODER)

    @jax.grad
    def gradient(params, prompt):
        keys_values = model.apply({"params": params}, prompt, method="encode_prompt")
        return sum(leaf.astype(jnp.float32).sum() for leaf in jax.tree.leaves(keys_values))

    params = jax.eval_shape(lambda: compute_params(init_params(model, jax.random.key(0)), model.dtype))
    prompt = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape[2:], leaf.dtype), abstract_batch(config).prompt
    )
    text = jax.jit(gradient).lower(params, prompt).compile().as_text()
    assert len(slow_matrix_products(text)) == 1


def test_a_product_in_float32_is_noticed():
    x = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    text = jax.jit(jnp.dot).lower(x, x).compile().as_text()
    assert len(float32_matrix_products(text)) == 1
