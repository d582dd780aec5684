"""The command line of the benchmarks: --help at once, and one line and code 2 for what is wrong."""

import importlib.util
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from absl import flags, logging
from ml_collections import config_flags

from sunfish_jax.errors import UserError
from sunfish_jax.workdir.config import validate_config

ROOT = Path(__file__).parents[1]
FLAGS = flags.FLAGS


def define_comparison(repeats: int) -> None:
    """Defines --repeats, --compare and --torch_python, as flags of the script that calls this."""
    flags.disclaim_key_flags()
    flags.DEFINE_integer(
        "repeats", repeats, "Times that each thing is timed, in turn; medians count", lower_bound=1
    )
    flags.DEFINE_boolean("compare", False, "Also time the PyTorch peers")
    flags.DEFINE_string("torch_python", None, "--compare: a Python with PyTorch and NumPy [the one that runs this]")


def parser(doc: str, check: Callable[[], None]) -> Callable[[list[str]], list[str]]:
    """The `flags_parser` of `app.run`.

    Args:
      doc: what --help begins with.
      check: raises a UserError if the flags do not go together.
    """

    def parse(argv: list[str]) -> list[str]:
        if {"--help", "-help", "-h"} & set(argv):
            print(f"{doc}\n{FLAGS.main_module_help()}")
            sys.exit(0)
        try:
            arguments = FLAGS(argv)
            if arguments[1:]:
                raise UserError(f"{arguments[1]!r} is not a flag: write --name=value")
            check()
        except Exception as error:  # A configuration is Python, and may raise anything.
            fail(error)
        FLAGS.verbosity = logging.WARNING
        return arguments

    return parse


def check_config() -> None:
    """Raises a UserError unless --config names a configuration that can be trained."""
    if not FLAGS["config"].present:
        raise UserError("--config is missing: name a configuration, such as --config=configs/micro.py")
    if not config_path().is_file():
        raise UserError(f"--config={config_path()}: there is no such file")
    validate_config(FLAGS.config, runpy.run_path(str(ROOT / "configs/default.py"))["get_config"]())


def check_comparison() -> None:
    """Raises a UserError if there is no PyTorch to compare with, as far as can be told without starting it."""
    if FLAGS.torch_python is not None:
        if not FLAGS.compare:
            raise UserError("--torch_python means nothing without --compare: add it, or leave this out")
        if shutil.which(FLAGS.torch_python) is None:
            raise UserError(f"--torch_python={FLAGS.torch_python} is no program: give the path of a Python")
    elif FLAGS.compare and importlib.util.find_spec("torch") is None:
        raise UserError(
            "--compare needs PyTorch, and this Python has none: run with `uv run --extra bench ...`, "
            "or name a Python that has it with --torch_python=PATH"
        )


def config_path() -> Path:
    """The file that --config names."""
    return Path(config_flags.get_config_filename(FLAGS["config"]))


def fail(error: Exception) -> None:
    """Ends the process with one line and code 2."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(2)
