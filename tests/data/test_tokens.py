import dataclasses

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from sunfish_jax.data import tokens
from sunfish_jax.data.examples import Example
from sunfish_jax.data.tokenizer import train_tokenizer
from sunfish_jax.data.tokens import prepare
from sunfish_jax.errors import UserError

EOS = 1
SENTENCE = "The quick brown fox jumps over the lazy dog, naïvely: 狐 👩‍🚀. "


@dataclasses.dataclass
class Listed:
    """A source in memory that counts how often it is read."""

    splits: dict[str, list[Example]]
    continuous: bool = False
    identity: str = "one"
    reads: int = 0

    def examples(self, split):
        self.reads += 1
        return iter(self.splits.get(split, []))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([SENTENCE] * 5, 300)


def texts(*examples) -> Listed:
    return Listed({"train": list(examples), "validation": [Example("held out")], "test": []})


def test_texts_prompts_and_bytes_come_back(tokenizer, tmp_path):
    examples = [
        Example("short", ("a", "b 👩‍🚀")),
        Example(" \n", ("of a blank text",)),
        Example(SENTENCE * 7, ("c",)),
        Example("the tokens <eos> and <pad> spelled out"),
        Example("e"),
    ]
    train = prepare(texts(*examples), tokenizer, tmp_path, block_size=16)["train"]
    assert train.lengths.max() <= 16
    kept = [example for example in examples if example.text.strip()]
    row = 0
    for example in kept:
        ids, num_bytes = [], 0
        while not ids or ids[-1] != EOS:
            ids += train.row(row).tolist()
            num_bytes += train.row_bytes[row]
            first, count = train.row_prompts[row]
            assert train.prompt_texts(np.arange(first, first + count)) == list(example.prompts)
            row += 1
        assert ids.count(EOS) == 1 and 0 not in ids
        assert tokenizer.decode(ids[:-1]) == example.text
        assert num_bytes == len(example.text.encode())
    assert row == train.num_rows


def test_bytes_of_a_row_are_those_of_its_tokens(tokenizer, tmp_path):
    text = "the fox over the dog, " * 20  # one byte a character: no token ends within one
    train = prepare(texts(Example(text)), tokenizer, tmp_path, block_size=16)["train"]
    decoded = [tokenizer.decode(train.row(i)).removesuffix("<eos>") for i in range(train.num_rows)]
    assert [len(part) for part in decoded] == train.row_bytes.tolist()


def test_a_text_just_over_the_block_is_cut_in_halves(tokenizer, tmp_path):
    text = "x" * 16  # with end-of-text 17 tokens
    train = prepare(texts(Example(text)), tokenizer, tmp_path, block_size=16)["train"]
    assert train.lengths.tolist() == [9, 8]


def test_continuous_text_fills_whole_blocks(tokenizer, tmp_path):
    source = texts(*(Example(SENTENCE * n) for n in (3, 1, 4)))
    source.continuous = True
    train = prepare(source, tokenizer, tmp_path, block_size=16)["train"]
    assert (train.lengths[:-1] == 16).all() and train.num_rows > 5
    joined = tokenizer.decode(np.asarray(train.tokens))
    assert joined == "".join(SENTENCE * n + "<eos>" for n in (3, 1, 4))
    assert train.row_bytes.sum() == len((SENTENCE * 8).encode())
    assert (train.row_prompts[:, 1] == 0).all()


def test_prepared_once_for_the_same_data_tokenizer_and_block(tokenizer, tmp_path):
    source = texts(Example(SENTENCE))
    prepare(source, tokenizer, tmp_path, block_size=16)
    reads = source.reads
    again = prepare(source, tokenizer, tmp_path, block_size=16)["train"]
    assert source.reads == reads
    assert isinstance(again.tokens, np.memmap)
    for changed in (
        {"source": dataclasses.replace(source, identity="two")},
        {"tokenizer": train_tokenizer([SENTENCE] * 5, 290)},
        {"block_size": 32},
    ):
        before = source.reads + sum(getattr(value, "reads", 0) for value in changed.values())
        arguments = {"source": source, "tokenizer": tokenizer, "block_size": 16, **changed}
        prepare(arguments["source"], arguments["tokenizer"], tmp_path, block_size=arguments["block_size"])
        assert source.reads + sum(getattr(value, "reads", 0) for value in changed.values()) > before


def test_an_interrupted_preparation_leaves_nothing_behind(tokenizer, tmp_path):
    def broken():
        yield Example(SENTENCE)
        raise KeyboardInterrupt

    source = texts()
    source.examples = lambda split: broken()
    with pytest.raises(KeyboardInterrupt):
        prepare(source, tokenizer, tmp_path, block_size=16)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_what_a_killed_preparation_left_is_removed(tokenizer, tmp_path):
    (tmp_path / "incomplete-x/tokens/train").mkdir(parents=True)
    prepare(texts(Example(SENTENCE)), tokenizer, tmp_path, block_size=16)
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1


def test_large_vocabularies_are_not_cut_to_16_bits(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "__len__", lambda self: 2**16 + 1)
    train = prepare(texts(Example(SENTENCE)), tokenizer, tmp_path, block_size=16)["train"]
    assert train.tokens.dtype == np.int32
    assert tokenizer.decode(np.asarray(train.tokens)) == SENTENCE + "<eos>"


@pytest.mark.parametrize("empty", ["train", "validation"])
def test_no_text_to_train_on_or_none_held_out(tokenizer, tmp_path, empty):
    source = texts(Example("a text"))
    source.splits[empty] = []
    with pytest.raises(UserError, match=f"no {empty} text"):
        prepare(source, tokenizer, tmp_path, block_size=16)


def test_texts_are_read_a_few_at_a_time(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "_TEXTS_AT_ONCE", 4)
    alive = 0
    most = 0

    class Counted(str):
        def __init__(self, *_):
            nonlocal alive, most
            alive += 1
            most = max(most, alive)

        def __del__(self):
            nonlocal alive
            alive -= 1

    source = texts()
    source.examples = lambda split: (Example(Counted(f"text {i}")) for i in range(100))
    prepare(source, tokenizer, tmp_path, block_size=16)
    assert most < 15


def test_texts_are_tokenized_together_up_to_a_number_and_a_size(monkeypatch):
    monkeypatch.setattr(tokens, "_TEXTS_AT_ONCE", 3)
    monkeypatch.setattr(tokens, "_CHARACTERS_AT_ONCE", 10)
    texts = ["a", "b", "c", "d" * 4, "e" * 6, "f" * 50, "g"]
    batches = list(tokens._batched(Example(text) for text in texts))
    lengths = [[len(example.text) for example in batch] for batch in batches]
    assert lengths == [[1, 1, 1], [4, 6], [50], [1]]
    assert [example.text for batch in batches for example in batch] == texts
