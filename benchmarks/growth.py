"""How training and sampling grow: a table, and a chart of it.

    uv run benchmarks/growth.py --config=configs/micro.py --output=docs/growth.png

Tokens per second and memory of a training step against rows, row length, width, host devices and cores, and the
time of a sample against steps, length and number of texts; one is changed at a time. Every point is measured
in a process of its own, so that its memory is its own, on random tokens without padding. A step here is two forward
passes and the optimiser.
"""

import json
import sys
from pathlib import Path

from absl import app, flags
from command_line import FLAGS, check_config, config_path, fail, parser
from growth_curves import draw, run_all, sampling_points, training_points
from ml_collections import config_flags

from sunfish_jax.errors import UserError

config_flags.DEFINE_config_file("config", None, "A file with get_config()")
flags.DEFINE_string("output", "growth.png", "The picture to write; the figures go beside it as .json")
flags.DEFINE_integer("repeats", 3, "Timed steps or samples at each point; medians count", lower_bound=1)


def check() -> None:
    check_config()
    if any(argument.startswith(("--config.", "-config.")) for argument in sys.argv):
        raise UserError("--config.KEY=VALUE means nothing here: every point sets its own; leave it out")


def main(argv: list[str]) -> None:
    del argv
    groups = training_points(FLAGS.config), sampling_points(FLAGS.config)
    results = [result for group in groups for result in run_all(group, config_path(), FLAGS.repeats)]
    if not results:
        fail(UserError("nothing could be measured"))
    output = Path(FLAGS.output)
    output.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    draw(results, output)
    print(f"wrote {output} and {output.with_suffix('.json')}")


if __name__ == "__main__":
    app.run(main, flags_parser=parser(__doc__, check))
