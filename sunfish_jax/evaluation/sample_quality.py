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
from sunfish_jax.evaluation.degenerate import cut_like, degenerate_texts
from sunfish_jax.evaluation.judge import Judge
from sunfish_jax.evaluation.text_statistics import NgramIndex, text_statistics
from sunfish_jax.generation.output import decode, jsonl_writer

SAMPLES_FILE = "eval_samples.jsonl"
# Texts are measured at this length or the block's, in tokens: about what an article of the default corpus has.
SAMPLE_LENGTH = 128
# The columns of the table, in order; the degenerate texts follow.
SAMPLES, REAL = "samples", "real text"
_OVERLAPS = (2, 4, 8)
_UNITS = {
    "perplexity": "SmolLM2, a token",
    "entropy": "bits a word, all texts together",
    "entropy_within_text": "bits a word, mean over texts",
    "distinct_2": "of the pairs of words",
    "mean_words": "words a text",
    **{f"overlap_{size}": f"{size}-grams in the training text" for size in _OVERLAPS},
}


class QualityJudge:
    """Measures texts that were written for the prompts of held-out articles, or without a prompt.

    What does not depend on the texts is made once: the index of the training text, the classifier, the outside
    model.

    Attributes:
        among: How many prompts a text's own is looked for among; None without prompts.
        missing: Why there is no perplexity; None where there is.
    """

    def __init__(self, train: Sequence[Example], articles: Sequence[Example], *, prompted: bool):
        """Reads the training text.

        Args:
            train: The training examples.
            articles: Held-out articles, one for each text to be measured.
            prompted: Whether the texts answer the articles' prompts.
        """
        self._train_texts = [example.text for example in train]
        self._real = [article.text for article in articles]
        self._index = NgramIndex(self._train_texts, _OVERLAPS)
        self._adherence = AdherenceJudge(train, articles) if prompted else None
        self.among = self._adherence.among if self._adherence else None
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
            adherence = self._adherence(texts)
            for name, share in adherence.own.items():
                figures[name] = share
                figures[f"{name}_wrong_prompt"] = adherence.wrong[name]
        return figures

    def table(
        self, samples: Sequence[str], progress: Callable[[str], None] = lambda name: None
    ) -> dict[str, dict[str, float]]:
        """The figures of the samples, of the real articles cut to their lengths, and of degenerate texts.

        Args:
            samples: One text for each article.
            progress: Called with the name of each set of texts before it is measured.

        Returns:
            By set of texts, the figures by name.
        """
        real = cut_like(self._real, samples)
        sets = {SAMPLES: list(samples), REAL: real, **degenerate_texts(real, self._train_texts)}
        table = {}
        for name, texts in sets.items():
            progress(name)
            table[name] = self.figures(texts)
        return table


def articles_to_write(examples: Sequence[Example], rows: TokenizedSplit, tokenizer, num: int) -> list[Example]:
    """The held-out articles that samples are to be compared with, one for each sample.

    Args:
        examples: The held-out examples.
        rows: The same, tokenized. Where prompts do not tell the examples apart, some of these are the articles.
        tokenizer: Of the rows.
        num: How many, or all there are.
    """
    if articles := prompted_articles(examples, num):
        return articles
    chosen = np.random.default_rng(0).permutation(rows.num_rows)[:num]
    return [Example(decode(rows.row(row), tokenizer)) for row in chosen]


def prompts_of(articles: Sequence[Example]) -> list[str | None]:
    """The prompt that a sample is made for, one for each article: its first phrasing, or None for none."""
    return [article.prompts[0] if article.prompts else None for article in articles]


def judge_samples(
    texts: Sequence[str], train: Sequence[Example], articles: Sequence[Example], path: Path
) -> dict[str, dict[str, float]]:
    """Saves samples and prints how good they are.

    Args:
        texts: One sample for each of `prompts_of(articles)`.
        train: The training examples.
        articles: As `articles_to_write` gives them.
        path: Gets a JSON object a sample, with its prompt.

    Returns:
        The figures by set of texts and by name, as `QualityJudge.table`.
    """
    prompts = prompts_of(articles)
    with jsonl_writer(path) as write:
        for prompt, text in zip(prompts, texts, strict=True):
            write({"prompt": prompt, "text": text})
    judge = QualityJudge(train, articles, prompted=None not in prompts)
    table = judge.table(texts, lambda name: print(f"  measuring {name}", flush=True))
    print(f"{len(texts)} texts", end="")
    print(f"; each prompt is looked for among {judge.among}" if judge.among else "")
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
