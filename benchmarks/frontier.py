"""Draws what settings of sampling trade: perplexity under the outside judge against the variety of the texts.

    uv run benchmarks/frontier.py --workdir=workdir_mini --output=docs/mini_frontier.png

Each setting is changed alone, the others staying as the run has them. --beside=NAME=WORKDIR adds the temperatures
of another run on the same corpus, of the denoiser or of its autoregressive twin (ar_twin.py), for the same prompts.
Both axes are relative to real text of the same lengths, so real text is at (0, 1), which is the goal: to the left
of it texts repeat themselves, and above it they are noise. The figures are written after each point.
"""

from pathlib import Path

from absl import app, flags
from command_line import fail, parser

from sunfish_jax.errors import UserError
from sunfish_jax.generation.options import SampleOptions, check_checkpoint
from sunfish_jax.startup import end_on_interrupt, prepare_process
from sunfish_jax.workdir.config import load_config

FLAGS = flags.FLAGS
# What is varied: the name in `sampling`, the flag's default, and how its values are read.
VARIED = {
    "scheduler": (["ddim", "ddpm", "dpmpp"], str),
    "num_steps": (["16", "32", "64", "128"], int),
    "temperature": (["0.4", "0.6", "0.8", "1.0"], float),
    "guidance_scale": (["1", "1.5", "2", "3"], float),
}

flags.DEFINE_string("workdir", "workdir", "The run's folder")
flags.DEFINE_string("checkpoint", "latest", "latest, best or a step")
flags.DEFINE_integer("num_samples", 100, "Texts at each point, for as many validation prompts", lower_bound=2)
flags.DEFINE_multi_string("beside", [], "NAME=WORKDIR: another run or twin to compare with; may be repeated")
flags.DEFINE_string("output", "frontier.png", "The picture to write; the figures go beside it as .json")
for name, (values, _) in VARIED.items():
    flags.DEFINE_list(name, values, f"Values of sampling.{name} to try")


def varied_values() -> dict[str, list]:
    """The values to try by name; raises a UserError for one that cannot be sampled with."""
    values = {}
    for name, (_, read) in VARIED.items():
        try:
            values[name] = [read(value) for value in FLAGS[name].value]
        except ValueError as error:
            raise UserError(f"--{name}={','.join(FLAGS[name].value)}: {error}") from None
        for value in values[name]:
            SampleOptions(**{name: value})
    return values


def workdirs_beside() -> dict[str, Path]:
    """The folders of --beside by name; raises a UserError for one that holds no run."""
    workdirs = {}
    for given in FLAGS.beside:
        name, _, workdir = given.partition("=")
        if not name or not workdir or name in workdirs or name in (*VARIED, "real"):
            raise UserError(f"--beside={given}: give NAME=WORKDIR, and to each a name of its own")
        try:
            load_config(Path(workdir))
        except UserError as error:
            raise UserError(f"--beside={given}: {error}") from None
        workdirs[name] = Path(workdir)
    return workdirs


def check() -> None:
    load_config(Path(FLAGS.workdir))
    check_checkpoint(FLAGS.checkpoint)
    varied_values()
    workdirs_beside()
    output = Path(FLAGS.output)
    SampleOptions(output=output)
    if output.suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"--output={output}: give a name that ends in .png, .pdf or .svg")


def main(argv: list[str]) -> None:
    del argv
    end_on_interrupt()
    prepare_process()
    import frontier_points

    output = Path(FLAGS.output)
    try:
        points = frontier_points.measure(
            Path(FLAGS.workdir),
            FLAGS.checkpoint,
            FLAGS.num_samples,
            varied_values(),
            workdirs_beside(),
            output.with_suffix(".json"),
        )
    except UserError as error:
        fail(error)
    frontier_points.draw(points, output)
    print(f"wrote {output} and {output.with_suffix('.json')}")


if __name__ == "__main__":
    app.run(main, flags_parser=parser(__doc__, check))
