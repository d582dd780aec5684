import os
from pathlib import Path

import pytest

from sunfish_jax.errors import UserError
from sunfish_jax.generation.options import InfillOptions, SampleOptions, read_prompts


def test_nothing_given_leaves_the_choice_to_the_run():
    options = SampleOptions()
    assert options.prompts == () and options.checkpoint == "latest" and options.seed == 0
    for name in ("seq_len", "num_steps", "scheduler", "guidance_scale", "temperature", "output"):
        assert getattr(options, name) is None


def test_the_limits_themselves_are_allowed():
    SampleOptions(num_samples=1, num_steps=1, guidance_scale=0.0, temperature=1e-3, seed=2**32 - 1)
    SampleOptions(prompts=("x" * 2000, "🐕 dogs", "犬"), checkpoint="120")
    SampleOptions(seq_len=64).check_length(64)
    with pytest.raises(UserError, match=r"--seq_len=65: .* at most 64"):
        SampleOptions(seq_len=65).check_length(64)


@pytest.mark.parametrize(
    "values",
    [
        {"num_samples": 0},
        {"temperature": float("inf")},
        {"guidance_scale": -0.5},
        {"seed": 2**32},
        {"checkpoint": "-1"},
        {"checkpoint": "²"},
        {"prompts": ("dogs", " \n")},
        {"prompts": ("x" * 2001,)},
        {"text": ""},
        {"text": "no gap [mask]"},
        {"text": "not UTF-8 \udcff [MASK]"},
        {"prompts": ("not UTF-8 \udcff",)},
    ],
)
def test_the_rest_is_one_line(values):
    with pytest.raises(UserError) as error:
        InfillOptions(**({"text": "a [MASK]"} | values))
    assert "\n" not in str(error.value)


def test_an_output_in_no_folder_or_that_is_one(tmp_path):
    SampleOptions(output=tmp_path / "out.jsonl")
    for no_file in (tmp_path, Path(os.devnull)):
        with pytest.raises(UserError, match="is a folder or a device"):
            SampleOptions(output=no_file)
    with pytest.raises(UserError, match="there is no folder"):
        SampleOptions(output=tmp_path / "nowhere" / "out.jsonl")


def test_prompts_are_lines(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("Write about dogs\n\n  Völker  \n", encoding="utf-8")
    assert read_prompts(path) == ("Write about dogs", "Völker")
    path.write_bytes("Völker".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8 text: byte 1"):
        read_prompts(path)
