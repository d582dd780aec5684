"""The first SunFish, in its size and in a small one."""

import subprocess
from pathlib import Path

import numpy as np

SMALL = {
    "vocab_size": 50, "width": 32, "num_layers": 2, "num_heads": 2, "block_size": 16, "prompt_length": 4,
    "prompt_dim": 8, "accumulate_steps": 2, "rows": 8,
}  # fmt: skip


def test_it_has_the_parameters_of_its_source(torch):
    made = torch.call("first_sunfish", sizes={})
    # Tokens and positions; noise level; prompt; layers of two attentions, feed-forward and norms; norm; head.
    attention = 4 * 512 * 512 + 4 * 512
    layer = 2 * attention + 2 * 512 * 2048 + 2048 + 512 + 3 * 2 * 512
    noise_level, prompt = 2 * 512 * 2048 + 2048 + 512, 768 * 1024 + 1024 + 1024 * 512 + 512
    expected = (8192 + 256) * 512 + noise_level + prompt + 8 * layer + 2 * 512 + 512 * 512
    assert made["parameters"] == expected == 41_632_768
    assert (made["positions"], made["block_size"]) == (8 * 4 * 256, 256)


# What its speed hangs on: dropout in training alone, and no cross-attention without a prompt.
PARTS = f"""
import torch
from first_sunfish import FirstSunFish, Sizes
first = FirstSunFish(Sizes(**{SMALL}))
model, z, level, prompt = first.model, torch.randn(2, 16, 32), torch.tensor([3, 400]), torch.randn(2, 4, 32)
same = lambda *inputs: torch.equal(model(z, level, *inputs), model(z, level, *inputs))
print(same(prompt), model.eval() and same(prompt))
before = [model(z, level, given) for given in (prompt, None)]
torch.nn.init.ones_(model.layers[0].cross_attention.out_proj.bias)
print(*[torch.equal(model(z, level, given), old) for given, old in zip((prompt, None), before)])
"""


def test_training_drops_and_what_has_no_prompt_attends_to_none(torch_python):
    folder = Path(__file__).parents[2] / "benchmarks"
    done = subprocess.run([torch_python, "-c", PARTS], capture_output=True, text=True, cwd=folder, check=False)
    assert done.stdout.splitlines() == ["False True", "False True"], done.stderr


def test_it_learns_to_predict_noise(torch):
    assert torch.call("first_sunfish", sizes=SMALL)["positions"] == 256
    losses = [torch.call("first_step")["loss"] for _ in range(120)]
    # Knowing nothing it predicts zero, whose error is one.
    assert 1 < losses[0] < 2.5
    assert np.mean(losses[-10:]) < 0.93


def test_it_samples(torch):
    torch.call("first_sunfish", sizes=SMALL)
    sample = torch.call("first_sample", rows=3, length=12, num_steps=20)
    assert sample["seconds"] > 0 and sample["tokens"].shape == (3, 12)
    # Numbers that are none would all be the first token.
    assert len(np.unique(sample["tokens"])) > 5
