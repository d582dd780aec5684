"""Prompt adherence: is a text about what it was asked for?

Three judges, none of which reads word order much: shuffled words do as well as a text. MiniLM also feeds the model,
so it must not be the only one.

- Retrieval by MiniLM: how often is a text nearer to its own prompt than to other held-out prompts, by the cosine of
  sentence embeddings?
- Retrieval by TF-IDF: the same, with the real article of each prompt in the prompt's place. (Real text is cut from
  that very article, and scores 1 by nature.)
- Topic accuracy: how often does a classifier trained on the real articles find the topic of the prompt's article?
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from sunfish_jax.data.examples import Example
from sunfish_jax.evaluation.text_statistics import words

# A text is looked for among this many prompts, or all where there are fewer.
AMONG = 100
TOP = (1, 10)
# MiniLM reads the beginning of a longer text. It was trained on texts of up to 128 tokens (its model card).
MINILM_TOKENS = 128


def prompted_articles(examples: Sequence[Example], num: int, seed: int = 0) -> list[Example]:
    """Draws articles whose prompts tell them apart; an article's prompt is the first of its phrasings.

    The first phrasing is the title in the default corpus. Of articles with the same one, the first alone is taken.

    Args:
        examples: The held-out examples.
        num: How many to draw; all that have a prompt, where there are fewer.
        seed: Of the draw.

    Returns:
        The examples in random order; an empty list where prompts are missing or all the same.
    """
    by_prompt: dict[str, Example] = {}
    for example in examples:
        if example.prompts and example.text.strip():
            by_prompt.setdefault(example.prompts[0], example)
    articles = list(by_prompt.values())
    if len(articles) < 2:
        return []
    return [articles[i] for i in np.random.default_rng(seed).permutation(len(articles))[:num]]


@dataclasses.dataclass(frozen=True)
class Adherence:
    """Shares in [0, 1], by name: `minilm_top_1`, `minilm_top_10`, `tfidf_top_1`, `tfidf_top_10`, `topic_accuracy`.

    What cannot be asked of a corpus (it has no topics, or ten prompts at most to be in the top ten of) is left out.
    The standard error of a share p of n texts is sqrt(p (1 - p) / n), at most 0.031 for 256.

    Attributes:
        own: Each text judged by its own prompt.
        wrong: Each text judged by every prompt but its own. Topic accuracy is then what the most frequent topics
            give for nothing. Retrieval follows from `own` by counting: what is not in a place is in another, so it
            is 1 % and 10 % of 100 for texts that ignore their prompts, and less the better texts keep to them.
    """

    own: dict[str, float]
    wrong: dict[str, float]


class AdherenceJudge:
    """Judges texts written for the prompts of held-out articles. What does not depend on the texts is made once.

    Attributes:
        among: How many prompts a text's own is looked for among.
        num_with_topic: How many of the texts topic accuracy is measured on.
    """

    def __init__(self, train: Sequence[Example], articles: Sequence[Example]):
        """Fits TF-IDF, and the classifier if there are two topics or more, on the training articles.

        Args:
            train: The training examples.
            articles: As `prompted_articles` gives them.
        """
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.svm import LinearSVC

        self.among = min(AMONG, len(articles))
        self._vectorizer = TfidfVectorizer(analyzer=words, sublinear_tf=True)
        train_features = self._vectorizer.fit_transform(example.text for example in train)
        self._articles = self._vectorizer.transform(article.text for article in articles)
        self._prompts = minilm_embeddings([article.prompts[0] for article in articles])

        labelled = np.array([i for i, example in enumerate(train) if example.topic is not None], int)
        topics = [train[i].topic for i in labelled]
        known = {article.topic for article in articles} & set(topics)
        self._with_topic = [i for i, article in enumerate(articles) if article.topic in known]
        self._topics = np.array([articles[i].topic for i in self._with_topic])
        # Two, so that there is a wrong prompt to compare with.
        enough = len(set(topics)) > 1 and len(self._with_topic) > 1
        self.num_with_topic = len(self._with_topic) if enough else 0
        if self.num_with_topic:
            # Right of the default corpus's training articles, in 3-fold cross-validation: 0.897 (0.889 at C = 0.3);
            # 0.891 by logistic regression, at C = 10; 0.902 with pairs of words too, at four times the time.
            self._classifier = LinearSVC(random_state=0).fit(train_features[labelled], topics)

    def __call__(self, texts: Sequence[str]) -> Adherence:
        """Judges one text for each article, in the same order."""
        features = self._vectorizer.transform(texts)
        similarities = {
            "minilm": minilm_embeddings(texts) @ self._prompts.T,
            "tfidf": (features @ self._articles.T).toarray(),
        }
        hits = {}
        for name, similarity in similarities.items():
            for top in TOP:
                if top < self.among:
                    hits[f"{name}_top_{top}"] = retrieved(similarity, top, self.among)
        if self.num_with_topic:
            predicted = self._classifier.predict(features[self._with_topic])
            hits["topic_accuracy"] = predicted[:, None] == self._topics
        return Adherence(
            own={name: float(np.diagonal(hit).mean()) for name, hit in hits.items()},
            wrong={name: off_diagonal_mean(hit) for name, hit in hits.items()},
        )


def retrieved(similarity: np.ndarray, top: int, among: int) -> np.ndarray:
    """The probability that a prompt is among the `top` most similar ones to a text.

    It is asked of a prompt and `among` - 1 others drawn at random, ties being broken at random; this is the exact
    mean over all draws. If b of the other prompts are more similar than prompt j, so many of those drawn are
    hypergeometric, and j is found when that is less than `top`.

    Args:
        similarity: `[n, m]`, of n texts to m prompts.
        top: Less than `among`.
        among: At most m.

    Returns:
        `[n, m]`, for each text and each prompt.
    """
    from scipy.stats import hypergeom

    m = similarity.shape[1]
    found = hypergeom.cdf(top - 1, m - 1, np.arange(m), among - 1)  # [m], by b
    total = np.concatenate([[0.0], np.cumsum(found)])
    result = np.empty(similarity.shape)
    for row, similar in zip(result, similarity, strict=True):
        increasing = np.sort(similar)
        better = m - np.searchsorted(increasing, similar, side="right")
        not_worse = m - np.searchsorted(increasing, similar, side="left")  # Prompt j itself is one of them.
        row[:] = (total[not_worse] - total[better]) / (not_worse - better)
    return result


def off_diagonal_mean(square: np.ndarray) -> float:
    """The mean of a matrix [n, n] over all places but the diagonal."""
    n = len(square)
    return float((square.sum() - np.trace(square)) / (n * (n - 1)))


def minilm_embeddings(texts: Sequence[str]) -> np.ndarray:
    """Sentence embeddings of all-MiniLM-L6-v2, `[n, 384]`, whose products are cosines.

    Of a text that is longer than `MINILM_TOKENS` tokens the beginning is read.
    """
    from sunfish_jax.models.minilm import mean_pool

    encoder = _minilm()
    tokens, mask = encoder.tokenize(texts)
    return mean_pool(encoder.encode(tokens, mask), mask)


@functools.cache
def _minilm():
    from ml_collections import ConfigDict

    from sunfish_jax.models.prompt_encoder import make_prompt_encoder

    return make_prompt_encoder(ConfigDict({"name": "minilm", "max_length": MINILM_TOKENS}))
