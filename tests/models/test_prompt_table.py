"""The table of encoded prompts."""

import errno

import numpy as np
import pytest
from ml_collections import ConfigDict
from tokenizers import Tokenizer, models, pre_tokenizers

from sunfish_jax.models import prompt_table
from sunfish_jax.models.prompt_encoder import PromptEncoder, encode_prompts, make_prompt_encoder
from sunfish_jax.models.prompt_table import PromptTable

PROMPTS = ["a dog", "Write about dogs", "Volcano", "Physicist who developed the theory of relativity " * 3]


@pytest.fixture(scope="module")
def minilm():
    return make_prompt_encoder(ConfigDict({"name": "minilm", "max_length": 64}))


def _texts(indices):
    return [PROMPTS[index] for index in indices]


def _counting_encoder(trained=False):
    """States are the tokens themselves; `calls` counts the prompts encoded."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(100)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    calls = []

    def encode(tokens, mask):
        calls.append(len(tokens))
        return np.repeat(tokens[..., None], 4, axis=-1).astype(np.float16)

    encoder = PromptEncoder("counting", 64, 4, tokenizer, False, encode=None if trained else encode)
    return encoder, calls


def test_states_are_those_of_the_prompts_alone_to_the_last_bit(minilm):
    table = PromptTable(minilm, len(PROMPTS), _texts)
    assert table.width == 24
    indices = np.array([[3, -1, 0], [2, 3, 1]])
    prompt = table(indices)
    assert prompt.inputs.shape == (2, 3, 24, 384) and prompt.inputs.dtype == np.float16
    for at in np.ndindex(2, 3):
        if indices[at] < 0:
            assert not prompt.mask[at].any() and not prompt.inputs[at].any()
        else:
            alone = encode_prompts(minilm, [PROMPTS[indices[at]]])
            np.testing.assert_array_equal(prompt.inputs[at][prompt.mask[at]], alone.inputs[alone.mask])


def test_a_fresh_table_gives_the_same_bits_as_one_that_has_seen_other_prompts(minilm):
    old = PromptTable(minilm, len(PROMPTS), _texts)
    old(np.array([0, 3, 1]))
    first = PromptTable(minilm, len(PROMPTS), _texts)(np.array([1, 2]))
    again = old(np.array([1, 2]))
    np.testing.assert_array_equal(first.inputs, again.inputs)
    np.testing.assert_array_equal(first.mask, again.mask)


@pytest.fixture
def any_disk(monkeypatch):
    """However little is free where the tests run."""
    monkeypatch.setattr(prompt_table, "_BYTES_LEFT_FREE", 0)


@pytest.mark.usefixtures("any_disk")
def test_each_prompt_is_encoded_once(tmp_path):
    encoder, calls = _counting_encoder()
    words = [f"w{i} w{i + 1}" for i in range(20)]
    table = PromptTable(encoder, 20, lambda indices: [words[i] for i in indices], tmp_path)
    table(np.array([5, 6, 5, -1, 5]))
    assert calls == [2]
    table(np.array([5, 7]))
    assert calls == [2, 1]
    prompt = table(np.array([6, 5, 7]))
    assert calls == [2, 1]
    np.testing.assert_array_equal(prompt.inputs[:, :2, 0], [[6, 7], [5, 6], [7, 8]])
    everything = table(np.arange(20))
    assert calls == [2, 1, 17]
    np.testing.assert_array_equal(everything.inputs[:, 0, 0], np.arange(20))
    assert not list(tmp_path.iterdir()), "nothing is left behind, however the process ends"


def test_without_a_folder_nothing_is_kept():
    encoder, calls = _counting_encoder()
    table = PromptTable(encoder, 2, lambda indices: ["w1"] * len(indices))
    table(np.array([0]))
    table(np.array([0]))
    assert calls == [1, 1]


@pytest.mark.usefixtures("any_disk")
@pytest.mark.parametrize("full", ["file", "disk", "quota", "partly written", "folder is gone"])
def test_what_there_is_no_room_for_is_encoded_again(tmp_path, monkeypatch, full):
    encoder, calls = _counting_encoder()
    words = [f"w{i} w{i + 1}" for i in range(20)]
    table = PromptTable(encoder, 20, lambda indices: [words[i] for i in indices], tmp_path)
    table(np.array([0, 1]))
    row_bytes = 2 * 4 * 2
    if full == "file":
        monkeypatch.setattr(prompt_table, "_MOST_FILE_BYTES", 3 * row_bytes)
    elif full == "disk":
        monkeypatch.setattr(prompt_table, "_BYTES_LEFT_FREE", 2**62)
    elif full == "folder is gone":
        tmp_path.rmdir()
    else:
        monkeypatch.setattr(table._kept, "_file", _FileUnderQuota(table._kept._file, full == "partly written"))
    for expected in ([2, 2], [2, 2, 2]):
        prompt = table(np.array([0, 1, 2, 3]))
        np.testing.assert_array_equal(prompt.inputs[:, :2, 0], [[0, 1], [1, 2], [2, 3], [3, 4]])
        assert calls == expected


class _FileUnderQuota:
    """A file of which one more byte is written, or none."""

    def __init__(self, file, partly):
        self.seek, self.read, self._file, self._partly = file.seek, file.read, file, partly

    def write(self, data):
        if not self._partly:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        return self._file.write(data[:1])


def test_where_no_file_can_be_made_nothing_is_kept(tmp_path):
    encoder, calls = _counting_encoder()
    table = PromptTable(encoder, 2, lambda indices: ["w1"] * len(indices), tmp_path / "none")
    assert table(np.array([0, 0])).mask.sum() == 2
    table(np.array([0]))
    assert calls == [1, 1]


@pytest.mark.usefixtures("any_disk")
def test_tokens_are_kept_too(tmp_path):
    words = ["w3 w4", "", "w1 " * 20]
    table = PromptTable(_counting_encoder(trained=True)[0], 3, lambda i: [words[j] for j in i], tmp_path)
    first, again = (table(np.array([2, 0, 1])) for _ in range(2))
    assert again.mask.sum(axis=-1).tolist() == [20, 2, 0]
    np.testing.assert_array_equal(again.inputs, first.inputs)
    assert again.inputs.dtype == np.int32


def test_the_width_holds_all_prompts_but_a_few_in_a_thousand(monkeypatch):
    monkeypatch.setattr(prompt_table, "_MEASURED", 2000)

    def width(lengths):
        words = ["w1 " * length for length in lengths]
        return PromptTable(_counting_encoder()[0], len(words), lambda indices: [words[i] for i in indices]).width

    assert width([1] * 9 + [17]) == 24
    assert width([1] * 9 + [16]) == 16
    assert width([17] + [1] * 500) == 8
    assert width([17] * 5 + [1] * 500) == 24
    # Of more prompts as many as are to be measured, from the first to the last.
    assert width([9] * 4000 + [17] * 20 + [1] * 4000) == 16
    assert width([1] * 4000 + [17] * 200) == 24


@pytest.mark.parametrize("trained", [False, True])
def test_a_prompt_wider_than_the_table_is_cut(trained):
    encoder, _ = _counting_encoder(trained)
    words = ["w1 " * 7 + "w2 w3 w4", *["w1"] * 500]
    prompt = PromptTable(encoder, 501, lambda indices: [words[i] for i in indices])(np.array([0, 1]))
    first = prompt.inputs.reshape(2, 8, -1)[..., 0]
    assert prompt.mask.sum(axis=-1).tolist() == [8, 1]
    assert first.tolist() == [[1] * 7 + [2], [1] + [0] * 7]


def test_no_prompts_at_all():
    for trained, shape in ((False, (2, 8, 4)), (True, (2, 8))):
        encoder, calls = _counting_encoder(trained)
        prompt = PromptTable(encoder, 0, lambda indices: [])(np.array([-1, -1]))
        assert prompt.inputs.shape == shape and prompt.mask.shape == (2, 8)
        assert not prompt.mask.any() and not calls


def test_a_trained_encoder_gets_tokens():
    encoder, _ = _counting_encoder(trained=True)
    words = ["w3 w4", "w5", "w1 " * 20]
    prompt = PromptTable(encoder, 3, lambda indices: [words[i] for i in indices])(np.array([[1, 0], [-1, 2]]))
    assert prompt.inputs.shape == prompt.mask.shape == (2, 2, 24) and prompt.inputs.dtype == np.int32
    assert prompt.inputs[0, :, :3].tolist() == [[5, 0, 0], [3, 4, 0]]
    assert prompt.mask.sum(axis=-1).tolist() == [[1, 2], [0, 20]]
