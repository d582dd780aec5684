"""What sampling.py reports, with a process that stands for PyTorch."""

import json

import jax
import numpy as np
import pytest
import sampling_comparison
from encoders import FrozenEncoder
from sampling_comparison import Sampled, Task, run

from configs import nano
from sunfish_jax.diffusion.schedules import make_schedule
from sunfish_jax.models.denoiser import init_params, make_model
from sunfish_jax.models.prompt import Prompt


@pytest.fixture(scope="module")
def sampled() -> Sampled:
    config = nano.get_config()
    config.model.num_layers = 1
    config.model.conv_width = 0
    config.model.compute_dtype = "float32"
    encoder = FrozenEncoder(output_dim=24)
    model = make_model(config, 300, encoder)
    params = jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
    return Sampled("nano", config, model, params, make_schedule("gumbel", model.embedding_dim, 300), encoder)


@pytest.fixture(autouse=True)
def prompts(monkeypatch):
    def encode_prompts(encoder, prompts):
        shape = (len(prompts), 16)
        return Prompt(np.ones((*shape, encoder.output_dim), np.float16), np.ones(shape, bool))

    monkeypatch.setattr(sampling_comparison, "encode_prompts", encode_prompts)


def last_line(capsys) -> dict:
    return json.loads(capsys.readouterr().out.rstrip().split("\n")[-1])


def test_it_times_ours(sampled, capsys):
    run(sampled, 1, None)
    result = last_line(capsys)
    assert list(result) == ["config", "seconds", "seconds_short"]
    assert min(result["seconds_short"], result["seconds"]) > 0


def test_it_compares(sampled, fake_torch, monkeypatch, capsys):
    same = str(Task.of(sampled, 3, 128, 20))
    torch = fake_torch(
        twin={"parameters": 1},
        case={},
        choose_sampling={
            "seconds": {"float32, eager": 1.0},
            "failed": {"compiled": "no compiler"},
            "best": "float32",
        },
        first_sunfish={"parameters": 41_000_000, "positions": 8192, "block_size": 256},
        twin_sample={same: {"seconds": 2.0}, f"{same} in each of them": {"seconds": 3.0}},
        first_sample={"seconds": 6.0},
    )
    logits = sampling_comparison.our_logits
    monkeypatch.setattr(
        sampling_comparison,
        "twin_logits",
        lambda _, inputs, *how: logits(sampled.model, sampling_comparison.moved(sampled.params), inputs),
    )
    run(sampled, 1, torch)
    result = last_line(capsys)
    assert list(result) == [
        "config",
        "seconds",
        "seconds_short",
        "ratio_torch_twin",
        "ratio_torch_twin_guided_throughout",
        "ratio_first_sunfish",
    ]
    assert result["ratio_torch_twin"] == pytest.approx(2.0 / result["seconds"], rel=0.02)
    assert result["ratio_torch_twin_guided_throughout"] == pytest.approx(3.0 / result["seconds"], rel=0.02)
    assert result["ratio_first_sunfish"] == pytest.approx(6.0 / result["seconds"], rel=0.02)


@pytest.mark.parametrize("wrong", [True, False])
def test_a_twin_with_other_logits_in_either_attention_stops_it(sampled, fake_torch, monkeypatch, wrong):
    torch, ours = fake_torch(twin={"parameters": 1}), np.ones((3, 32, 300))
    monkeypatch.setattr(sampling_comparison, "our_logits", lambda *_: ours)
    monkeypatch.setattr(sampling_comparison, "twin_logits", lambda *given: ours + (given[-1] is wrong))
    with pytest.raises(AssertionError, match="differ from ours"):
        run(sampled, 1, torch)


def test_the_task_is_ddim_with_guidance(sampled):
    task = Task.of(sampled, 3, 128, 20)
    # No longer than the model's own texts.
    assert (len(task.keys), task.length, task.settings.scheduler, task.settings.num_steps) == (3, 64, "ddim", 20)
    assert task.settings.guidance_scale > 1
    for_torch = task.for_torch(sampled)
    low, high = for_torch.guided_gammas
    quantiles = np.asarray(sampled.schedule.cdf(np.array([low, high])))
    np.testing.assert_allclose(quantiles, sampled.config.sampling.guidance_interval, rtol=1e-4)


def test_guidance_throughout_is_made_anew_in_every_step(sampled):
    sent = []

    class Recorder:
        def call(self, request, arrays, **arguments):
            sent.append(arrays)

    task = Task.of(sampled, 3, 128, 20).for_torch(sampled)
    for case in (task, task.guided_throughout()):
        case.send(Recorder())
    same, throughout = sent
    assert throughout["guided"].all() and throughout["told_both"].all()
    # As we sample: in the guided part, in the first of two passes each.
    guided = np.flatnonzero(same["guided"])
    assert 2 < len(guided) < 20
    np.testing.assert_array_equal(np.flatnonzero(same["told_both"]), guided[::2])
