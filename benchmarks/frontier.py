"""Draws what settings of sampling trade: perplexity under the outside judge against the variety of the texts.

    uv run benchmarks/frontier.py --workdir=workdir_mini --output=docs/mini_frontier.png

Each setting is changed alone, the others staying as the run has them. --texts=NAME=FILE.jsonl adds texts that
another model wrote for the same prompts (main.py --output and ar_twin.py write such files). Real text is the goal:
a point below it has repeated itself, a point above it is noise.
"""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

from absl import app, flags
from command_line import fail, parser

from sunfish_jax.diffusion.names import SCHEDULERS
from sunfish_jax.errors import UserError
from sunfish_jax.startup import end_on_interrupt, prepare_process
from sunfish_jax.workdir.config import load_config

if TYPE_CHECKING:
    from sunfish_jax.evaluation.sample_quality import QualityJudge

FLAGS = flags.FLAGS
# What is varied: the name in `sampling`, the flag's default, and how its values are read.
VARIED = {
    "scheduler": (["ddim", "ddpm", "dpmpp"], str),
    "num_steps": (["16", "32", "64", "128"], int),
    "temperature": (["0.7", "0.8", "0.9", "1.0"], float),
    "guidance_scale": (["1", "1.5", "2", "3"], float),
}
_SHOWN = ("perplexity", "entropy_within_text", "entropy", "distinct_2", "overlap_2", "overlap_4", "tfidf_top_10")

flags.DEFINE_string("workdir", "workdir", "The run's folder")
flags.DEFINE_string("checkpoint", "latest", "latest, best or a step")
flags.DEFINE_integer("num_samples", 96, "Texts at each point, for as many validation prompts", lower_bound=2)
flags.DEFINE_multi_string("texts", [], "NAME=FILE.jsonl: texts that another model wrote; may be repeated")
flags.DEFINE_string("output", "frontier.png", "The picture to write; the figures go beside it as .json")
for name, (values, _) in VARIED.items():
    flags.DEFINE_list(name, values, f"Values of sampling.{name} to try")


def varied_values() -> dict[str, list]:
    """The values to try by name; raises a UserError for one that cannot be read."""
    values = {}
    for name, (_, read) in VARIED.items():
        try:
            values[name] = [read(value) for value in FLAGS[name].value]
        except ValueError as error:
            raise UserError(f"--{name}={','.join(FLAGS[name].value)}: {error}") from None
    for scheduler in values["scheduler"]:
        if scheduler not in SCHEDULERS:
            raise UserError(f"--scheduler={scheduler}: give some of {', '.join(SCHEDULERS)}")
    return values


def other_texts() -> dict[str, dict[str, str]]:
    """By name of --texts, the first text for each prompt."""
    result = {}
    for given in FLAGS.texts:
        name, _, path = given.partition("=")
        if not Path(path).is_file():
            raise UserError(f"--texts={given}: give NAME=FILE.jsonl, of a file that exists")
        records = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n") if line]
        result[name] = {record["prompt"]: record["text"] for record in reversed(records)}
    return result


def check() -> None:
    load_config(Path(FLAGS.workdir))
    varied_values()
    other_texts()


def measure() -> list[dict]:
    """The points, each with its `kind`, its `label` and its figures; prints them as they come."""
    from sunfish_jax.evaluation.adherence import prompted_articles
    from sunfish_jax.evaluation.degenerate import cut_like
    from sunfish_jax.evaluation.run import source_of
    from sunfish_jax.evaluation.sample_quality import SAMPLE_LENGTH, QualityJudge
    from sunfish_jax.generation.options import Settings
    from sunfish_jax.generation.output import StepCounter
    from sunfish_jax.generation.sample import sample_texts
    from sunfish_jax.models.prompt_encoder import encode_prompts
    from sunfish_jax.workdir.run import load_run

    run = load_run(Path(FLAGS.workdir), FLAGS.checkpoint)
    source = source_of(run)
    articles = prompted_articles(list(source.examples("validation")), FLAGS.num_samples)
    if not articles:
        raise UserError(f"--workdir={FLAGS.workdir}: its corpus has no validation prompts to write for")
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
    for name, values in varied_values().items():
        for value in values:
            settings = dataclasses.replace(base, **{name: value})
            if settings not in done:
                done[settings] = sample_texts(
                    run.model, run.params, run.schedule, run.tokenizer, states,
                    seq_len=length, settings=settings, counter=StepCounter.on_terminal(),
                )  # fmt: skip
            points.append(_point(judge, name, f"{value}", done[settings]))
    for name, by_prompt in other_texts().items():
        missing = [prompt for prompt in prompts if prompt not in by_prompt]
        if missing:
            raise UserError(f"--texts={name}: there is no text for the prompt {missing[0]!r} in it")
        points.append(_point(judge, "other", name, [by_prompt[prompt] for prompt in prompts]))
    real = cut_like([article.text for article in articles], next(iter(done.values())))
    points.append(_point(judge, "real", "real text", real))
    return points


def _point(judge: "QualityJudge", kind: str, label: str, texts: list[str]) -> dict:
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
        if kind in VARIED:
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


def main(argv: list[str]) -> None:
    del argv
    end_on_interrupt()
    prepare_process()
    try:
        points = measure()
    except UserError as error:
        fail(error)
    output = Path(FLAGS.output)
    output.with_suffix(".json").write_text(json.dumps(points, indent=1) + "\n", encoding="utf-8")
    draw(points, output)
    print(f"wrote {output} and {output.with_suffix('.json')}")


if __name__ == "__main__":
    app.run(main, flags_parser=parser(__doc__, check))
