import itertools

import numpy as np
import pytest

from sunfish_jax.data.examples import Example
from sunfish_jax.evaluation.adherence import (
    AdherenceJudge,
    minilm_embeddings,
    off_diagonal_mean,
    prompted_articles,
    retrieved,
)


def test_among_all_prompts_it_is_the_rank():
    similarity = np.array([[0.9, 0.5, 0.1], [0.2, 0.3, 0.4]])
    np.testing.assert_allclose(retrieved(similarity, 1, 3), [[1, 0, 0], [0, 0, 1]])
    np.testing.assert_allclose(retrieved(similarity, 2, 3), [[1, 1, 0], [0, 1, 1]])


@pytest.mark.parametrize("top", [1, 2, 3])
@pytest.mark.parametrize("among", [4, 5, 7])
def test_it_is_the_mean_over_all_draws_and_all_ways_to_break_ties(top, among):
    similarity = np.array([0.5, 0.3, 0.3, 0.9, 0.3, 0.1, 0.5])
    ours = retrieved(similarity[None], top, among)[0]
    for own in range(len(similarity)):
        others = [j for j in range(len(similarity)) if j != own]
        hits = []
        for drawn in itertools.combinations(others, among - 1):
            better = sum(similarity[j] > similarity[own] for j in drawn)
            tied = sum(similarity[j] == similarity[own] for j in drawn)
            # Own prompt comes before 0, 1 ... or all of those that it ties with, each as likely.
            hits.append(np.mean([better + before < top for before in range(tied + 1)]))
        assert ours[own] == pytest.approx(np.mean(hits)), own


def test_a_text_without_a_clue_is_at_chance():
    np.testing.assert_allclose(retrieved(np.zeros((2, 256)), 10, 100), 0.1)


def test_off_diagonal_mean():
    assert off_diagonal_mean(np.array([[9, 1, 2], [3, 9, 4], [5, 6, 9]])) == pytest.approx(21 / 6)


def test_minilm_embeddings_are_sentence_transformers():
    dog, puppy, quantum = minilm_embeddings(["a dog", "a puppy", "quantum mechanics"])
    assert dog @ puppy == pytest.approx(0.769, abs=1e-3)
    assert dog @ quantum == pytest.approx(0.195, abs=1e-3)


def test_minilm_reads_the_beginning_of_a_long_text():
    beginning = "dog " * 126  # Two more tokens are BERT's own.
    one, two, shorter = minilm_embeddings([beginning + "quantum mechanics", beginning, "dog " * 125 + "quantum"])
    np.testing.assert_array_equal(one, two)
    assert one @ shorter < 0.9999


def test_prompted_articles_can_be_told_apart():
    examples = [Example(f"text {i}", (f"title {i % 40}", "the same")) for i in range(60)]
    examples += [Example("no prompt"), Example(" ", ("blank",))]
    drawn = prompted_articles(examples, 30)
    assert len({example.prompts[0] for example in drawn}) == len(drawn) == 30
    assert drawn == prompted_articles(examples, 30) != prompted_articles(examples, 30, seed=1)
    everything = prompted_articles(examples, 100)
    assert {example.text for example in everything} == {f"text {i}" for i in range(40)}
    assert everything[:30] == drawn, "more articles begin with the same ones"
    assert prompted_articles([Example("text")] * 5, 3) == []
    assert prompted_articles([Example("a", ("write",)), Example("b", ("write",))], 3) == []


# Articles in which a noun and a topic's words are all that tells one from another.
NOUNS = {
    "animals": ["dog", "cat", "horse", "whale", "eagle", "frog"],
    "music": ["piano", "violin", "opera", "drum", "guitar", "choir"],
}
PHRASES = {
    "animals": "The {} is an animal that lives with its young and eats plants or other animals.",
    "music": "The {} is heard in concerts, where musicians play melodies by many composers.",
}


def article(noun, topic):
    return Example(PHRASES[topic].format(noun), (noun, f"Write about {noun}"), topic)


HELD_OUT = [article(noun, topic) for topic, nouns in NOUNS.items() for noun in nouns]
# The training articles have the held-out nouns in them, as those of a large corpus would.
TRAIN = [
    Example(f"{PHRASES[topic].format('other')} Not unlike a {noun}.", (f"no {noun}",), topic)
    for topic, nouns in NOUNS.items()
    for noun in nouns
]


@pytest.fixture(scope="module")
def judge():
    return AdherenceJudge(TRAIN, HELD_OUT)


def test_real_text_answers_its_prompt(judge):
    assert (judge.among, judge.num_with_topic) == (12, 12)
    adherence = judge([example.text for example in HELD_OUT])
    assert adherence.own == pytest.approx(
        {"minilm_top_1": 1, "minilm_top_10": 1, "tfidf_top_1": 1, "tfidf_top_10": 1, "topic_accuracy": 1}
    )
    # Nobody else's prompt is first; of 11 others 9 are in the top ten; 5 have the same topic.
    assert adherence.wrong == pytest.approx(
        {
            "minilm_top_1": 0,
            "minilm_top_10": 9 / 11,
            "tfidf_top_1": 0,
            "tfidf_top_10": 9 / 11,
            "topic_accuracy": 5 / 11,
        }
    )


def test_text_for_other_prompts_does_not(judge):
    half = len(HELD_OUT) // 2
    texts = [example.text for example in HELD_OUT]
    other_topic = judge(texts[half:] + texts[:half])
    assert {other_topic.own[name] for name in ("minilm_top_1", "tfidf_top_1", "topic_accuracy")} == {0}
    next_one = judge(texts[1:half] + texts[:1] + texts[half + 1 :] + texts[half : half + 1])
    assert (next_one.own["minilm_top_1"], next_one.own["tfidf_top_1"]) == (0, 0)
    assert next_one.own["topic_accuracy"] == 1


def test_one_judge_may_be_convinced_without_the_other(judge):
    # A synonym is near to its prompt by meaning, and shares no word with the article.
    texts = [example.text for example in HELD_OUT]
    texts[0] = "puppy"
    adherence = judge(texts)
    assert adherence.own["minilm_top_1"] == 1
    # No word is known: a tie among all twelve.
    assert adherence.own["tfidf_top_1"] == pytest.approx((11 + 1 / 12) / 12)


def test_topics_that_are_not_known_do_not_count():
    held_out = [HELD_OUT[0], Example("A mat.", ("mat",), "furniture"), Example("A rug.", ("rug",)), HELD_OUT[-1]]
    judge = AdherenceJudge(TRAIN, held_out)
    assert judge.num_with_topic == 2
    adherence = judge([HELD_OUT[0].text, "A mat.", "A rug.", HELD_OUT[0].text])
    assert adherence.own["topic_accuracy"] == 0.5
    assert adherence.wrong["topic_accuracy"] == 0.5
    assert "minilm_top_10" not in adherence.own, "among four prompts, all are in the top ten"


def test_one_article_alone_cannot_be_judged():
    # No prompt is wrong then.
    adherence = AdherenceJudge(TRAIN, HELD_OUT[:1])([HELD_OUT[0].text])
    assert adherence.own == adherence.wrong == {}
    with_topic_and_without = AdherenceJudge(TRAIN, [HELD_OUT[0], Example("A mat.", ("mat",), "furniture")])
    adherence = with_topic_and_without([HELD_OUT[0].text, "A mat."])
    assert adherence.own.keys() == adherence.wrong.keys() == {"minilm_top_1", "tfidf_top_1"}


def test_without_topics_there_is_no_topic_accuracy():
    untitled = [Example(example.text, example.prompts) for example in TRAIN]
    of_one_topic = [Example(example.text, example.prompts, "all") for example in TRAIN]
    for train in (untitled, of_one_topic):
        judge = AdherenceJudge(train, [Example(e.text, e.prompts, "all") for e in HELD_OUT[:3]])
        assert judge.num_with_topic == 0
        assert set(judge([e.text for e in HELD_OUT[:3]]).own) == {"minilm_top_1", "tfidf_top_1"}
