"""The measurement behind frontier.py."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import ar_evaluation
from ar_training import TWIN_FILE, open_twin

from sunfish_jax.errors import UserError
from sunfish_jax.evaluation.adherence import prompted_articles
from sunfish_jax.evaluation.degenerate import cut_like
from sunfish_jax.evaluation.run import source_of
from sunfish_jax.evaluation.sample_quality import SAMPLE_LENGTH, QualityJudge
from sunfish_jax.generation.options import Settings
from sunfish_jax.generation.output import StepCounter
from sunfish_jax.generation.sample import sample_texts
from sunfish_jax.models.prompt_encoder import encode_prompts
from sunfish_jax.workdir.run import Run, load_run

_SHOWN = ("perplexity", "entropy_within_text", "entropy", "distinct_2", "overlap_2", "overlap_4", "tfidf_top_10")


class Writer(Protocol):
    """Writes one text for each of the prompts it was made for, at a temperature."""

    def __call__(self, temperature: float) -> list[str]: ...


def measure(
    workdir: Path,
    checkpoint: str,
    num_samples: int,
    varied: Mapping[str, Sequence],
    beside: Mapping[str, Path],
) -> list[dict]:
    """Measures and prints every point.

    Args:
        workdir: The run's folder.
        checkpoint: Of the run.
        num_samples: Texts at each point.
        varied: Fields of `Settings`, each with the values that it takes in turn.
        beside: Folders of other runs and twins by name, of which only the temperature is varied. The newest
            checkpoint of a run, and the best of a twin.

    Returns:
        The points, each with its `kind` (what is varied, or the name of another run), its `label` and its figures.

    Raises:
        UserError: The corpus has no prompts, or the judge is not installed, or there is no such checkpoint.
    """
    run = load_run(workdir, checkpoint)
    source = source_of(run)
    articles = prompted_articles(list(source.examples("validation")), num_samples)
    if not articles:
        raise UserError(f"--workdir={workdir}: its corpus has no validation prompts to write for")
    judge = QualityJudge(list(source.examples("train")), articles, prompted=True)
    if judge.missing:
        raise UserError(judge.missing)
    prompts = [article.prompts[0] for article in articles]
    # Before the first point, so that a folder that cannot be read costs no wait.
    others = {name: open_writer(folder, prompts) for name, folder in beside.items()}
    base = Settings.make(run.config.sampling)
    write = functools.cache(functools.partial(write_texts, run, prompts))

    print("  ".join(f"{name:>{len(name)}}" for name in _SHOWN))
    points = [
        _point(judge, name, f"{value}", write(dataclasses.replace(base, **{name: value})))
        for name, values in varied.items()
        for value in values
    ]
    for name, write_other in others.items():
        points += [_point(judge, name, f"{value}", write_other(value)) for value in varied["temperature"]]
    real = cut_like([article.text for article in articles], write(base))
    points.append(_point(judge, "real", "real text", real))
    return points


def write_texts(run: Run, prompts: Sequence[str], settings: Settings) -> list[str]:
    """One text of a run of the denoiser for each prompt."""
    return sample_texts(
        run.model,
        run.params,
        run.schedule,
        run.tokenizer,
        encode_prompts(run.prompt_encoder, prompts),
        seq_len=min(run.config.model.block_size, SAMPLE_LENGTH),
        settings=settings,
        counter=StepCounter.on_terminal(),
    )


def open_writer(workdir: Path, prompts: Sequence[str]) -> Writer:
    """What writes texts for the prompts with the run or the twin in `workdir`."""
    if (workdir / TWIN_FILE).is_file():
        twin = open_twin(workdir)
        return lambda temperature: ar_evaluation.write_texts(twin, prompts, temperature)
    run = load_run(workdir)
    base = Settings.make(run.config.sampling)
    return lambda temperature: write_texts(run, prompts, dataclasses.replace(base, temperature=temperature))


def _point(judge: QualityJudge, kind: str, label: str, texts: list[str]) -> dict:
    figures = judge.figures(texts)
    columns = "  ".join(f"{figures.get(name, float('nan')):>{len(name)}.3f}" for name in _SHOWN)
    print(f"{columns}  {kind} {label}", flush=True)
    return {"kind": kind, "label": label, **figures}


def draw(points: list[dict], path: Path) -> None:
    """One curve for each setting that is varied and for each other run, and a mark for real text."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5.5))
    for kind in dict.fromkeys(point["kind"] for point in points):
        of_kind = [point for point in points if point["kind"] == kind]
        x, y = ([point[name] for point in of_kind] for name in ("entropy_within_text", "perplexity"))
        if kind == "real":
            axes.plot(x, y, linestyle="", marker="*", markersize=12, label="real text")
        else:
            axes.plot(x, y, marker=".", label=kind.replace("_", " "), alpha=0.8)
        for point in of_kind:
            axes.annotate(point["label"], (point["entropy_within_text"], point["perplexity"]), fontsize=7)
    axes.set(yscale="log", xlabel="entropy within a text, bits a word", ylabel="perplexity under SmolLM2, a token")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
