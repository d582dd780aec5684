"""The first SunFish, in its size and in a small one."""

import numpy as np
import pytest

SMALL = {
    "vocab_size": 50, "width": 32, "num_layers": 2, "num_heads": 2, "block_size": 16, "prompt_length": 4,
    "prompt_dim": 8, "accumulate_steps": 2, "rows": 8,
}  # fmt: skip


def test_it_has_41_6_million_parameters(torch):
    made = torch.call("first_sunfish", sizes={})
    assert made["parameters"] == pytest.approx(41.6e6, rel=0.005)
    assert (made["positions"], made["block_size"]) == (8 * 4 * 256, 256)


def test_it_learns_to_predict_noise(torch):
    assert torch.call("first_sunfish", sizes=SMALL)["positions"] == 256
    losses = [torch.call("first_step")["loss"] for _ in range(120)]
    # Knowing nothing it predicts zero, whose error is one.
    assert 1 < losses[0] < 2.5
    assert np.mean(losses[-10:]) < 0.93


def test_it_samples(torch):
    torch.call("first_sunfish", sizes=SMALL)
    few, many = (
        np.median([torch.call("first_sample", rows=3, length=16, num_steps=n)["seconds"] for _ in range(5)])
        for n in (2, 20)
    )
    assert 4 < many / few < 25
