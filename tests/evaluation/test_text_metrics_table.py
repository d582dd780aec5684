"""No bad text does well on the whole table: each degenerate sampler is found out, and by the figure made for it.

On real text: some hundred articles of the default corpus.
"""

import functools
import json

import numpy as np
import pytest

from sunfish_jax.data.corpus import corpus_file
from sunfish_jax.data.examples import Example
from sunfish_jax.data.prompts import article_prompts
from sunfish_jax.evaluation.degenerate import cut, degenerate_texts
from sunfish_jax.evaluation.sample_quality import QualityJudge
from sunfish_jax.evaluation.text_statistics import words

# Held-out texts are 29 of at most 32 tokens: the judge takes them in one batch.
NUM_ARTICLES, HELD_OUT_EVERY, NUM_WORDS = 1000, 32, 15

# A figure is a flaw below this share of real text's. Too little overlap is a salad of words, too much is copying.
TOO_LOW = {
    "entropy": 0.8,
    "entropy_within_text": 0.8,
    "distinct_2": 0.8,
    "overlap_2": 0.6,
    "minilm_top_1": 0.5,
    "minilm_top_10": 0.7,
    "tfidf_top_1": 0.5,
    "tfidf_top_10": 0.7,
    "topic_accuracy": 0.7,
    "mean_words_whole": 0.7,
}
TOO_PERPLEXING = 3.0
TOO_MUCH_COPIED = 0.5
VARIETY = {"entropy", "entropy_within_text", "distinct_2"}
ADHERENCE = {name for name in TOO_LOW if "top" in name}  # Top 1, top 10 and the topic.


@pytest.fixture(scope="module")
def examples():
    articles = list(json.loads(corpus_file().read_text(encoding="utf-8")).items())
    return [
        Example(a["extract"], article_prompts(title, a["description"], a["topic"]), a["topic"])
        for title, a in articles[:: len(articles) // NUM_ARTICLES]
        if a["topic"] != "Uncategorized"
    ]


@pytest.fixture(scope="module")
def train(examples):
    return [example for i, example in enumerate(examples) if i % HELD_OUT_EVERY]


@pytest.fixture(scope="module")
def held_out(examples):
    return examples[::HELD_OUT_EVERY]  # The corpus is sorted by topic.


@pytest.fixture(scope="module")
def real(held_out):
    return [cut(example.text, NUM_WORDS) for example in held_out]


@pytest.fixture(scope="module")
def beside_real(train, held_out, real):
    """The figures of a set of texts and of real text beside them, by name."""
    pytest.importorskip("gguf", reason="the extra `judge` is not installed")
    judge = QualityJudge(train, held_out, real)
    figures = judge.figures
    # The tests measure the same real text, most of them uncut.
    once = functools.cache(lambda *texts: figures(texts))
    judge.figures = lambda texts: dict(once(*texts))
    return judge.beside_real


@pytest.fixture(scope="module")
def flaws(beside_real):
    """The figures on which a set of texts is clearly worse than real text."""

    def find(texts):
        figures, of_real = beside_real(texts).values()
        flaws = {name for name, share in TOO_LOW.items() if figures[name] < share * of_real[name]}
        flaws |= {name for name in ("overlap_4", "overlap_8") if figures[name] > of_real[name] + TOO_MUCH_COPIED}
        return flaws | ({"perplexity"} if figures["perplexity"] > TOO_PERPLEXING * of_real["perplexity"] else set())

    return find


@pytest.fixture(scope="module")
def degenerate(real, train):
    return degenerate_texts(real, [example.text for example in train])


def test_what_the_same_articles_say_next_has_no_flaw(flaws, held_out, real):
    assert flaws([example.text[len(text) :] for example, text in zip(held_out, real, strict=True)]) == set()


def test_words_of_other_real_texts_are_perplexing_and_about_nothing(flaws, held_out):
    rng = np.random.default_rng(0)
    everything = [word for example in held_out for word in words(example.text)]
    found = flaws([" ".join(rng.choice(everything, NUM_WORDS)) for _ in held_out])
    assert found >= {"perplexity", "overlap_2", "tfidf_top_1", "minilm_top_1", "topic_accuracy"}


def test_shuffled_words_are_only_found_by_their_order(flaws, degenerate):
    assert flaws(degenerate["shuffled words"]) == {"overlap_2", "perplexity"}


def test_one_word_repeated_has_no_variety(flaws, degenerate):
    found = flaws(degenerate["one word repeated"])
    assert found > VARIETY | {"overlap_2"}
    assert found & ADHERENCE
    assert "perplexity" not in found, "what it fools"


def test_the_prompt_repeated_has_no_variety_either(flaws, held_out):
    found = flaws([" ".join([example.prompts[0]] * NUM_WORDS) for example in held_out])
    assert found >= {"entropy_within_text", "distinct_2"}
    assert "minilm_top_1" not in found, "what it fools"


def test_training_text_is_copied_and_about_something_else(flaws, degenerate):
    assert flaws(degenerate["training text"]) == {"overlap_4", "overlap_8"} | ADHERENCE


def test_one_good_text_for_every_prompt_lacks_variety_over_all(flaws, real):
    found = flaws([real[0]] * len(real))
    assert found >= {"entropy", "distinct_2", "minilm_top_1", "tfidf_top_1", "topic_accuracy"}
    assert "entropy_within_text" not in found


def test_the_title_alone_is_too_short(flaws, held_out):
    """As good as real text of its length, or nearly; real text is longer."""
    assert "mean_words_whole" in flaws([example.prompts[0] for example in held_out])


def test_nothing_at_all_is_not_adherent(beside_real, held_out):
    figures, _ = beside_real([""] * len(held_out)).values()
    assert figures["mean_words"] == figures["mean_words_whole"] == figures["entropy"] == 0
    assert figures["tfidf_top_1"] == pytest.approx(1 / len(held_out))
    assert figures["minilm_top_1"] < 0.1
