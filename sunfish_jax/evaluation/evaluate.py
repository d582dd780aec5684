"""What a trained model of text is measured by, whatever it is: the denoiser, or another to compare it with."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from ml_collections import ConfigDict

from sunfish_jax.data.examples import Example
from sunfish_jax.data.padded_rows import PaddedBatch
from sunfish_jax.data.sources import Source
from sunfish_jax.data.tokens import TokenizedSplit, log_frequencies
from sunfish_jax.diffusion.samplers import Known
from sunfish_jax.errors import UserError
from sunfish_jax.evaluation.bound import BitsPerByte
from sunfish_jax.evaluation.infill_accuracy import infill_accuracy, infill_table
from sunfish_jax.evaluation.report import Report
from sunfish_jax.evaluation.sample_quality import (
    QualityJudge,
    articles_to_write,
    beginnings,
    judge_samples,
    prompts_of,
    sample_length,
    save_samples,
)
from sunfish_jax.evaluation.text_rows import REFERENCES, TextRows, likelihood_texts
from sunfish_jax.generation.gaps import ANY, allowed_tokens
from sunfish_jax.models.prompt import Prompt
from sunfish_jax.models.prompt_encoder import PromptEncoder
from sunfish_jax.workdir.progress import Progress


class Subject(Protocol):
    """A trained model of text.

    Attributes:
        workdir: Its folder.
        config: The configuration that it was trained with.
        tokenizer: Of its texts.
        prompt_encoder: Of its prompts.
        params: Its parameters, the tokens' `log_unigram` [V] among them.
        progress: Steps, time and tokens of its training up to this checkpoint.
        settings: A dataclass of how it samples: `scheduler`, `num_steps`, `guidance_scale`, `temperature`.
        likelihood_name: What `likelihood` is.
        filling: How gaps are filled, in words.
    """

    workdir: Path
    config: ConfigDict
    tokenizer: Any
    prompt_encoder: PromptEncoder
    params: Mapping
    progress: Progress
    settings: Any
    likelihood_name: str
    filling: str

    def held_out(self, text: TextRows) -> dict[str, float]:
        """Prints and returns what is measured in training too."""

    def likelihood(self, text: TextRows, rough: bool) -> BitsPerByte:
        """Of some rows; roughly if it is only there to compare with."""

    def fill(self, known: Known, prompt: Prompt, keys: jax.Array) -> np.ndarray:
        """Fills gaps in rows with the likeliest words: `infill_accuracy` says how."""

    def write(self, prompts: Sequence[str | None], length: int) -> list[str]:
        """One text of at most `length` tokens for each prompt; text i is sample i."""


def evaluate(
    subject: Subject, source: Source, splits: Mapping[str, TokenizedSplit], split: str, num_samples: int
) -> dict[str, Any]:
    """Prints what was measured, and writes it, samples included, to `eval_SPLIT*` in the workdir.

    Args:
        subject: What is measured.
        source: The corpus.
        splits: The same, tokenized.
        split: `validation` or `test`.
        num_samples: Texts to sample, fewer where there are fewer held-out prompts; 0 for none.

    Returns:
        What is written to `eval_SPLIT.json`.

    Raises:
        UserError: The split is empty.
    """
    config, texts = subject.config, splits[split]
    if not texts.num_rows:
        raise UserError(f"--split={split}: the corpus has no {split} text; give the other one")
    progress, params = subject.progress, subject.params
    report = Report(subject.workdir, split, progress.step)
    report.result |= {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)) - params["log_unigram"].size,
        "dropout": config.model.dropout,
        "training_seconds": progress.seconds,
        "training_tokens": progress.real_tokens,
    }
    print(f"step {progress.step}, {split} text", flush=True)
    with report.section("held-out cross-entropy") as result:
        held_out = TextRows.of(texts, config.eval.num_rows, config, subject.prompt_encoder)
        result["held_out"] = subject.held_out(held_out)
    scored = likelihood_texts(splits, split, config, subject.prompt_encoder)
    # Of this corpus: a model that began from another run's weights has those of that run's.
    log_unigram = log_frequencies(splits["train"].token_counts(len(subject.tokenizer)))
    with report.section("gaps") as result:
        result["infill_accuracy"] = infill_figures(subject, held_out.rows, log_unigram)
    with report.section(subject.likelihood_name) as result:
        result["bits_per_byte"] = likelihood_figures(subject, scored, log_unigram)
    if num_samples:
        with report.section("samples") as result:
            result["sampling"] = dataclasses.asdict(subject.settings)
            articles = articles_to_write(list(source.examples(split)), texts, subject.tokenizer, num_samples)
            samples_file = subject.workdir / f"eval_{split}_samples.jsonl"
            result["judged"], result["samples"] = sample_figures(subject, source, articles, samples_file)
    report.log()
    return report.result


def infill_figures(subject: Subject, rows: Sequence[PaddedBatch], log_unigram: np.ndarray) -> dict[str, dict]:
    """Prints and returns how often gaps of each size are filled right, and how often by the most frequent token."""
    print(subject.filling)
    words = allowed_tokens(subject.tokenizer, len(log_unigram))[ANY]
    # No end of text stands in a gap, though it may be the most frequent token.
    most_frequent = int(np.argmax(np.where(words, log_unigram, -np.inf)))
    accuracies = infill_accuracy(subject.fill, rows, most_frequent)
    print(infill_table(accuracies))
    return {str(size): dataclasses.asdict(accuracy) for size, accuracy in accuracies.items()}


def likelihood_figures(subject: Subject, texts: Mapping[str, TextRows], log_unigram: np.ndarray) -> dict[str, dict]:
    """Prints and returns the likelihood of each of `likelihood_texts`, and what frequencies alone would reach."""
    result = {}
    for name, text in texts.items():
        figure = subject.likelihood(text, rough=name in REFERENCES)
        print(f"{name}: {figure}", flush=True)
        result[name.replace(" ", "_")] = dataclasses.asdict(figure)
    value = texts["with prompt"].bits_per_byte_by_frequency(log_unigram)
    print(f"by the tokens' frequencies alone: {value:.3f} bits per byte", flush=True)
    return result | {"frequencies": {"value": value}}


def sample_figures(
    subject: Subject, source: Source, articles: Sequence[Example], samples_file: Path
) -> tuple[dict[str, int], dict[str, dict[str, float]]]:
    """Samples a text for each of some held-out articles, writes the texts and prints their quality.

    Returns:
        How much was judged, and the figures of `QualityJudge.table`.
    """
    settings = subject.settings
    print(
        f"{settings.scheduler}, {settings.num_steps} steps, guidance {settings.guidance_scale:g}, "
        f"temperature {settings.temperature:g}",
        flush=True,
    )
    length = sample_length(subject.config.model.block_size)
    texts = subject.write(prompts_of(articles), length)
    # They took minutes, and the judge may take more memory than there is: it reads all of the training text.
    save_samples(texts, articles, samples_file)
    judge = QualityJudge(list(source.examples("train")), articles, beginnings(articles, subject.tokenizer, length))
    return judge.extent, judge_samples(judge, texts)
