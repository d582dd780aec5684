import jax
import numpy as np
import pytest

from configs import nano
from sunfish_jax.data.tokens import TokenizedSplit
from sunfish_jax.evaluation.text_rows import REFERENCES, TextRows, likelihood_texts, shuffled_order

VOCAB = 50


class Letters:
    """A prompt encoder whose tokens are letters."""

    frozen = False

    def tokenize(self, texts):
        lengths = np.array([len(text) for text in texts])
        tokens = np.zeros((len(texts), lengths.max()), np.int32)
        for row, text in zip(tokens, texts, strict=True):
            row[: len(text)] = [ord(letter) for letter in text]
        return tokens, np.arange(lengths.max()) < lengths[:, None]


def make_split(first_token: int, num_rows: int = 40) -> TokenizedSplit:
    """Rows of rising tokens, each with a prompt."""
    lengths = np.random.default_rng(first_token).integers(4, 60, num_rows)
    prompts = [f"prompt {i}".encode() for i in range(num_rows)]
    return TokenizedSplit(
        tokens=np.concatenate([first_token + np.arange(n) % 10 for n in lengths]).astype(np.uint16),
        row_starts=np.concatenate([[0], np.cumsum(lengths)]),
        row_bytes=3 * lengths,
        row_prompts=np.stack([np.arange(num_rows), np.ones(num_rows, int)], axis=-1),
        prompt_bounds=np.concatenate([[0], np.cumsum([len(prompt) for prompt in prompts])]),
        prompt_text=np.frombuffer(b"".join(prompts), np.uint8),
        pad_id=0,
    )


@pytest.fixture(scope="module")
def texts():
    config = nano.get_config()
    config.model.block_size = 64
    config.eval.bound_rows = 20
    splits = {"train": make_split(10), "validation": make_split(30)}
    return likelihood_texts(splits, "validation", config, Letters())


def real_tokens(text: TextRows) -> list[np.ndarray]:
    return [
        tokens[mask]
        for batch in text.rows
        for tokens, mask in zip(batch.tokens[0], batch.padding_mask[0], strict=True)
    ]


def test_the_same_rows_are_scored_four_times(texts):
    assert set(REFERENCES) < set(texts)
    text = texts["with prompt"]
    assert all(batch.prompt.mask.any(-1)[batch.padding_mask.any(-1)].all() for batch in text.rows)
    assert not any(batch.prompt.mask.any() for batch in texts["without prompt"].rows)
    for name in ("without prompt", "shuffled"):
        jax.tree.map(np.testing.assert_array_equal, texts[name].row_bytes, text.row_bytes)
    for row, shuffled in zip(real_tokens(text), real_tokens(texts["shuffled"]), strict=True):
        np.testing.assert_array_equal(np.sort(row), np.sort(shuffled))
    assert any(
        (row != shuffled).any()
        for row, shuffled in zip(real_tokens(text), real_tokens(texts["shuffled"]), strict=True)
    )
    assert all((row >= 30).all() for row in real_tokens(text))
    assert all((row < 30).all() for row in real_tokens(texts["training text"]))


@pytest.mark.parametrize("name", ["with prompt", "training text"])
def test_bytes_go_with_their_rows(texts, name):
    rows = [len(row) for row in real_tokens(texts[name])]
    assert sum(length > 0 for length in rows) == 20
    np.testing.assert_array_equal(np.concatenate(texts[name].row_bytes), 3 * np.array(rows))


def test_frequencies_alone(texts):
    tokens = np.concatenate(real_tokens(texts["with prompt"]))
    log_unigram = np.log(np.random.default_rng(0).dirichlet(np.ones(VOCAB))).astype(np.float32)
    expected = -log_unigram[tokens].sum() / np.log(2) / (3 * len(tokens))
    assert texts["with prompt"].bits_per_byte_by_frequency(log_unigram) == pytest.approx(expected, rel=1e-5)


def test_shuffling_keeps_the_words_the_end_and_the_padding():
    rng = np.random.default_rng(0)
    tokens = rng.integers(VOCAB, size=(6, 16))
    mask = np.arange(16) < rng.integers(8, 17, size=(6, 1))
    shuffled = np.take_along_axis(tokens, shuffled_order(mask, seed=0), axis=1)
    assert (shuffled != tokens).any()
    for before, after, real in zip(tokens, shuffled, mask, strict=True):
        n = real.sum()
        np.testing.assert_array_equal(after[n - 1 :], before[n - 1 :])
        np.testing.assert_array_equal(np.sort(after[:n]), np.sort(before[:n]))
