import math

import pytest

from sunfish_jax.data.examples import Example
from sunfish_jax.data.tokenizer import train_tokenizer
from sunfish_jax.errors import UserError
from sunfish_jax.evaluation import sample_quality
from sunfish_jax.evaluation.sample_quality import (
    REAL,
    SAMPLES,
    QualityJudge,
    articles_to_write,
    beginnings,
    format_table,
)

TRAIN = [
    Example("The dog is a domestic animal that barks at night.", ("Dog",), "animals"),
    Example("The wolf is a wild animal that howls at night.", ("Wolf",), "animals"),
    Example("Rome is the capital and largest city of Italy.", ("Rome",), "cities"),
    Example("Paris is the capital and largest city of France.", ("Paris",), "cities"),
]
ARTICLES = [
    Example("The fox is a wild animal with a long tail.", ("Fox",), "animals"),
    Example("Madrid is the capital and largest city of Spain.", ("Madrid",), "cities"),
]


class LengthJudge:
    """Finds a text the more likely the shorter its words are."""

    def perplexity(self, texts):
        words = " ".join(texts).split()
        return sum(map(len, words)) / len(words)


@pytest.fixture
def judge(monkeypatch):
    monkeypatch.setattr(sample_quality.Judge, "load", LengthJudge)
    return QualityJudge(TRAIN, ARTICLES, [article.text for article in ARTICLES])


def test_every_set_of_texts_has_every_figure(judge):
    seen = []
    samples = ["the fox is a wild animal", "Rome is the capital and largest city of Italy."]
    table = judge.table(samples, seen.append)
    assert seen == list(table) == [SAMPLES, REAL, "shuffled words", "one word repeated", "training text"]
    assert len({tuple(figures) for figures in table.values()}) == 1
    # Of the samples only the one that is copied has eight words.
    assert table[SAMPLES]["overlap_8"] == 1.0
    assert table["training text"]["overlap_4"] == 1.0
    assert table["one word repeated"]["distinct_2"] < table[REAL]["distinct_2"]
    assert table["shuffled words"]["overlap_2"] < table[REAL]["overlap_2"]
    assert table[REAL]["topic_accuracy"] == 1.0
    assert table[REAL]["topic_accuracy_wrong_prompt"] == 0.0
    assert table[SAMPLES]["perplexity"] == pytest.approx((19 + 38) / (6 + 9))


def test_the_longer_of_a_sample_and_its_article_is_cut_and_whole_lengths_are_told(judge):
    samples = ["the fox", "Madrid is the capital and largest city of Spain and has many parks"]
    table = judge.table(samples)
    assert table[REAL]["mean_words"] == table[SAMPLES]["mean_words"] == (2 + 9) / 2
    assert table[REAL]["mean_words_whole"] == (10 + 9) / 2
    assert table[SAMPLES]["mean_words_whole"] == (2 + 13) / 2
    assert table["shuffled words"]["mean_words_whole"] == table["shuffled words"]["mean_words"] == (2 + 9) / 2
    assert judge.beside_real(samples) == {name: table[name] for name in (SAMPLES, REAL)}


def test_a_title_alone_is_told_by_its_length(judge):
    """In everything else it is like real text as short as it."""
    of_titles, of_real = judge.beside_real(["The fox", "Madrid is"]).values()
    differ = {name for name in of_real if of_titles[name] < 0.7 * of_real[name]}
    assert differ == {"mean_words_whole"}


def test_real_text_has_as_many_tokens_as_a_sample():
    tokenizer = train_tokenizer([example.text for example in TRAIN], 300)
    (fox, madrid) = beginnings(ARTICLES, tokenizer, 9)
    assert ARTICLES[0].text.startswith(fox) and ARTICLES[1].text.startswith(madrid)
    assert len(tokenizer(fox)["input_ids"]) == 9
    assert beginnings(ARTICLES, tokenizer, 999) == [article.text for article in ARTICLES]


def test_as_many_texts_are_written_as_are_asked_for_though_prompts_are_few():
    moods = [Example(f"text {i}", ("glad" if i % 3 else "sad",)) for i in range(12)]
    articles = articles_to_write(moods, None, None, 7)
    assert len({article.text for article in articles}) == 7
    assert {articles[0].prompts, articles[1].prompts} == {("glad",), ("sad",)}
    assert len(articles_to_write(moods, None, None, 99)) == 12


def test_whether_prompts_are_kept_to_is_asked_where_they_differ(judge):
    again = [*ARTICLES, ARTICLES[0]]
    more = QualityJudge(TRAIN, again, [article.text for article in again])
    assert more.extent == {"texts": 3, "among": 2, "with_topic": 2}
    texts = ["a fox", "a city of Spain", "London " * 9]
    of_three, of_two = more.figures(texts), judge.figures(texts[:2])
    assert of_three["entropy"] != of_two["entropy"]
    for name in ("minilm_top_1", "tfidf_top_1", "topic_accuracy"):
        assert of_three[name] == of_two[name]


def test_without_prompts_and_without_the_outside_model(monkeypatch):
    def missing():
        raise UserError("it is not installed")

    monkeypatch.setattr(sample_quality.Judge, "load", missing)
    untitled = [Example(article.text) for article in ARTICLES]
    judge = QualityJudge(TRAIN, untitled, [article.text for article in untitled])
    assert judge.missing == "it is not installed"
    assert judge.extent == {"texts": 2, "among": 0, "with_topic": 0}
    assert not {"perplexity", "topic_accuracy", "minilm_top_1"} & set(judge.figures(["a fox", "a city"]))


def test_the_table_has_a_line_for_each_figure_and_lines_up():
    table = {
        SAMPLES: {"perplexity": 123.456, "overlap_8": math.nan},
        REAL: {"perplexity": 1234.5, "overlap_8": 0.5},
    }
    head, *lines = format_table(table).splitlines()
    assert head.split() == ["samples", "real", "text"]
    assert [line.split()[:3] for line in lines] == [["perplexity", "123.5", "1234"], ["overlap_8", "-", "0.500"]]
    assert len({len(line.split("   (")[0]) for line in lines} | {len(head)}) == 1
