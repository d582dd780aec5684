"""The PyTorch twin must be our network, trained on our loss and sampled as we sample."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import Inputs, difference, moved, our_logits, twin_logits
from encoders import FrozenEncoder
from flax.traverse_util import flatten_dict, unflatten_dict
from random_batch import as_packs, random_batch
from sampling_comparison import Sampled, Task
from torch_peers import TwinSteps, make_twin

from configs import nano
from sunfish_jax.diffusion import guidance
from sunfish_jax.generation.generator import sample_keys
from sunfish_jax.generation.options import Settings
from sunfish_jax.models.denoiser import make_model
from sunfish_jax.training.sharding import make_mesh
from sunfish_jax.training.state import create_state
from sunfish_jax.training.step import make_train_step

ENCODER = FrozenEncoder(output_dim=24)


@pytest.fixture(scope="module")
def config():
    config = nano.get_config()
    config.model.num_layers = 2
    config.model.conv_width = 3
    config.model.compute_dtype = "float32"
    config.model.dropout = 0.1
    config.tokenizer.vocab_size = 300
    config.train.accumulate_steps = 2
    config.optimizer.name = "adamw"
    return config


@pytest.fixture(scope="module")
def model(config):
    return make_model(config, config.tokenizer.vocab_size, ENCODER)


@pytest.fixture(scope="module")
def state(config, model):
    counts = np.random.default_rng(0).integers(0, 100, config.tokenizer.vocab_size)
    return create_state(config, model, counts)


@pytest.fixture(scope="module")
def moved_params(state):
    return moved(state.params)


@pytest.fixture(scope="module")
def logits(model, moved_params):
    return our_logits(model, moved_params, Inputs.random(model))


@pytest.mark.parametrize("conv_width", [0, 3])
def test_given_our_weights_it_returns_our_logits(torch, config, conv_width):
    config = config.copy_and_resolve_references()
    config.model.conv_width = conv_width
    model = make_model(config, config.tokenizer.vocab_size, ENCODER)
    params, inputs = moved(create_state(config, model).params), Inputs.random(model)
    parameters = make_twin(torch, model, params)
    ours = our_logits(model, params, inputs)
    assert ours.std() > 0.5
    for fused_attention in (True, False):
        np.testing.assert_allclose(twin_logits(torch, inputs, "float32", fused_attention), ours, atol=1e-4)
        assert 0 < difference(ours, twin_logits(torch, inputs, "bfloat16", fused_attention)) < 0.03
    # The token frequencies are no parameter there.
    assert parameters == sum(p.size for p in jax.tree.leaves(params)) - config.tokenizer.vocab_size


@pytest.mark.parametrize("weight", ["layers_1/mlp_taps", "layers_0/cross_in", "null_prompt", "log_unigram"])
def test_the_inputs_of_that_comparison_reach_every_part(torch, model, moved_params, logits, weight):
    changed = flatten_dict(moved_params, sep="/")
    changed[weight] = jnp.roll(changed[weight], 1, axis=-1)
    make_twin(torch, model, unflatten_dict(changed, sep="/"))
    assert np.abs(logits - twin_logits(torch, Inputs.random(model))).max() > 1e-3


def test_its_step_trains_from_our_loss_on(torch, config, model, state):
    batch = random_batch(config, ENCODER.output_dim)
    make_twin(torch, model, state.params)
    twin = TwinSteps(torch, config, state.schedule)
    ours = jax.tree.map(jnp.copy, state)
    _, metrics = make_train_step(config, model, make_mesh(1))(ours, as_packs(batch))
    twin.choose(batch, ["float32"], 1, compiled=False)
    assert twin.seconds(batch) > 0
    assert twin.taken[16].startswith("float32")
    # Those were steps too: from the first weights again.
    make_twin(torch, model, state.params)
    TwinSteps(torch, config, state.schedule)
    losses = [torch.call("twin_step", batch=str(batch.tokens.shape))["loss"] for _ in range(60)]
    # Their random numbers differ, so over few rows the losses are only about the same.
    assert losses[0] == pytest.approx(float(metrics["loss"]), rel=0.05)
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])


def test_it_samples_our_tokens_from_our_noise(torch, config, model, state, moved_params):
    sampled = Sampled("nano", config, model, moved_params, state.schedule, None)
    make_twin(torch, model, sampled.params)
    prompt = jax.tree.map(lambda leaf: leaf[0, :3], random_batch(config, ENCODER.output_dim).prompt)
    settings = dataclasses.replace(
        Settings.make(config.sampling), scheduler="ddim", num_steps=8, temperature=1.0, guidance_scale=3.0
    )
    task = Task(prompt, sample_keys(0, np.arange(3)), 24, settings)
    ours = task.sample(sampled)
    for_torch = task.for_torch(sampled)
    low, high = for_torch.guided_gammas
    # Some steps are guided and some are not.
    assert 0 < ((low <= for_torch.steps.gamma) & (for_torch.steps.gamma <= high)).sum() < 8
    for_torch.send(torch)
    choice = torch.call("choose_sampling", case=str(task), dtypes=["float32"], repeats=1, compiled=False)
    assert len(choice["seconds"]) == 4
    theirs = torch.call("twin_sample", case=str(task))["tokens"]
    # One position may hang by a rounding.
    assert (theirs == ours).mean() > 0.98
    assert len(np.unique(ours)) > 20
    # In bfloat16 too, roughly: rounding tips some tokens of an untrained network.
    torch.call("choose_sampling", case=str(task), dtypes=["bfloat16"], repeats=1, compiled=False)
    assert (torch.call("twin_sample", case=str(task))["tokens"] == ours).mean() > 0.5


def test_it_guides_throughout(torch, config, model, state, moved_params, monkeypatch):
    sampled = Sampled("nano", config, model, moved_params, state.schedule, None)
    make_twin(torch, model, sampled.params)
    prompt = jax.tree.map(lambda leaf: leaf[0, :3], random_batch(config, ENCODER.output_dim).prompt)
    settings = dataclasses.replace(
        Settings.make(config.sampling), scheduler="ddim", num_steps=8, temperature=1.0, guidance_scale=3.0
    )
    # Another length than above, for which nothing is compiled yet.
    task = Task(prompt, sample_keys(0, np.arange(3)), 20, settings)
    throughout = task.for_torch(sampled).guided_throughout()
    monkeypatch.setattr(guidance, "PASSES_A_DIFFERENCE", 1)
    ours = dataclasses.replace(task, settings=dataclasses.replace(settings, guidance_interval=(0.0, 1.0)))
    throughout.send(torch)
    torch.call("choose_sampling", case=throughout.name, dtypes=["float32"], repeats=1, compiled=False)
    theirs = torch.call("twin_sample", case=throughout.name)["tokens"]
    assert (theirs == ours.sample(sampled)).mean() > 0.98
