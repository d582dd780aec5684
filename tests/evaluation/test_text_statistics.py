import math

import numpy as np
import pytest

from sunfish_jax.evaluation.text_statistics import (
    NgramIndex,
    distinct_2,
    mean_entropy,
    mean_length,
    pooled_entropy,
    text_statistics,
    words,
)


def test_words_are_lower_case_without_punctuation():
    assert words("The Bird's-eye view, 3.5 km — ÉTÉ_2!") == "the bird s eye view 3 5 km été_2".split()
    assert words(" … ") == []


def test_entropy_of_known_frequencies():
    # Shares 1/2, 1/4, 1/4: 1/2 * 1 + 1/4 * 2 + 1/4 * 2 bits.
    assert pooled_entropy([["a", "b", "a", "c"]]) == pytest.approx(1.5)
    assert pooled_entropy([np.arange(8)] * 3) == pytest.approx(3), "token ids will do for words"
    assert pooled_entropy([[], []]) == pooled_entropy([]) == mean_entropy([]) == 0


def test_pooled_entropy_sees_texts_repeat_themselves_and_the_other_one_each_other():
    monotonous = [["a", "a"], ["b", "b"]]
    assert (pooled_entropy(monotonous), mean_entropy(monotonous)) == (1, 0)
    alike = [["a", "b"], ["a", "b"]]
    assert (pooled_entropy(alike), mean_entropy(alike)) == (1, 1)
    # Each text counts as much as another, however long.
    assert mean_entropy([["a", "b"], ["a"] * 10, []]) == pytest.approx(1 / 3)


def test_distinct_2_counts_pairs_within_texts():
    assert distinct_2([["a", "b", "a", "b"]]) == pytest.approx(2 / 3)
    assert distinct_2([["a", "b"], ["a", "b"], ["b", "a"]]) == pytest.approx(2 / 3)
    assert distinct_2([[1, 2], [3, 4]]) == 1
    assert math.isnan(distinct_2([["a"], []]))


def test_mean_length():
    assert mean_length([["a", "b"], [], ["c"]]) == 1
    assert mean_length([]) == 0


def ngrams(text, size):
    of_text = words(text)
    return [tuple(of_text[i : i + size]) for i in range(len(of_text) - size + 1)]


def test_overlap_is_that_of_plain_sets():
    rng = np.random.default_rng(0)
    # Few words, so that all of them occur in many orders; more texts than are hashed at once.
    texts = [" ".join(rng.choice(list("abc"), rng.integers(0, 12))) for _ in range(1200)]
    train, held_out = texts[:1100], texts[1100:]
    sizes = (1, 2, 4, 5, 8)
    overlap = NgramIndex(train, sizes).overlap(held_out)
    assert tuple(overlap) == sizes
    for size in sizes:
        known = {ngram for text in train for ngram in ngrams(text, size)}
        wanted = [ngram for text in held_out for ngram in ngrams(text, size)]
        assert overlap[size] == pytest.approx(np.mean([ngram in known for ngram in wanted]))
    assert 0 < overlap[8] < 0.5 < overlap[5] <= 1


def test_overlap_of_hand_made_texts():
    index = NgramIndex(iter(["One two, three four five.", "six seven eight"]), sizes=(2, 3))
    assert index.overlap(["one TWO three"]) == {2: 1, 3: 1}
    assert index.overlap(["two one"])[2] == 0
    assert index.overlap(["five six"])[2] == 0, "an n-gram does not go from one training text to the next"
    assert index.overlap(["one", "two"])[2] != 1, "nor from one text to the next"
    # two three, three four, four two, two three: each is counted as often as it is said.
    assert index.overlap(["two three four two three"]) == {2: 3 / 4, 3: 1 / 3}
    assert math.isnan(index.overlap(["one two"])[3])
    assert math.isnan(index.overlap([])[2])
    assert NgramIndex([], sizes=(2,)).overlap(["one two"]) == {2: 0}


def test_hashes_are_64_bits_wide():
    # With 32 bits, some 5 of these 150,000 pairs would be found by chance among as many others.
    numbers = np.random.default_rng(0).integers(0, 10**9, (2, 150_000)).astype(str)
    index = NgramIndex([" ".join(numbers[0])], sizes=(2,))
    assert index.overlap([" ".join(numbers[1])])[2] == 0


def test_all_statistics_of_a_text():
    index = NgramIndex(["the cat sat on the mat"], sizes=(2, 4))
    assert text_statistics(["The cat sat. The dog sat."], index) == {
        "entropy": pytest.approx(math.log2(6) - 2 / 3 * 1),
        "entropy_within_text": pytest.approx(math.log2(6) - 2 / 3 * 1),
        "distinct_2": 1,
        "mean_words": 6,
        "overlap_2": 2 / 5,
        "overlap_4": 0,
    }
