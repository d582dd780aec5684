"""Times the training step against this machine's matrix products and against the same network in plain Flax.

    uv run benchmarks/train_step.py --config=configs/micro.py
    uv run --extra bench benchmarks/train_step.py --config=configs/micro.py --compare

With --compare also against PyTorch: a twin of our network with AdamW, in the fastest way found for it (number
format, attention and passes at once at the commonest row length, eager or compiled at each), and the first SunFish
as it shipped. --peers names those that are wanted: one ratio takes minutes, all take more than an hour. Each side
works while the others wait, in turn, and the medians count. Each has its own batches of the same corpus: ours are
packed rows, as in training, theirs are padded to one of --row_lengths.

The last line is one JSON object. `tokens_per_s` counts real tokens, over the shapes in the mix of an epoch;
`matmul_share` is the needed arithmetic (flops.py) over what the best product would do in that time, of operands in
bfloat16 where layers multiply in eight bits, and else in the step's number format.
`ratio_plain_flax` is our real tokens per second over those of plain_flax.py, with the configuration's optimiser on
both sides (optax's own Muon on theirs). `ratio_torch_twin` is that over the twin's (torch_twin.py), with AdamW on
both sides, and `ratio_torch_twin_as_configured` with the configuration's optimiser on ours. `ratio_first_sunfish`
is our real tokens per second, as configured, over the positions per second of the first SunFish (first_sunfish.py),
which cuts running text into blocks and has no padding; `ratio_first_sunfish_real_tokens` is that over its real
tokens, had it one text of the corpus in each block.
"""

from absl import app, flags
from command_line import (
    FLAGS,
    check_comparison,
    check_config,
    config_path,
    define_comparison,
    fail,
    parser,
)
from ml_collections import config_flags

from sunfish_jax.errors import UserError
from sunfish_jax.startup import end_on_interrupt, prepare_process

config_flags.DEFINE_config_file("config", None, "A file with get_config(); --config.KEY=VALUE overrides")
flags.DEFINE_integer(
    "plain_accumulate_steps",
    2,
    "Forward passes in a step of the comparison with plain Flax, on both sides, if the configuration has more",
    lower_bound=1,
)
flags.DEFINE_integer(
    "steps", 1, "Steps in a row that each side is timed for in its turn, after one that is not", lower_bound=1
)
flags.DEFINE_list(
    "peers",
    "plain_flax,torch_twin,first_sunfish",
    "What to compare with; the last two are PyTorch, and left out without --compare",
)
flags.DEFINE_integer(
    "row_lengths", 8, "Lengths that the networks compared with pad rows to, at most", lower_bound=1
)
define_comparison(repeats=3)


def check() -> None:
    check_config()
    check_comparison()
    for peer in FLAGS.peers:
        if peer not in FLAGS["peers"].default:
            raise UserError(f"--peers={peer} is none of {', '.join(FLAGS['peers'].default)}: name some of them")
        if FLAGS["peers"].present and not FLAGS.compare and peer != "plain_flax":
            raise UserError(f"--peers={peer} is PyTorch, which needs --compare: add it, or leave {peer} out")


def main(argv: list[str]) -> None:
    del argv
    end_on_interrupt()
    prepare_process(FLAGS.config.train.num_devices)
    from torch_process import torch_to_compare_with

    try:
        with torch_to_compare_with(FLAGS.compare, FLAGS.torch_python) as torch:
            import comparison

            comparison.run(
                config_path().stem,
                FLAGS.config,
                FLAGS.repeats,
                FLAGS.steps,
                FLAGS.plain_accumulate_steps,
                FLAGS.row_lengths,
                [peer for peer in FLAGS.peers if torch is not None or peer == comparison.PLAIN_FLAX],
                torch,
            )
    except UserError as error:
        fail(error)


if __name__ == "__main__":
    app.run(main, flags_parser=parser(__doc__, check))
