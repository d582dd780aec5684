import pytest

from sunfish_jax.evaluation import degenerate
from sunfish_jax.evaluation.text_statistics import NgramIndex, words

TEXTS = ["The cat, which (as ever) sat on the mat, was grey.", "Dogs bark; cats don't.", "", "One."]
TRAIN = [
    "A first text for training, of ten words in all.",
    "A second one, which is a little longer than the first was.",
]


def test_cut_keeps_whole_words_and_what_stands_between():
    text = TEXTS[0]
    assert degenerate.cut(text, 5) == "The cat, which (as ever"
    assert degenerate.cut(text, 0) == ""
    assert degenerate.cut(text, 11) == degenerate.cut(text, 99) == text


def test_the_longer_of_two_texts_is_cut():
    others = ["two words", "three words - here", "some", "One two three"]
    texts, cut = degenerate.cut_alike(TEXTS, others)
    assert texts == ["The cat", "Dogs bark; cats", "", "One."]
    assert cut == ["two words", "three words - here", "", "One"]
    with pytest.raises(ValueError):
        degenerate.cut_alike(TEXTS, others[:2])


def test_shuffled_words_are_the_same_words():
    shuffled = degenerate.shuffled_words(TEXTS, seed=1)
    assert [sorted(text.split()) for text in shuffled] == [sorted(text.split()) for text in TEXTS]
    assert shuffled[0] != TEXTS[0]


def test_one_word_of_the_text_is_repeated():
    repeated = degenerate.repeated_word(TEXTS, seed=1)
    for text, result in zip(TEXTS, repeated, strict=True):
        assert len(words(result)) == len(words(text))
        assert len(set(words(result))) == min(len(words(text)), 1)
        assert set(words(result)) <= set(words(text))


def test_training_text_is_copied_at_the_texts_lengths():
    copied = degenerate.training_text(TRAIN, TEXTS, seed=1)
    assert [len(words(text)) for text in copied] == [len(words(text)) for text in TEXTS]
    assert NgramIndex(TRAIN, sizes=(3,)).overlap(copied) == {3: 1}
    # Of the two, the second alone is long enough for this one; none is for the other.
    (second,) = degenerate.training_text(TRAIN, ["w " * 11], seed=0)
    assert second in TRAIN[1] and len(words(second)) == 11
    assert degenerate.training_text(TRAIN, ["w " * 99], seed=0) == [TRAIN[1]]
    drawn = {degenerate.training_text(TRAIN, ["w " * 8], seed=seed)[0] for seed in range(60)}
    # Every place in either text.
    assert len(drawn) == sum(len(words(text)) - 8 + 1 for text in TRAIN)


def test_the_seed_decides():
    first, again, other = (degenerate.degenerate_texts(TEXTS * 5, TRAIN, seed) for seed in (0, 0, 1))
    assert first == again
    assert list(first) == ["shuffled words", "one word repeated", "training text"]
    assert all(first[name] != other[name] for name in first)
