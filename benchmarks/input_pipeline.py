"""Times the input of training: tokenising the corpus, and batches against the steps that use them up.

    uv run benchmarks/input_pipeline.py --config=configs/micro.py

The last line is one JSON object. `tokenizer_seconds` and `tokenizing_seconds` are what training a tokenizer on the
corpus (or reading the one that `tokenizer.path` names) and writing its tokens take. `new_prompts_ratio` is how many
times faster than training uses them batches are made whose prompts the encoder has not seen yet, as in the first
epochs; `ratio` the same once it has. Training's rate is that of whole steps, over the kinds of batch in the mix of
an epoch.
"""

import tempfile
from pathlib import Path

from absl import app, flags
from command_line import FLAGS, check_config, config_path, fail, parser
from ml_collections import config_flags

from sunfish_jax.errors import UserError
from sunfish_jax.startup import end_on_interrupt, prepare_process

config_flags.DEFINE_config_file("config", None, "A file with get_config(); --config.KEY=VALUE overrides")
flags.DEFINE_integer("repeats", 1, "Steps timed of each kind of batch; medians count", lower_bound=1)
flags.DEFINE_integer("batches", 100, "Batches timed, at most an epoch's", lower_bound=1)


def main(argv: list[str]) -> None:
    del argv
    end_on_interrupt()
    prepare_process(FLAGS.config.train.num_devices)
    # A new one: what was prepared before would not be prepared again.
    with tempfile.TemporaryDirectory() as workdir:
        try:
            import input_rates

            input_rates.run(config_path().stem, FLAGS.config, Path(workdir), FLAGS.repeats, FLAGS.batches)
        except UserError as error:
            fail(error)


if __name__ == "__main__":
    app.run(main, flags_parser=parser(__doc__, check_config))
