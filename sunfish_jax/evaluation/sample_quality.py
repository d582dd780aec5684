"""How good sampled texts are: every figure beside its value for real text and for degenerate texts.

No figure means anything by itself. A repeated word has a low perplexity, a shuffled text keeps its topic, and
copied training text is fluent: a good model is near real text in all rows of the table at once.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from sunfish_jax.data.examples import Example
from sunfish_jax.data.tokens import TokenizedSplit
from sunfish_jax.errors import UserError
from sunfish_jax.evaluation.adherence import AdherenceJudge, prompted_articles
from sunfish_jax.evaluation.degenerate import cut_alike, degenerate_texts
from sunfish_jax.evaluation.judge import Judge
from sunfish_jax.evaluation.text_statistics import NgramIndex, mean_length, text_statistics, words
from sunfish_jax.generation.output import decode, jsonl_writer

# Tokens of a sample where the block holds more: about what an article of the default corpus has.
_MOST_TOKENS = 128
# The columns of the table, in order; the degenerate texts follow.
SAMPLES, REAL = "samples", "real text"
_OVERLAPS = (2, 4, 8)
_UNITS = {
    "perplexity": "SmolLM2, a token",
    "entropy": "bits a word, all texts together",
    "entropy_within_text": "bits a word, mean over texts",
    "distinct_2": "of the pairs of words",
    "mean_words": "words a text, of what is measured here",
    "mean_words_whole": "words a text, before the longer of each pair is cut",
    **{f"overlap_{size}": f"{size}-grams in the training text" for size in _OVERLAPS},
}


class QualityJudge:
    """Measures texts that were written for the prompts of held-out articles, or without, beside the articles.

    What does not depend on the texts is made once: the index of the training text, the classifier, the outside
    model.

    Attributes:
        extent: How many `texts` are judged, `among` how many prompts a text's own is looked for, and of how many
            texts the topic is asked (`with_topic`); the latter two are 0 without prompts.
        missing: Why there is no perplexity; None where there is.
    """

    def __init__(self, train: Sequence[Example], articles: Sequence[Example], real: Sequence[str]):
        """Reads the training text.

        Args:
            train: The training examples.
            articles: Held-out articles, one for each text to be measured. If all have prompts, texts answer them;
                whether they do is asked of the first ones, up to the first prompt that is there again.
            real: The articles' `beginnings`.
        """
        self._train_texts = [example.text for example in train]
        self._real = real
        self._index = NgramIndex(self._train_texts, _OVERLAPS)
        prompts = prompts_of(articles)
        self._told_apart = next((i for i in range(len(prompts)) if prompts[i] in prompts[:i]), len(prompts))
        prompted = None not in prompts and self._told_apart > 1
        self._adherence = AdherenceJudge(train, articles[: self._told_apart]) if prompted else None
        among, with_topic = (self._adherence.among, self._adherence.num_with_topic) if prompted else (0, 0)
        self.extent = {"texts": len(articles), "among": among, "with_topic": with_topic}
        self._judge, self.missing = None, None
        try:
            self._judge = Judge.load()
        except UserError as error:
            self.missing = str(error)

    def figures(self, texts: Sequence[str]) -> dict[str, float]:
        """The figures of one set of texts, one text for each article; NaN where there is nothing to measure."""
        figures = {}
        if self._judge is not None:
            figures["perplexity"] = self._judge.perplexity(texts)
        figures |= text_statistics(texts, self._index)
        if self._adherence is not None:
            adherence = self._adherence(texts[: self._told_apart])
            for name, share in adherence.own.items():
                figures[name] = share
                figures[f"{name}_wrong_prompt"] = adherence.wrong[name]
        return figures

    def beside_real(self, samples: Sequence[str]) -> dict[str, dict[str, float]]:
        """The figures of samples, one for each article, and of real text of the same lengths."""
        return self._table(samples, degenerate=False, progress=lambda name: None)

    def table(
        self, samples: Sequence[str], progress: Callable[[str], None] = lambda name: None
    ) -> dict[str, dict[str, float]]:
        """The same, and those of degenerate texts of the same lengths.

        Args:
            samples: One text for each article.
            progress: Called with the name of each set of texts before it is measured.

        Returns:
            By set of texts, the figures by name.
        """
        return self._table(samples, degenerate=True, progress=progress)

    def _table(self, samples, *, degenerate, progress):
        sets = dict(zip((SAMPLES, REAL), cut_alike(samples, self._real), strict=True))
        whole = {SAMPLES: samples, REAL: self._real}
        if degenerate:
            sets |= degenerate_texts(sets[REAL], self._train_texts)
        table = {}
        for name, texts in sets.items():
            progress(name)
            table[name] = self.figures(texts)
            table[name]["mean_words_whole"] = mean_length([words(text) for text in whole.get(name, texts)])
        return table


def sample_length(block_size: int) -> int:
    """The tokens that a sample to be judged may have."""
    return min(block_size, _MOST_TOKENS)


def beginnings(articles: Sequence[Example], tokenizer, length: int) -> list[str]:
    """As much of each article as a sample of `length` tokens could say."""
    rows = tokenizer([article.text for article in articles], add_special_tokens=False)["input_ids"]
    return [decode(np.array(row[:length], int), tokenizer) for row in rows]


def articles_to_write(examples: Sequence[Example], rows: TokenizedSplit, tokenizer, num: int) -> list[Example]:
    """The held-out articles that samples are to be compared with, one for each sample.

    Those with prompts that tell them apart come first, and then others with the same prompts.

    Args:
        examples: The held-out examples.
        rows: The same, tokenized. Where prompts do not tell any examples apart, some of these are the articles.
        tokenizer: Of the rows.
        num: How many, or all there are.
    """
    rng = np.random.default_rng(0)
    articles = prompted_articles(examples, num)
    if not articles:
        return [Example(decode(rows.row(row), tokenizer)) for row in rng.permutation(rows.num_rows)[:num]]
    there = set(map(id, articles))
    more = [
        example for example in examples if example.prompts and example.text.strip() and id(example) not in there
    ]
    return articles + [more[i] for i in rng.permutation(len(more))[: num - len(articles)]]


def prompts_of(articles: Sequence[Example]) -> list[str | None]:
    """The prompt that a sample is made for, one for each article: its first phrasing, or None for none."""
    return [article.prompts[0] if article.prompts else None for article in articles]


def save_samples(texts: Sequence[str], articles: Sequence[Example], path: Path) -> None:
    """Writes a JSON object a sample, with its prompt; `texts` are of `prompts_of(articles)`."""
    with jsonl_writer(path) as write:
        for prompt, text in zip(prompts_of(articles), texts, strict=True):
            write({"prompt": prompt, "text": text})


def judge_samples(judge: QualityJudge, texts: Sequence[str]) -> dict[str, dict[str, float]]:
    """Prints how good samples are, one for each of the articles that the judge was made for.

    Returns:
        The figures by set of texts and by name, as `QualityJudge.table`.
    """
    table = judge.table(texts, lambda name: print(f"  measuring {name}", flush=True))
    among, with_topic = judge.extent["among"], judge.extent["with_topic"]
    print(f"{len(texts)} texts", end="")
    print(f"; each prompt is looked for among {among}, {with_topic} have a topic" if among else "")
    print(format_table(table))
    if judge.missing:
        print(f"no perplexity: {judge.missing}")
    return table


def format_table(table: Mapping[str, Mapping[str, float]]) -> str:
    """A line for each figure, a column for each set of texts."""
    names = list(next(iter(table.values())))
    width = max(len(name) for name in names)
    columns = {name: max(len(name), 8) for name in table}
    lines = [" " * width + "".join(f"  {name:>{size}}" for name, size in columns.items())]
    for name in names:
        values = "".join(f"  {_number(table[of][name]):>{size}}" for of, size in columns.items())
        unit = f"   ({_UNITS[name]})" if name in _UNITS else ""
        lines.append(f"{name:<{width}}{values}{unit}")
    return "\n".join(lines)


def _number(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 1000 else f"{value:.0f}"
