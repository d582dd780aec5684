"""Times sampling, compiled and warm, of a configuration with random weights or of a run's newest checkpoint.

    uv run benchmarks/sampling.py --config=configs/micro.py
    uv run --extra bench benchmarks/sampling.py --config=configs/micro.py --compare

Two tasks: 3 texts of 128 tokens in 20 DDIM steps with guidance, and one text of 64 tokens in 10. Guidance acts in
the part of the noise range that the configuration gives. With --compare the first task is also done by PyTorch: by
a twin of our network (torch_twin.py), from the same noise in the same steps with guidance in the same of them, in
the fastest way that PyTorch has for it; by the twin with guidance as it is usually done, in every step, from a pass
with the prompt and one without; and by the first SunFish as it shipped (first_sunfish.py), which guides so too.
Each works while the others wait, in turn, and the medians count.

The last line is one JSON object: `seconds` of the first task, `seconds_short` of the second, and with --compare
`ratio_torch_twin`, `ratio_torch_twin_guided_throughout` and `ratio_first_sunfish`, their seconds over ours.
"""

from pathlib import Path

from absl import app, flags
from command_line import FLAGS, check_comparison, check_config, config_path, define_comparison, fail, parser
from ml_collections import config_flags

from sunfish_jax.errors import UserError
from sunfish_jax.startup import end_on_interrupt, prepare_process
from sunfish_jax.workdir.config import load_config

config_flags.DEFINE_config_file("config", None, "A file with get_config(); --config.KEY=VALUE overrides")
flags.DEFINE_string("workdir", None, "A run's folder, in place of --config")
define_comparison(repeats=5)


def check() -> None:
    if FLAGS["config"].present and FLAGS.workdir is not None:
        raise UserError("--config and --workdir were both given: give one of them")
    if FLAGS.workdir is None:
        check_config()
    else:
        load_config(Path(FLAGS.workdir))
    check_comparison()


def main(argv: list[str]) -> None:
    del argv
    end_on_interrupt()
    prepare_process()
    from torch_process import torch_to_compare_with

    try:
        with torch_to_compare_with(FLAGS.compare, FLAGS.torch_python) as torch:
            from sampling_comparison import Sampled, run

            if FLAGS.workdir is None:
                sampled = Sampled.fresh(config_path().stem, FLAGS.config)
            else:
                sampled = Sampled.of_run(Path(FLAGS.workdir))
            run(sampled, FLAGS.repeats, torch)
    except UserError as error:
        fail(error)


if __name__ == "__main__":
    app.run(main, flags_parser=parser(__doc__, check))
