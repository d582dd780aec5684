"""The measurement behind frontier.py."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from sunfish_jax.errors import UserError
from sunfish_jax.evaluation.adherence import prompted_articles
from sunfish_jax.evaluation.degenerate import cut_like
from sunfish_jax.evaluation.run import source_of
from sunfish_jax.evaluation.sample_quality import SAMPLE_LENGTH, QualityJudge
from sunfish_jax.generation.options import Settings
from sunfish_jax.generation.output import StepCounter
from sunfish_jax.generation.sample import sample_texts
from sunfish_jax.models.prompt_encoder import encode_prompts
from sunfish_jax.workdir.run import load_run

_SHOWN = ("perplexity", "entropy_within_text", "entropy", "distinct_2", "overlap_2", "overlap_4", "tfidf_top_10")


def read_texts(given: str) -> dict[str, str]:
    """By prompt its first text, from NAME=FILE.jsonl."""
    path = given.partition("=")[2]
    records = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n") if line]
    return {record["prompt"]: record["text"] for record in reversed(records)}


def measure(
    workdir: Path,
    checkpoint: str,
    num_samples: int,
    varied: Mapping[str, Sequence],
    others: Mapping[str, Mapping[str, str]],
) -> list[dict]:
    """Measures and prints every point.

    Args:
        workdir: The run's folder.
        checkpoint: Of the run.
        num_samples: Texts at each point.
        varied: Fields of `Settings`, each with the values that it takes in turn.
        others: Other sets of texts by name, as texts by prompt.

    Returns:
        The points, each with its `kind`, its `label` and its figures.

    Raises:
        UserError: The corpus has no prompts, the judge is not installed, or a text is missing.
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
    states = encode_prompts(run.prompt_encoder, prompts)
    length = min(run.config.model.block_size, SAMPLE_LENGTH)
    base = Settings.make(run.config.sampling)

    print("  ".join(f"{name:>{len(name)}}" for name in _SHOWN))
    points = []
    done: dict[Settings, list[str]] = {}
    for name, values in varied.items():
        for value in values:
            settings = dataclasses.replace(base, **{name: value})
            if settings not in done:
                done[settings] = sample_texts(
                    run.model, run.params, run.schedule, run.tokenizer, states,
                    seq_len=length, settings=settings, counter=StepCounter.on_terminal(),
                )  # fmt: skip
            points.append(_point(judge, name, f"{value}", done[settings]))
    for name, by_prompt in others.items():
        missing = [prompt for prompt in prompts if prompt not in by_prompt]
        if missing:
            raise UserError(f"--texts={name}: there is no text for the prompt {missing[0]!r} in it")
        points.append(_point(judge, "other", name, [by_prompt[prompt] for prompt in prompts]))
    real = cut_like([article.text for article in articles], next(iter(done.values())))
    points.append(_point(judge, "real", "real text", real))
    return points


def _point(judge: QualityJudge, kind: str, label: str, texts: list[str]) -> dict:
    figures = judge.figures(texts)
    columns = "  ".join(f"{figures.get(name, float('nan')):>{len(name)}.3f}" for name in _SHOWN)
    print(f"{columns}  {kind} {label}", flush=True)
    return {"kind": kind, "label": label, **figures}


def draw(points: list[dict], path: Path) -> None:
    """One curve for each setting that is varied, and a mark for every other set of texts."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5.5))
    for kind in dict.fromkeys(point["kind"] for point in points):
        of_kind = [point for point in points if point["kind"] == kind]
        x, y = ([point[name] for point in of_kind] for name in ("entropy_within_text", "perplexity"))
        if kind not in ("other", "real"):
            axes.plot(x, y, marker=".", label=kind.replace("_", " "), alpha=0.8)
        else:
            axes.plot(x, y, linestyle="", marker="*", markersize=12, label=", ".join(p["label"] for p in of_kind))
        for point in of_kind:
            axes.annotate(point["label"], (point["entropy_within_text"], point["perplexity"]), fontsize=7)
    axes.set(yscale="log", xlabel="entropy within a text, bits a word", ylabel="perplexity under SmolLM2, a token")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
