"""Times the training step against this machine's matrix products and against the same network in plain Flax.

    uv run benchmarks/train_step.py --config=configs/micro.py

The last line is one JSON object. `tokens_per_s` counts real tokens, over row lengths in the mix of an epoch;
`matmul_share` is the needed arithmetic (flops.py) over what the best bfloat16 product would do in that time;
`ratio_plain_flax` is our real tokens per second over those of plain_flax.py.
"""

import runpy
import sys
import tempfile
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from sunfish_jax.errors import UserError
from sunfish_jax.startup import end_on_interrupt, prepare_process
from sunfish_jax.workdir.config import validate_config

ROOT = Path(__file__).parents[1]
FLAGS = flags.FLAGS

CONFIG = config_flags.DEFINE_config_file("config", None, "A file with get_config(); --config.KEY=VALUE overrides")
flags.DEFINE_string("workdir", None, "Folder for the prepared data [a temporary one]")
flags.DEFINE_integer("repeats", 3, "Timed steps of each kind and row length; medians are taken", lower_bound=1)
flags.DEFINE_integer(
    "plain_accumulate_steps",
    2,
    "Forward passes in a step of the comparison, on both sides, if the configuration has more",
    lower_bound=1,
)


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the command line; exits with one line and code 2 if it is wrong."""
    if {"--help", "-help", "-h"} & set(argv):
        print(f"{__doc__}\n{FLAGS.main_module_help()}")
        sys.exit(0)
    try:
        arguments = FLAGS(argv)
        if arguments[1:]:
            raise UserError(f"{arguments[1]!r} is not a flag: write --name=value")
        if not FLAGS["config"].present:
            raise UserError("--config is missing: name what to time, such as --config=configs/micro.py")
        if not Path(config_path()).is_file():
            raise UserError(f"--config={config_path()}: there is no such file")
        validate_config(CONFIG.value, runpy.run_path(str(ROOT / "configs/default.py"))["get_config"]())
    except Exception as error:  # A configuration is Python, and may raise anything.
        fail(error)
    FLAGS.verbosity = logging.WARNING
    return arguments


def config_path() -> str:
    return config_flags.get_config_filename(FLAGS["config"])


def fail(error: Exception) -> None:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(2)


def main(argv: list[str]) -> None:
    del argv
    end_on_interrupt()
    config = CONFIG.value
    prepare_process(config.train.num_devices)
    import comparison

    with tempfile.TemporaryDirectory() as temporary:
        try:
            comparison.run(
                Path(config_path()).stem,
                config,
                Path(FLAGS.workdir or temporary),
                FLAGS.repeats,
                FLAGS.plain_accumulate_steps,
            )
        except UserError as error:
            fail(error)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
