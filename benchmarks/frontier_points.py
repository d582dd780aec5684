"""The measurement behind frontier.py."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ar_evaluation import TwinSubject
from ar_training import TWIN_FILE, open_twin

from sunfish_jax.errors import UserError
from sunfish_jax.evaluation.adherence import prompted_articles
from sunfish_jax.evaluation.evaluate import Subject
from sunfish_jax.evaluation.run import Denoiser, source_of
from sunfish_jax.evaluation.sample_quality import REAL, SAMPLES, QualityJudge, beginnings, sample_length
from sunfish_jax.generation.options import Settings
from sunfish_jax.workdir.json_file import write_json
from sunfish_jax.workdir.run import load_run

_SHOWN = (
    "perplexity",
    "entropy_within_text",
    "distinct_2",
    "overlap_2",
    "overlap_4",
    "tfidf_top_10",
    "topic_accuracy",
    "mean_words",
    "mean_words_whole",
)


def measure(
    workdir: Path,
    checkpoint: str,
    num_samples: int,
    varied: Mapping[str, Sequence],
    beside: Mapping[str, Path],
    output: Path,
) -> list[dict]:
    """Measures and prints every point, and writes those there are to `output` after each.

    Args:
        workdir: The run's folder.
        checkpoint: Of the run.
        num_samples: Texts at each point.
        varied: Fields of `Settings`, each with the values that it takes in turn.
        beside: Folders of other runs and twins by name, of which only the temperature is varied. The newest
            checkpoint of a run, and the best of a twin.
        output: A JSON file.

    Returns:
        The points, each with its `kind` (what is varied, or the name of another run), its `label`, its figures, and
        those of real text of the same lengths under `real`.

    Raises:
        UserError: The corpus has no prompts, or another run's is another one; the judge is not installed; there is
            no such checkpoint.
    """
    run = load_run(workdir, checkpoint)
    source = source_of(run)
    articles = prompted_articles(list(source.examples("validation")), num_samples)
    if not articles:
        raise UserError(f"--workdir={workdir}: its corpus has no validation prompts to write for")
    length = sample_length(run.config.model.block_size)
    judge = QualityJudge(list(source.examples("train")), articles, beginnings(articles, run.tokenizer, length))
    if judge.missing:
        raise UserError(judge.missing)
    prompts = [article.prompts[0] for article in articles]
    # Before the first point, so that a folder that cannot be read costs no wait.
    others = {name: open_beside(folder, run.data_identity, length) for name, folder in beside.items()}
    base = Settings.make(run.config.sampling)

    @functools.cache
    def write(settings: Settings) -> list[str]:
        """Cached, for several points are those of the run's own settings."""
        return Denoiser(run, settings).write(prompts, length)

    points = [
        (name, value, functools.partial(write, dataclasses.replace(base, **{name: value})))
        for name, values in varied.items()
        for value in values
    ]
    for name, at_temperature in others.items():
        for value in varied["temperature"]:
            points.append((name, value, functools.partial(at_temperature(value).write, prompts, length)))

    print(f"{len(points)} points of {len(articles)} texts; each prompt is looked for among {judge.extent['among']}")
    print("  ".join(_SHOWN), flush=True)
    measured = []
    for kind, value, texts in points:
        table = judge.beside_real(texts())
        measured.append({"kind": kind, "label": f"{value}", **judge.extent, **table[SAMPLES], "real": table[REAL]})
        for figures, label in ((table[SAMPLES], f"{kind} {value}"), (table[REAL], "real text of these lengths")):
            columns = (f"{figures.get(name, float('nan')):>{len(name)}.3f}" for name in _SHOWN)
            print("  ".join(columns), f" {label}", flush=True)
        write_json(output, measured)
    return measured


def open_beside(workdir: Path, data_identity: str, length: int) -> Callable[[float], Subject]:
    """The run or the twin in `workdir`, to write texts of `length` tokens at any temperature.

    Raises:
        UserError: It was trained on another corpus than `data_identity`, and may have seen what it is to write; or
            on shorter texts.
    """
    is_twin = (workdir / TWIN_FILE).is_file()
    run = open_twin(workdir) if is_twin else load_run(workdir)
    if (run.prepared.identity["data"] if is_twin else run.data_identity) != data_identity:
        raise UserError(f"--beside=...={workdir} was trained on another corpus: name a run on the same one")
    if run.config.model.block_size < length:
        raise UserError(
            f"--beside=...={workdir} has model.block_size={run.config.model.block_size}, and texts of {length} "
            "tokens are to be written: name a run with a larger one"
        )
    if is_twin:
        return functools.partial(TwinSubject, run)
    settings = Settings.make(run.config.sampling)
    return lambda temperature: Denoiser(run, dataclasses.replace(settings, temperature=temperature))


def draw(points: list[dict], path: Path) -> None:
    """One curve for each setting that is varied and for each other run, and a mark for real text."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5.5))
    for kind in dict.fromkeys(point["kind"] for point in points):
        of_kind = [point for point in points if point["kind"] == kind]
        x = [point["entropy_within_text"] - point["real"]["entropy_within_text"] for point in of_kind]
        y = [point["perplexity"] / point["real"]["perplexity"] for point in of_kind]
        axes.plot(x, y, marker=".", label=kind.replace("_", " "), alpha=0.8)
        for point, *at in zip(of_kind, x, y, strict=True):
            axes.annotate(point["label"], at, fontsize=7)
    axes.plot(0, 1, linestyle="", marker="*", markersize=12, color="black", label="real text")
    axes.set(
        yscale="log",
        xlabel="entropy within a text, less that of real text as long (bits a word)",
        ylabel="perplexity under SmolLM2, over that of real text as long",
    )
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
