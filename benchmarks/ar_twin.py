"""Trains an autoregressive twin of the denoiser for a given time, and evaluates it: what the same time would buy.

    uv run benchmarks/ar_twin.py --config=configs/mini.py --workdir=workdir_ar --minutes=30

The twin has the denoiser's layers made causal, as many parameters, and the same tokenizer, data, prompt encoder and
optimiser. It will overfit a small corpus sooner: what is evaluated is the best checkpoint by held-out loss, and
--dropout and --minutes are to be tuned, since a shorter run that ends at a low learning rate may beat the middle of
a longer one. The time is that of training steps; compiling, evaluating and saving are left out, as they are in the
denoiser's progress line. To tune on a machine whose speed drifts, give the others the --num_steps that the first
took. Ctrl-C saves and stops, and the same command goes on. Once all is spent, the command evaluates and samples
anew: give other prompts, seeds or temperatures.

In the workdir: eval_SPLIT.json (the figures of main.py --mode=eval, the likelihood exact), checkpoints, logs for
TensorBoard.
"""

import math
from pathlib import Path

from absl import app, flags
from ar_budget import Budget
from command_line import FLAGS, check_config, fail, parser
from ml_collections import config_flags

from sunfish_jax.errors import UserError
from sunfish_jax.generation.options import SampleOptions, read_prompts
from sunfish_jax.startup import end_on_interrupt, prepare_process

config_flags.DEFINE_config_file("config", None, "A file with get_config(); --config.KEY=VALUE overrides")
flags.DEFINE_string("workdir", "workdir_ar", "Folder that holds all of the twin's run")
flags.DEFINE_float("minutes", 30.0, "Training steps take this long, over all sittings")
flags.DEFINE_integer("num_steps", None, "In place of --minutes: training steps, over all sittings", lower_bound=1)
flags.DEFINE_float("dropout", None, "In place of config.model.dropout")
flags.DEFINE_integer("eval_every", 200, "Steps between two held-out evaluations, of which the best is kept")
flags.DEFINE_string("split", "validation", "Text of the last evaluation: validation or test")
flags.DEFINE_string("prompts_file", None, "A file with one prompt a line [config.logging.sample_prompts]")
flags.DEFINE_integer("eval_samples", 256, "Samples to judge; 0 for none", lower_bound=0)
flags.DEFINE_integer("num_samples", 1, "Samples a prompt")
flags.DEFINE_integer("seq_len", None, "Most tokens in a sample [the model's block size]")
flags.DEFINE_float("temperature", 1.0, "Of samples: divides the logits; 0 takes the likeliest token")
flags.DEFINE_float("guidance_scale", 1.0, "Of samples: 0 ignores the prompt, 1 is no guidance")
flags.DEFINE_integer("seed", 0, "Of samples: the same seed gives the same text")
flags.DEFINE_string("output", None, "A .jsonl file for one JSON object a sample")


def check() -> None:
    """Raises a UserError for what cannot be trained or sampled."""
    if FLAGS.dropout is not None and FLAGS["config"].present:
        FLAGS.config.model.dropout = FLAGS.dropout
    check_config()
    if not 0 < FLAGS.minutes < math.inf:
        raise UserError(f"--minutes={FLAGS.minutes}: give a number above 0")
    if FLAGS["minutes"].present and FLAGS.num_steps is not None:
        raise UserError(f"--minutes={FLAGS.minutes} --num_steps={FLAGS.num_steps}: give one of them")
    if FLAGS.eval_every < 1:
        raise UserError(f"--eval_every={FLAGS.eval_every}: give a whole number of at least 1")
    if not 0 <= FLAGS.temperature < math.inf:
        raise UserError(f"--temperature={FLAGS.temperature}: give 0 (the likeliest token) or more")
    if FLAGS.split not in ("validation", "test"):
        raise UserError(f"--split={FLAGS.split}: give validation or test")
    sample_options().check_length(FLAGS.config.model.block_size)


def budget() -> Budget:
    """How long to train, from the flags."""
    return Budget(seconds=60.0 * FLAGS.minutes) if FLAGS.num_steps is None else Budget(num_steps=FLAGS.num_steps)


def sample_options() -> SampleOptions:
    """What to sample, from the flags."""
    return SampleOptions(
        prompts=() if FLAGS.prompts_file is None else read_prompts(Path(FLAGS.prompts_file)),
        num_samples=FLAGS.num_samples,
        seq_len=FLAGS.seq_len,
        guidance_scale=FLAGS.guidance_scale,
        seed=FLAGS.seed,
        output=None if FLAGS.output is None else Path(FLAGS.output),
    )


def main(argv: list[str]) -> None:
    del argv
    end_on_interrupt()
    workdir = Path(FLAGS.workdir)
    prepare_process(FLAGS.config.train.num_devices)
    try:
        import ar_evaluation
        import ar_training

        finished = ar_training.train(FLAGS.config, workdir, budget=budget(), eval_every=FLAGS.eval_every)
        if finished:
            ar_evaluation.run(workdir, FLAGS.split, FLAGS.eval_samples, sample_options(), FLAGS.temperature)
    except UserError as error:
        fail(error)


if __name__ == "__main__":
    app.run(main, flags_parser=parser(__doc__, check))
