import math

import pytest

from sunfish_jax.data.examples import Example
from sunfish_jax.errors import UserError
from sunfish_jax.evaluation import sample_quality
from sunfish_jax.evaluation.sample_quality import REAL, SAMPLES, QualityJudge, format_table

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
    return QualityJudge(TRAIN, ARTICLES, prompted=True)


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


def test_real_text_is_cut_to_the_samples_lengths(judge):
    table = judge.table(["the fox", "Madrid is the capital"])
    assert table[REAL]["mean_words"] == table[SAMPLES]["mean_words"] == 3.0


def test_without_prompts_and_without_the_outside_model(monkeypatch):
    def missing():
        raise UserError("it is not installed")

    monkeypatch.setattr(sample_quality.Judge, "load", missing)
    judge = QualityJudge(TRAIN, ARTICLES, prompted=False)
    assert judge.missing == "it is not installed"
    assert judge.among is None
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
