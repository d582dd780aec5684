import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sunfish_jax.data.tokenizer import load_tokenizer, tokenizer_identity, train_tokenizer
from sunfish_jax.errors import UserError

TEXTS = ["the cat sat on the mat", "the dog sat on the log"] * 20


def gpt2_like(path, eos_token, special="<|endoftext|>"):
    """A byte-level BPE with GPT-2's one special token, saved as GPT-2's is: without a padding token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=270,
        special_tokens=[special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos_token).save_pretrained(path)


def test_every_text_comes_back_after_saving_and_loading(tmp_path):
    tokenizer = train_tokenizer(TEXTS, 270)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, len(tokenizer)) == (0, 1, 270)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert tokenizer_identity(loaded) == tokenizer_identity(tokenizer)
    assert tokenizer_identity(train_tokenizer(TEXTS, 269)) != tokenizer_identity(tokenizer)
    for text in ("the cat sat , did n't it .", "  two  spaces\n\n", "emoji 👩‍🚀 ünïcode 語", ""):
        ids = loaded(text, add_special_tokens=True).input_ids
        assert loaded.decode(ids) == text
        assert 0 not in ids and 1 not in ids


def test_frequent_words_are_single_tokens():
    tokenizer = train_tokenizer(TEXTS, 300)
    assert tokenizer.convert_ids_to_tokens(tokenizer("sat on the").input_ids) == ["sat", "Ġon", "Ġthe"]


def test_tokenizer_without_padding_gets_a_new_token_for_it(tmp_path):
    gpt2_like(tmp_path, "<|endoftext|>")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_token_id == 0
    assert tokenizer.pad_token_id == len(tokenizer) - 1 == 270


@pytest.mark.parametrize("config", [None, '{"model_max_length": 1024}'])
def test_files_of_a_tokenizer_that_do_not_name_its_special_tokens(tmp_path, config):
    gpt2_like(tmp_path, "<|endoftext|>")
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "special_tokens_map.json").unlink(missing_ok=True)
    if config:
        (tmp_path / "tokenizer_config.json").write_text(config)
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|endoftext|>", 0)
    assert tokenizer.decode(tokenizer("the cat").input_ids) == "the cat"


def test_tokenizers_that_cannot_serve(tmp_path):
    with pytest.raises(UserError, match="not a folder"):
        load_tokenizer(tmp_path / "missing")
    with pytest.raises(UserError, match="no tokenizer that can be read"):
        load_tokenizer(tmp_path)
    # What the library says of it is a plain Exception.
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "of next year"}}')
    with pytest.raises(UserError, match="no tokenizer that can be read"):
        load_tokenizer(tmp_path)
    gpt2_like(tmp_path / "gap", "<|endoftext|>")
    state = json.loads((tmp_path / "gap/tokenizer.json").read_text())
    state["model"]["vocab"]["on"] = 300  # as in ports of tokenizers that leave a number out
    state["model"]["merges"] = [merge for merge in state["model"]["merges"] if "".join(merge) != "Ġon"]
    (tmp_path / "gap/tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match=r"leaves numbers out: it has \d+ tokens, and the last is number 300"):
        load_tokenizer(tmp_path / "gap")
    gpt2_like(tmp_path / "no_eos", None, special="<start>")
    with pytest.raises(UserError, match="no end-of-text token"):
        load_tokenizer(tmp_path / "no_eos")
    with pytest.raises(UserError, match="vocab_size=100 is too small"):
        train_tokenizer(TEXTS, 100)
