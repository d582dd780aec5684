"""Texts that every figure is shown beside: real ones of the samples' lengths, and bad ones on purpose.

A figure on which a bad text does as well as a real one cannot tell a good model from that kind of bad one.
"""

from collections.abc import Sequence

import numpy as np

from sunfish_jax.evaluation.text_statistics import WORD, words


def cut(text: str, num_words: int) -> str:
    """The beginning of a text up to the end of word `num_words`; all of a text with no more words than that."""
    ends = [match.end() for match in WORD.finditer(text)]
    if num_words >= len(ends):
        return text
    return text[: ends[num_words - 1]] if num_words else ""


def cut_alike(texts: Sequence[str], others: Sequence[str]) -> tuple[list[str], list[str]]:
    """Both sets of texts, the longer text of each pair cut to as many words as the other has.

    Entropy, perplexity and more depend on length, so only equal lengths can be compared.
    """
    lengths = [min(len(words(text)), len(words(other))) for text, other in zip(texts, others, strict=True)]
    return tuple([cut(text, n) for text, n in zip(of, lengths, strict=True)] for of in (texts, others))


def shuffled_words(texts: Sequence[str], seed: int = 0) -> list[str]:
    """Each text's words in random order, with the punctuation that is attached to them."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.permutation(text.split()).tolist()) for text in texts]


def repeated_word(texts: Sequence[str], seed: int = 0) -> list[str]:
    """One of each text's words, drawn at random, said as often as the text has words."""
    rng = np.random.default_rng(seed)
    return [" ".join([str(rng.choice(of_text))] * len(of_text)) if of_text else "" for of_text in map(words, texts)]


def training_text(train_texts: Sequence[str], texts: Sequence[str], seed: int = 0) -> list[str]:
    """For each text as many words in a row of a training text; both that text and the place are drawn at random.

    Where no training text is that long, the longest is taken.
    """
    rng = np.random.default_rng(seed)
    lengths = np.array([len(words(text)) for text in train_texts])
    result = []
    for wanted in (len(words(text)) for text in texts):
        choice = rng.choice(np.flatnonzero(lengths >= min(wanted, lengths.max())))
        start = int(rng.integers(max(lengths[choice] - wanted, 0) + 1))
        before = cut(train_texts[choice], start)
        result.append(cut(train_texts[choice][len(before) :], wanted))
    return result


def degenerate_texts(texts: Sequence[str], train_texts: Sequence[str], seed: int = 0) -> dict[str, list[str]]:
    """What a sampler without any merit could write in place of real texts.

    Args:
        texts: Real texts, as `cut_alike` makes them.
        train_texts: The training text.
        seed: Of all that is drawn.

    Returns:
        Texts in the order of `texts` and, but for training texts that are too short, of the same number of words,
        by name.
    """
    return {
        "shuffled words": shuffled_words(texts, seed),
        "one word repeated": repeated_word(texts, seed),
        "training text": training_text(train_texts, texts, seed),
    }
