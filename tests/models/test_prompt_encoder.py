"""Prompt encoders: what they make of ordinary and of bad prompts."""

import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sunfish_jax.errors import UserError
from sunfish_jax.models.prompt_encoder import encode_prompts, make_prompt_encoder, say_what_is_unread

EMOJI = "🐕🦴👍🏽👩‍👩‍👧"


def _byte_level_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["a dog and a puppy", "the theory of relativity"], trainer)
    return tokenizer


@pytest.fixture(scope="module")
def minilm():
    return make_prompt_encoder(ConfigDict({"name": "minilm", "max_length": 40}))


@pytest.fixture
def gpt2_folder(tmp_path):
    tokenizer = _byte_level_tokenizer()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    table = np.random.default_rng(0).normal(size=(tokenizer.get_vocab_size(), 24)).astype(np.float32)
    save_file({"wte.weight": table, "wpe.weight": table[:8]}, tmp_path / "model.safetensors")
    return tmp_path


def _gpt2(folder, max_length=32):
    return make_prompt_encoder(ConfigDict({"name": "gpt2", "max_length": max_length, "path": str(folder)}))


def _transformer(max_length=32, width=16, num_heads=2):
    corpus_tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_byte_level_tokenizer(), pad_token="<pad>", eos_token="<eos>"
    )
    config = {"name": "transformer", "max_length": max_length, "num_layers": 1}
    config |= {"num_heads": num_heads, "width": width}
    return make_prompt_encoder(ConfigDict(config), corpus_tokenizer), corpus_tokenizer


def test_what_is_not_read_of_a_prompt_is_said(minilm, capsys):
    # Of 40 tokens MiniLM's own marks take two.
    for words, unread in ((1, 0), (38, 0), (39, 1), (100, 62)):
        assert minilm.unread("dog " * words) == unread
    say_what_is_unread(minilm, ["dog " * 41, "dog"])
    assert capsys.readouterr().err == "the last 3 tokens of the prompt 'dog dog dog dog dog '... are not read\n"


def test_widths_are_multiples_of_16_and_truncation_keeps_the_end_mark(minilm):
    for words, width, length in ((1, 16, 3), (14, 16, 16), (15, 32, 17), (5000, 48, 40)):
        tokens, mask = minilm.tokenize(["dog " * words, "dog"])
        assert tokens.shape == mask.shape == (2, width)
        assert mask.sum(axis=1).tolist() == [length, 3]
        assert tokens[0, 0] == 101 and tokens[0, length - 1] == 102  # [CLS] and [SEP]


@pytest.mark.parametrize("prompt", ["dog " * 2500, "x" * 10_000, EMOJI * 500, EMOJI, "\ud83d half a pair", "\0"])
def test_odd_prompts_are_encoded(minilm, gpt2_folder, prompt):
    for encoder in (minilm, _gpt2(gpt2_folder)):
        encoded = encode_prompts(encoder, [prompt])
        assert encoded.inputs.shape == (*encoded.mask.shape, encoder.output_dim)
        assert 0 < encoded.mask.sum() <= encoder.max_length
        assert np.isfinite(encoded.inputs).all() and encoded.inputs[encoded.mask].any()


@pytest.mark.parametrize("prompt", ["", "   ", "\n\t"])
def test_an_empty_prompt_is_an_error(minilm, prompt):
    with pytest.raises(UserError, match="empty"):
        encode_prompts(minilm, ["a dog", prompt])


def test_no_prompt_has_an_empty_mask(minilm):
    encoded = encode_prompts(minilm, [None, "a dog"])
    assert encoded.mask.sum(axis=1).tolist() == [0, 4]
    assert not encoded.inputs[0].any()
    assert encode_prompts(minilm, [None, None]).inputs.shape == (2, 16, 384)


def test_gpt2_states_are_the_embeddings_without_positions(gpt2_folder):
    encoder = _gpt2(gpt2_folder)
    assert encoder.frozen and encoder.module is None and encoder.output_dim == 24
    tokens, mask = encoder.tokenize(["a dog", "relativity"])
    states = encoder.encode(tokens, mask)
    assert states.dtype == np.float16
    table = np.random.default_rng(0).normal(size=(300, 24)).astype(np.float32)
    for row, column in np.ndindex(tokens.shape):
        expected = table[tokens[row, column]] if mask[row, column] else np.zeros(24)
        np.testing.assert_allclose(states[row, column], expected, rtol=1e-3, atol=1e-6)
    assert encoder.tokenizer.decode(tokens[0, mask[0]]) == "a dog"


def test_identity_follows_the_weights(gpt2_folder):
    before = _gpt2(gpt2_folder).identity
    assert _gpt2(gpt2_folder).identity == before
    save_file({"transformer.wte.weight": np.zeros((300, 24), np.float32)}, gpt2_folder / "model.safetensors")
    assert _gpt2(gpt2_folder).identity != before


def _remove_weights(folder):
    (folder / "model.safetensors").unlink()


def _break_weights(folder):
    (folder / "model.safetensors").write_bytes(b"not safetensors at all")


def _break_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{")


def _other_tensors(folder):
    save_file({"words": np.zeros((300, 4), np.float32)}, folder / "model.safetensors")


def _too_few_embeddings(folder):
    save_file({"wte.weight": np.zeros((10, 4), np.float32)}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_remove_weights, "no model.safetensors"),
        (_break_weights, "cannot be read"),
        (_break_tokenizer, "is no tokenizer"),
        (_other_tensors, "no tensor `wte.weight`"),
        (_too_few_embeddings, "tokens and the model 10 embeddings"),
    ],
)
def test_a_damaged_gpt2_folder_is_one_clear_line(gpt2_folder, damage, message):
    damage(gpt2_folder)
    with pytest.raises(UserError, match=message) as error:
        _gpt2(gpt2_folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", ["", "/no/such/folder"])
def test_a_missing_gpt2_folder_is_an_error(path):
    with pytest.raises(UserError, match=r"prompt_encoder\.path=.*no model\.safetensors and no tokenizer\.json"):
        _gpt2(path)


def test_wrong_settings_are_errors():
    with pytest.raises(UserError, match="minilm, gpt2, transformer"):
        make_prompt_encoder(ConfigDict({"name": "bert", "max_length": 64}))
    for max_length in (2, 513):
        with pytest.raises(UserError, match=f"max_length={max_length}"):
            make_prompt_encoder(ConfigDict({"name": "minilm", "max_length": max_length}))
    with pytest.raises(UserError, match=r"width=16.*num_heads=3"):
        _transformer(num_heads=3)


def test_a_trained_encoder_gives_tokens_and_leaves_the_corpus_tokenizer_alone():
    encoder, corpus_tokenizer = _transformer(max_length=20)
    assert not encoder.frozen and encoder.encode is None
    encoded = encode_prompts(encoder, ["a dog", "a puppy " * 50])
    assert encoded.inputs.dtype == np.int32 and encoded.inputs.shape == encoded.mask.shape == (2, 32)
    assert encoded.mask.sum(axis=1).tolist()[1] == 20
    assert corpus_tokenizer.decode(encoded.inputs[0, encoded.mask[0]]) == "a dog"
    assert len(corpus_tokenizer("a puppy " * 50)["input_ids"]) > 20
