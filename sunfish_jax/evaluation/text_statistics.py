"""Figures of texts that need no model: variety of words, length, and how much is word for word training text.

None of them says that a text is good. Each has a value for real text, and a model's text can miss it on either
side: too little variety is repetition, too much is noise; no overlap with the training text is a salad of words
(real text shares many pairs of words and some longer phrases with it), overlap near 1 is copying.

A word, here and everywhere in the evaluation, is a run of letters, digits and underscores in lower case:
punctuation is none, and `Bird's-eye` is three.
"""

import hashlib
import itertools
import math
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence

import numpy as np

WORD = re.compile(r"\w+")

# Texts hashed together while the index is made: their words are held as Python strings only that long. Few, since a
# text of a .txt file has up to a million characters.
_TEXTS_AT_ONCE = 16
# The base of the rolling hash: odd, and with b - 1 and b + 1 divisible by few 2s, so that words which change
# places change all but the last bits of the sum.
_BASE = np.uint64(0x9E3779B97F4A7C17)


def words(text: str) -> list[str]:
    """The words of a text, in lower case."""
    # In this order: a letter can become two characters, of which one belongs to no word.
    return [word.lower() for word in WORD.findall(text)]


def pooled_entropy(sequences: Iterable[Sequence[Hashable]]) -> float:
    """Entropy of the unigrams of all sequences taken together, H = - sum_w p(w) log2 p(w).

    It falls when the texts repeat one another as well as when each repeats itself. It grows with the amount of
    text, so only equal amounts are comparable.

    Args:
        sequences: Words, or token ids, of each text.

    Returns:
        Bits a word (a token); 0 for no text.
    """
    return _entropy(Counter(itertools.chain.from_iterable(sequences)))


def mean_entropy(sequences: Sequence[Sequence[Hashable]]) -> float:
    """The mean over the sequences of each one's own unigram entropy, which falls when texts repeat themselves.

    This is the entropy that is usually shown beside the perplexity of samples (Zheng et al. 2024,
    arXiv:2409.02908, in nats a token). At most log2 of the length.

    Args:
        sequences: Words, or token ids, of each text.

    Returns:
        Bits a word (a token); 0 for no text.
    """
    return sum(_entropy(Counter(sequence)) for sequence in sequences) / max(len(sequences), 1)


def _entropy(counts: Counter) -> float:
    total = counts.total()
    return sum(count / total * math.log2(total / count) for count in counts.values())


def distinct_2(sequences: Iterable[Sequence[Hashable]]) -> float:
    """Distinct-2 (Li et al. 2016, arXiv:1510.03055): different pairs of neighbours over all pairs.

    Pairs of all sequences are taken together, so only equal amounts of text are comparable.

    Args:
        sequences: Words, or token ids, of each text.

    Returns:
        A share in (0, 1]; NaN if no text has two words.
    """
    pairs = Counter(itertools.chain.from_iterable(map(itertools.pairwise, sequences)))
    return len(pairs) / pairs.total() if pairs else math.nan


def mean_length(sequences: Sequence[Sequence[Hashable]]) -> float:
    """Words, or tokens, a text."""
    return sum(map(len, sequences)) / max(len(sequences), 1)


class NgramIndex:
    """Which word n-grams occur in the training text. It keeps a 64-bit hash of each: 8 bytes an n-gram.

    Of 10^5 n-grams looked up among 10^6, one in 10^8 evaluations would find one by a collision.
    """

    def __init__(self, texts: Iterable[str], sizes: Sequence[int]):
        """Reads the training text once.

        Args:
            texts: The training texts; n-grams do not go from one to the next.
            sizes: The n to be asked for.
        """
        parts: dict[int, list[np.ndarray]] = {size: [np.zeros(0, np.uint64)] for size in sizes}
        for batch in itertools.batched(texts, _TEXTS_AT_ONCE):
            hashed = _hashed_words(batch)
            for size in sizes:
                parts[size].append(np.unique(_ngram_hashes(*hashed, size)))
        self._known = {size: np.unique(np.concatenate(parts.pop(size))) for size in sizes}

    def overlap(self, texts: Sequence[str]) -> dict[int, float]:
        """The share of the texts' n-grams that occur in the training text, each as often as it is said.

        Args:
            texts: The texts to look up, taken together.

        Returns:
            A share in [0, 1] for each n; NaN if no text has n words.
        """
        hashed = _hashed_words(texts)
        shares = {}
        for size, known in self._known.items():
            wanted = _ngram_hashes(*hashed, size)
            places = np.searchsorted(known, wanted)
            found = known[np.minimum(places, len(known) - 1)] == wanted if len(known) else np.zeros(len(wanted))
            shares[size] = float(found.mean()) if len(wanted) else math.nan
        return shares


def _hashed_words(texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """The words of all texts one after another as uint64 hashes [W], and the number of each one's text [W]."""
    of_text = [words(text) for text in texts]
    # Python's own hash of a string differs from run to run.
    code = {
        word: int.from_bytes(hashlib.blake2b(word.encode("utf-8", "replace"), digest_size=8).digest(), "big")
        for word in set(itertools.chain.from_iterable(of_text))
    }
    lengths = [len(text) for text in of_text]
    hashes = np.fromiter((code[word] for text in of_text for word in text), np.uint64, sum(lengths))
    return hashes, np.repeat(np.arange(len(lengths)), lengths)


def _ngram_hashes(hashes: np.ndarray, text: np.ndarray, size: int) -> np.ndarray:
    """h(w_1 ... w_n) = sum_i h(w_i) b^(n - i) mod 2^64 of the n-grams that lie within one text."""
    count = max(len(hashes) - size + 1, 0)
    result = np.zeros(count, np.uint64)
    for i in range(size):
        result = result * _BASE + hashes[i : i + count]
    return result[text[:count] == text[size - 1 :]] if count else result


def text_statistics(texts: Sequence[str], index: NgramIndex) -> dict[str, float]:
    """All figures of this module for one set of texts.

    Returns:
        `entropy` and `entropy_within_text` (bits a word), `distinct_2`, `mean_words`, and `overlap_2`,
        `overlap_4` and so on for the sizes of the index.
    """
    of_text = [words(text) for text in texts]
    return {
        "entropy": pooled_entropy(of_text),
        "entropy_within_text": mean_entropy(of_text),
        "distinct_2": distinct_2(of_text),
        "mean_words": mean_length(of_text),
        **{f"overlap_{size}": share for size, share in index.overlap(texts).items()},
    }
