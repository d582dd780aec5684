import runpy
from pathlib import Path

import jax
import pytest
from encoders import FrozenEncoder

from sunfish_jax.models.denoiser import make_model
from sunfish_jax.training.memory import step_memory, tree_bytes
from sunfish_jax.training.sharding import make_mesh
from sunfish_jax.training.state import create_state

CONFIGS = Path(__file__).parents[2] / "configs"
ENCODER = FrozenEncoder(output_dim=384)


def config_and_model(name):
    config = runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"]()
    config.model.compute_dtype = "bfloat16"
    return config, make_model(config, config.tokenizer.vocab_size, ENCODER)


@pytest.mark.parametrize(
    ("name", "millions", "tolerance"),
    [("nano", 0.3, 0.1), ("tiny", 1.0, 0.05), ("mini", 10.0, 0.05), ("micro", 41.3, 0.002), ("full", 1400.0, 0.03)],
)
def test_configs_have_the_stated_number_of_parameters(name, millions, tolerance):
    config, model = config_and_model(name)
    state = jax.eval_shape(lambda: create_state(config, model))
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert count == pytest.approx(millions * 1e6, rel=tolerance)


def test_state_is_what_a_state_takes():
    config, model = config_and_model("nano")
    state = jax.jit(lambda: create_state(config, model))()
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    memory = step_memory(config, model, make_mesh(1))
    assert memory.state == held
    assert memory.gradients == tree_bytes(state.params)
    assert memory.parameters < memory.gradients


def test_activations_grow_with_rows_and_shrink_with_rematerialisation():
    config, model = config_and_model("nano")
    few = step_memory(config, model, make_mesh(1)).activations
    config.train.batch_size *= 2
    many = step_memory(config, model, make_mesh(1)).activations
    # The prompt's and the vocabulary's parts grow with the rows too; only constants stay.
    assert many == pytest.approx(2 * few, rel=0.01)
    config.model.remat = True
    remat = make_model(config, config.tokenizer.vocab_size, ENCODER)
    assert step_memory(config, remat, make_mesh(1)).activations < 0.7 * many


def test_kernels_in_eight_bits_are_parameters():
    config, model = config_and_model("nano")
    plain = step_memory(config, model, make_mesh(1))
    config.model.compute_dtype = "int8"
    quantized = step_memory(config, make_model(config, config.tokenizer.vocab_size, ENCODER), make_mesh(1))
    # Three layers of 64 and the prompts' keys and values for them, each kernel twice: a byte a number, and steps of
    # four bytes for its rows and columns.
    kernels = (3 * (3 + 1 + 1 + 1 + 4 + 4) + 3 * 2) * 64 * 64
    steps = 4 * (3 * (4 + 2 + 2 + 2 + 5 + 5) + 1 + 3 * 2) * 64
    assert quantized.parameters - plain.parameters == 2 * kernels + steps
    assert quantized.activations == plain.activations


def test_the_whole_step_of_full_can_be_traced():
    config, model = config_and_model("full")
    memory = step_memory(config, model, make_mesh(2))
    # Parameters, their average and a moment or two, four bytes each, shared out.
    assert 12 * 1.4e9 < 2 * memory.state < 16 * 1.5e9
    assert memory.total < 80e9
