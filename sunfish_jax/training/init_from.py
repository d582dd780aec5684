"""Starting a new run from another run's weights: `train.init_from`."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from sunfish_jax.errors import UserError
from sunfish_jax.models.prompt_encoder import PromptEncoder
from sunfish_jax.training.state import TrainState
from sunfish_jax.workdir.checkpoints import Checkpoints
from sunfish_jax.workdir.config import changed_keys, has_config, load_config
from sunfish_jax.workdir.run import TOKENIZER_FOLDER, Run, load_run

# Keys of these groups decide what the weights mean ...
_GROUPS = ("model", "prompt_encoder")
# ... but for those that only say how much is computed, and where files are.
_FREE_KEYS = {
    "model.block_size",
    "model.dropout",
    "model.compute_dtype",
    "model.remat",
    "prompt_encoder.max_length",
    "prompt_encoder.path",
}


def split_init_from(value: str) -> tuple[Path, str]:
    """`WORKDIR` or `WORKDIR@STEP` as the folder and the checkpoint: `latest`, `best` or a number."""
    folder, _, checkpoint = value.rpartition("@")
    if folder and (checkpoint.isdecimal() or checkpoint in ("latest", "best")):
        return Path(os.path.expanduser(folder)), checkpoint
    return Path(os.path.expanduser(value)), "latest"


def init_tokenizer(config: ConfigDict) -> Path:
    """The saved tokenizer of the run that `train.init_from` names: its embeddings belong to no other.

    Raises:
        UserError: there is no such run or checkpoint, it has another architecture, or another tokenizer is asked
            for.
    """
    workdir, checkpoint = split_init_from(config.train.init_from)
    if not has_config(workdir):
        raise UserError(
            f"train.init_from={config.train.init_from}: {workdir} holds no run; give another run's workdir, "
            "or WORKDIR@STEP"
        )
    saved = load_config(workdir)
    # One that is trained has learned its positions one by one.
    trained = {"prompt_encoder.max_length"} if config.prompt_encoder.name == "transformer" else set()
    differing = [
        f"{key} is {old!r} there and {new!r} here"
        for key, (old, new) in changed_keys(saved, config).items()
        if key.partition(".")[0] in _GROUPS and key not in _FREE_KEYS - trained
    ]
    if differing:
        raise UserError(
            f"train.init_from={config.train.init_from} is of another architecture: {'; '.join(differing)}; "
            "give the same values here"
        )
    if config.tokenizer.path:
        raise UserError(
            f"tokenizer.path={config.tokenizer.path} and train.init_from={config.train.init_from} were both "
            "given: leave out tokenizer.path, since weights belong to the tokenizer they were trained with"
        )
    with Checkpoints(workdir) as checkpoints:
        checkpoints.resolve(checkpoint)
    return workdir / TOKENIZER_FOLDER


def init_state(state: TrainState, config: ConfigDict, prompt_encoder: PromptEncoder) -> tuple[TrainState, Run]:
    """Puts the averaged weights of another run into a new state; the optimiser starts afresh.

    A learned noise schedule comes along, as fitted, where both runs have one of the same kind.

    Returns:
        The state at step 0, and the run that the weights are from.

    Raises:
        UserError: the run cannot be loaded, or was trained with another prompt encoder than `prompt_encoder`.
    """
    workdir, checkpoint = split_init_from(config.train.init_from)
    run = load_run(workdir, checkpoint)
    if run.prompt_encoder.identity != prompt_encoder.identity:
        raise UserError(
            f"train.init_from={config.train.init_from} was trained with the prompt encoder "
            f"{run.prompt_encoder.identity!r}, and here is {prompt_encoder.identity!r}: give the "
            "prompt_encoder.path that it was trained with"
        )

    def like(new, old):
        return jax.tree.map(lambda n, o: jax.device_put(jnp.asarray(o, n.dtype), n.sharding), new, old)

    same_kind = run.config.diffusion.schedule == config.diffusion.schedule
    return (
        state.replace(
            params=like(state.params, run.params),
            # Arrays of its own: the step donates its state, and one buffer cannot be donated twice.
            ema_params=jax.tree.map(jnp.copy, like(state.ema_params, run.params)),
            schedule=like(state.schedule, run.schedule) if same_kind else state.schedule,
        ),
        run,
    )
