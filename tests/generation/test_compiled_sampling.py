"""No slow form of matrix product may come back into sampling."""

import re

import jax
import jax.numpy as jnp
import pytest
from encoders import FrozenEncoder
from jaxprs import equations

from configs import micro
from sunfish_jax.diffusion.samplers import make_steps
from sunfish_jax.diffusion.schedules import make_schedule
from sunfish_jax.generation.generator import _generate, sample_keys
from sunfish_jax.models.denoiser import init_params, make_model
from sunfish_jax.models.prompt import Prompt
from sunfish_jax.ops.compiled_text import count_matrix_products, float32_matrix_products, slow_matrix_products

pytestmark = [
    pytest.mark.skipif(jax.default_backend() != "cpu", reason="the text of XLA:CPU"),
    pytest.mark.usefixtures("compiled_as_shipped"),
]


def traced_sampling(dtype):
    """Guided sampling with micro's shapes and two of its layers."""
    config = micro.get_config()
    config.model.num_layers = 2
    config.model.compute_dtype = dtype
    model = make_model(config, config.tokenizer.vocab_size, FrozenEncoder(output_dim=384))
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    schedule = make_schedule("gumbel", model.embedding_dim, model.vocab_size)
    rows, prompt_length = 3, 16
    prompt = Prompt(
        inputs=jax.ShapeDtypeStruct((rows, prompt_length, 384), jnp.float16),
        mask=jax.ShapeDtypeStruct((rows, prompt_length), bool),
    )
    interval = schedule.gamma(jnp.asarray(config.sampling.guidance_interval))
    keys, steps = sample_keys(0, jnp.arange(rows)), make_steps(schedule, 4, "ddim")
    statics = {"seq_len": 64, "guidance_scale": 1.5, "counter": None}
    # As long as rows of the training text.
    lengths = jnp.array([40, 64, 9])
    return _generate.trace(model, params, prompt, keys, steps, interval, 1.0, lengths, None, **statics)


@pytest.mark.parametrize("dtype", ["int8", "bfloat16", "float32"])
def test_every_matrix_product_of_sampling_is_fast(dtype):
    text = traced_sampling(dtype).lower().compile().as_text()
    # Ten products a layer and five around them; where guidance acts they are compiled a second time.
    assert count_matrix_products(text) >= 2 * 2 * 10
    assert slow_matrix_products(text) == []
    # The six dense products of two layers, in the branches with and without guidance, and the keys and values of
    # the prompts and of none.
    assert len(re.findall(r"= s32\[[\d,]+\]\S* dot\(", text)) == (28 if dtype == "int8" else 0)
    if dtype != "float32":
        assert float32_matrix_products(text) == []


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_kernels_are_cast_once_and_not_in_every_step(dtype):
    # Out of the branches of a guided step XLA does not take what is the same in each.
    (scan,) = (e for e in equations(traced_sampling(dtype).jaxpr) if e.primitive.name == "scan")
    casts = [e for e in equations(scan.params["jaxpr"]) if e.primitive.name == "convert_element_type"]
    assert casts
    kernel = (512, 2048)
    assert not any(cast.invars[0].aval.shape == kernel for cast in casts)
