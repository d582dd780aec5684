"""SunFish: a text-diffusion language model to train, sample from and read.

Train (run it again to go on):  main.py --config=configs/micro.py --workdir=workdir
Change a key of the config:     main.py --config=configs/micro.py --config.train.num_steps=1000
Text for a prompt:              main.py --mode=sample --prompt="Write about dogs"
Fill the gaps in a text:        main.py --mode=infill --text="The [MASK] is a [MASK:6] of Africa."
Measure on held-out text:       main.py --mode=eval
"""

import os
import re
import runpy
import sys
import traceback
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from sunfish_jax.errors import UserError
from sunfish_jax.generation.options import (
    GenerationOptions,
    InfillOptions,
    SampleOptions,
    check_checkpoint,
    read_prompts,
)
from sunfish_jax.startup import end_on_interrupt, prepare_process
from sunfish_jax.workdir.config import load_config, unknown_key, validate_config
from sunfish_jax.workdir.disk import disk_problem

NO_CONFIG = "--config is missing: name what to train, such as --config=configs/micro.py"
SAVED_CONFIG = ": the configuration saved in the workdir is used"
ROOT = Path(__file__).parent
FLAGS = flags.FLAGS
GENERATE = ("sample", "infill")
EVAL_SAMPLES = 256

flags.DEFINE_string("mode", "train", "train, sample, infill or eval")
flags.DEFINE_string("workdir", "workdir", "Folder that holds all of a run")
config_flags.DEFINE_config_file("config", None, "train: a file with get_config(); --config.KEY=VALUE overrides")
flags.DEFINE_multi_string("prompt", None, "sample, infill: what the text is about; may be repeated")
flags.DEFINE_string("prompts_file", None, "sample, infill: a file with one prompt a line")
flags.DEFINE_float("guidance_scale", None, "sample, infill: 0 ignores the prompt, 1 is no guidance")
flags.DEFINE_integer("num_samples", None, "sample, infill: samples a prompt [1]; eval: samples to judge [256]")
flags.DEFINE_integer("seq_len", None, "sample, infill: most tokens in a text [the model's block size]")
flags.DEFINE_integer("num_steps", None, "sample, infill: denoising steps")
flags.DEFINE_string("scheduler", None, "sample, infill: ddim, ddpm or dpmpp")
flags.DEFINE_float("temperature", None, "sample, infill: divides the logits")
flags.DEFINE_integer("seed", None, "sample, infill: the same seed gives the same text [0]")
flags.DEFINE_string("output", None, "sample, infill: a .jsonl file for one JSON object a sample")
flags.DEFINE_string("text", None, "infill: text with gaps, [MASK:n] for n tokens or [MASK]")
flags.DEFINE_string("checkpoint", None, "sample, infill, eval: latest, best or a step [latest]")
flags.DEFINE_string("split", None, "eval: validation or test [validation]")

# The modes in which a flag means something; those not named here mean something in all of them.
FLAG_MODES = {
    "config": ("train",),
    "text": ("infill",),
    "split": ("eval",),
    "checkpoint": (*GENERATE, "eval"),
    "num_samples": (*GENERATE, "eval"),
    **dict.fromkeys(("prompt", "prompts_file", "guidance_scale", "seq_len"), GENERATE),
    **dict.fromkeys(("num_steps", "scheduler", "temperature", "seed", "output"), GENERATE),
}


def train(workdir: Path) -> None:
    config = FLAGS.config
    if config is None:
        raise UserError(NO_CONFIG)
    validate_config(config, runpy.run_path(str(ROOT / "configs/default.py"))["get_config"]())
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be made a folder: {error.strerror}; name another") from None
    check_writable(workdir)
    prepare_process(config.train.num_devices)
    from sunfish_jax.training import loop

    loop.train(config, workdir)


def sample(workdir: Path) -> None:
    options = SampleOptions(**generation_flags())
    options.check_length(load_config(workdir).model.block_size)
    prepare_process()
    from sunfish_jax.generation import sample

    sample.run(workdir, options)


def infill(workdir: Path) -> None:
    if FLAGS.text is None:
        raise UserError("--text is missing: give a text with gaps, such as 'The [MASK] is a [MASK:6] of Africa.'")
    options = InfillOptions(text=FLAGS.text, **generation_flags())
    options.check_length(load_config(workdir).model.block_size)
    prepare_process()
    from sunfish_jax.generation import infill

    infill.run(workdir, options)


def evaluate(workdir: Path) -> None:
    checkpoint, split = FLAGS.checkpoint or "latest", FLAGS.split or "validation"
    check_checkpoint(checkpoint)
    if split not in ("validation", "test"):
        raise UserError(f"--split={split}: give validation or test")
    num_samples = EVAL_SAMPLES if FLAGS.num_samples is None else FLAGS.num_samples
    if num_samples < 0:
        raise UserError(f"--num_samples={num_samples}: give 0 (no samples) or more")
    load_config(workdir)
    check_writable(workdir)
    prepare_process()
    from sunfish_jax.evaluation import run

    run.run(workdir, checkpoint, split, num_samples)


MODES = {"train": train, "sample": sample, "infill": infill, "eval": evaluate}


def check_writable(workdir: Path) -> None:
    """Raises a UserError if nothing may be written into the folder."""
    if not os.access(workdir, os.W_OK | os.X_OK):
        raise UserError(f"--workdir={workdir} may not be written to: name another, or ask its owner")


def generation_flags() -> dict:
    """Returns the flags that were given, by the names that `GenerationOptions` has for them."""
    if FLAGS.prompt is not None and FLAGS.prompts_file is not None:
        raise UserError("--prompt and --prompts_file were both given: give one of them")
    names = GenerationOptions.__dataclass_fields__.keys() & set(FLAGS)
    values = {name: FLAGS[name].value for name in names if FLAGS[name].value is not None}
    if FLAGS.prompts_file is not None:
        values["prompts"] = read_prompts(as_path(FLAGS.prompts_file))
    elif FLAGS.prompt is not None:
        values["prompts"] = tuple(FLAGS.prompt)
    if FLAGS.output is not None:
        values["output"] = as_path(FLAGS.output)
    return values


def as_path(value: str) -> Path:
    """A path of the command line; a shell leaves the `~` of `--workdir=~/run` to the program."""
    return Path(os.path.expanduser(value))


def check_flags(arguments: list[str]) -> None:
    """Raises a UserError for a mode that does not exist and for flags that mean nothing in the mode."""
    if arguments:
        raise UserError(f"{arguments[0]!r} is not a flag: write --name=value, with quotes around spaces")
    if FLAGS.mode not in MODES:
        raise UserError(f"--mode={FLAGS.mode}: give one of {', '.join(MODES)}")
    for name, modes in FLAG_MODES.items():
        if FLAGS[name].present and FLAGS.mode not in modes:
            why = SAVED_CONFIG if name == "config" else ""
            raise UserError(f"--{name} means nothing with --mode={FLAGS.mode}{why}; leave it out")


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the command line; exits with one line and code 2 if it is wrong."""
    if {"--help", "-help", "-h"} & set(argv):
        print(f"{__doc__}\n{FLAGS.main_module_help()}")
        sys.exit(0)
    try:
        arguments = FLAGS(argv)
        check_flags(arguments[1:])
        if FLAGS.config is not None:
            FLAGS.config.items()  # A file that cannot be read is an error only here.
    except flags.UnrecognizedFlagError as error:
        mode = FLAGS["mode"].value
        # Overrides become flags only with a --config.
        if not error.flagname.startswith("config."):
            fail(error)
        if mode == "train" or mode not in MODES:
            fail(UserError(NO_CONFIG))
        fail(UserError(f"--{error.flagname} means nothing with --mode={mode}{SAVED_CONFIG}; leave it out"))
    except (UserError, flags.Error) as error:
        fail(error)
    except Exception as error:
        fail(config_error(argv, error))
    if FLAGS["verbosity"].using_default_value:
        # Or else absl raises it, and the libraries' accounts of what they do fill the terminal.
        FLAGS.verbosity = logging.WARNING
    return arguments


def config_error(argv: list[str], error: Exception) -> Exception:
    """Returns what to tell the user about a config file or an override of it that raised `error`."""
    arguments = "\n".join(argv)
    given = re.search(r"^--?config[=\n](.*)$", arguments, re.MULTILINE)
    if given is None:
        return error
    path = given[1]
    if not Path(path).is_file():
        return UserError(f"--config={path}: there is no such file")
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.endswith(path)]
    if frames:
        return UserError(f"{path}, line {frames[-1].lineno}: {type(error).__name__}: {error}")
    try:
        config = runpy.run_path(path)["get_config"]()
    except Exception as again:
        return UserError(f"--config={path} defines no configuration: {type(again).__name__}: {again}")
    for key in re.findall(r"^--?(?:no)?config\.([\w.]+)", arguments, re.MULTILINE):
        node = config
        for part in key.split("."):
            if not hasattr(node, "keys") or part not in node:
                return unknown_key(key, config)
            node = node[part]
    return UserError(f"--config={path}: {type(error).__name__}: {error}")


def fail(error: Exception) -> None:
    # One line, whatever the error's own message has.
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(2)


def main(argv: list[str]) -> None:
    del argv
    end_on_interrupt()
    # Samples hold any character, and not every terminal can show it.
    sys.stdout.reconfigure(errors="replace")
    try:
        MODES[FLAGS.mode](as_path(FLAGS.workdir))
    except UserError as error:
        fail(error)
    except BrokenPipeError:
        # `main.py ... | head`: whoever read is content. What is still to be printed at the end goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except PermissionError as error:
        name = error.filename or "a file"
        fail(UserError(f"{name} may not be opened ({error.strerror}): name another, or ask its owner"))
    except Exception as error:
        problem = disk_problem(error)
        if problem is None:
            raise
        fail(UserError(f"a file could not be written ({problem}): make room for it and run the command again"))


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
