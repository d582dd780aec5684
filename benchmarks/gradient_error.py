"""How far a run's gradients in bfloat16 and int8 lie from float32's, beside what other batches would change.

uv run benchmarks/gradient_error.py --workdir=workdir --batches=16

All formats have the same parameters, batches, noise and dropout. The mean over the batches is about what an update
of Muon, with its momentum of 0.95, is made of. Gradients in float32 are held in memory, 41 MB a batch for `mini`.
"""

import itertools
from pathlib import Path

from absl import app, flags
from command_line import fail, parser

from sunfish_jax.errors import UserError
from sunfish_jax.generation.options import check_checkpoint
from sunfish_jax.startup import prepare_process

_WORKDIR = flags.DEFINE_string("workdir", "workdir", "The run's folder")
_CHECKPOINT = flags.DEFINE_string("checkpoint", "latest", "latest, best or a step")
_BATCHES = flags.DEFINE_integer("batches", 16, "Batches of one kind, an even number", lower_bound=2)
_FORMATS = flags.DEFINE_multi_enum("format", ["bfloat16", "int8"], ["bfloat16", "int8"], "Number formats")


def check() -> None:
    if _BATCHES.value % 2:
        raise UserError(f"--batches={_BATCHES.value} has no halves to compare: give an even number")
    check_checkpoint(_CHECKPOINT.value)


def main(argv: list[str]) -> None:
    del argv
    prepare_process()
    try:
        print_errors(Path(_WORKDIR.value))
    except UserError as error:
        fail(error)


def print_errors(workdir: Path) -> None:
    """The table of each number format.

    Raises:
      UserError: there is no such run or checkpoint, or its data have changed.
    """
    import jax
    from gradient_sums import GradientSums

    from sunfish_jax.models.denoiser import make_model
    from sunfish_jax.training.preparation import prepare_run
    from sunfish_jax.training.sharding import make_mesh
    from sunfish_jax.training.state import create_state
    from sunfish_jax.training.step import make_train_step
    from sunfish_jax.workdir.checkpoints import Checkpoints
    from sunfish_jax.workdir.config import load_config

    config = load_config(workdir)
    config.train.num_devices = 1
    with Checkpoints(workdir) as checkpoints:
        checkpoint = checkpoints.resolve(_CHECKPOINT.value)
        prepared = prepare_run(config, resumed=workdir)
        state = checkpoints.restore(jax.eval_shape(lambda: create_state(config, prepared.model)), checkpoint)
    batches = list(itertools.islice(_one_kind(prepared.training_batches(config), checkpoint), _BATCHES.value))

    def gradients(number_format: str):
        """Trees of arrays, one for each batch."""
        config.model.compute_dtype = number_format
        model = make_model(config, len(prepared.tokenizer), prepared.prompt_encoder)
        step = make_train_step(config, model, make_mesh(1)).gradients.lower(state, batches[0][1]).compile()
        for number, batch in batches:
            at_step = state.replace(step=jax.numpy.int32(number))
            yield jax.device_get(step(at_step, batch).params)

    print(f"step {checkpoint} of {workdir}: {_BATCHES.value} batches of rows up to {batches[0][1].longest} tokens")
    exact = list(gradients("float32"))
    for number_format in _FORMATS.value:
        sums = GradientSums()
        for true, given in zip(exact, gradients(number_format), strict=True):
            sums.add(true, given)
        print(f"{number_format:>18}  one batch  mean of all  by chance  Muon's direction  by chance")
        for name, of in sums.comparisons().items():
            line = f"{name:>18}  {of.one_batch:9.4f}  {of.mean:11.4f}  {of.chance:9.4f}"
            if of.direction is not None:
                line += f"  {of.direction:16.4f}  {of.direction_chance:9.4f}"
            print(line, flush=True)


def _one_kind(source, first: int):
    """(step, batch) from a step on, of those steps whose batches are like the first: others need other programs."""
    longest = None
    for step in itertools.count(first):
        batch = source[step]
        longest = longest or batch.longest
        if batch.longest == longest:
            yield step, batch


if __name__ == "__main__":
    app.run(main, flags_parser=parser(__doc__, check))
