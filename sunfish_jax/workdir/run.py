"""A trained run, loaded from its workdir."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerFast

from sunfish_jax.data.tokenizer import load_tokenizer, tokenizer_identity
from sunfish_jax.diffusion.schedules import Schedule, make_schedule
from sunfish_jax.errors import UserError
from sunfish_jax.models.denoiser import TextDenoiser, init_params, make_model
from sunfish_jax.models.prompt_encoder import PromptEncoder, make_prompt_encoder
from sunfish_jax.workdir.checkpoints import Checkpoints
from sunfish_jax.workdir.config import load_config
from sunfish_jax.workdir.row_lengths import load_row_lengths

TOKENIZER_FOLDER = "tokenizer"
# Fingerprints of what the run was trained with: "data", "tokenizer", "prompt_encoder".
IDENTITY_FILE = "identity.json"


@dataclasses.dataclass(frozen=True)
class Run:
    """What generation and evaluation need of a run.

    Attributes:
        workdir: where it was loaded from.
        config: the saved configuration.
        tokenizer: of the texts.
        prompt_encoder: the one it was trained with.
        model: the denoiser.
        params: the moving average of its parameters.
        schedule: the noise schedule at that step.
        step: the checkpoint's step.
        data_identity: fingerprint of the text that it was trained on.
        row_lengths: how many rows of it have each length.
    """

    workdir: Path
    config: ConfigDict
    tokenizer: PreTrainedTokenizerFast
    prompt_encoder: PromptEncoder
    model: TextDenoiser
    params: Any
    schedule: Schedule
    step: int
    data_identity: str
    row_lengths: np.ndarray


def load_run(workdir: Path, checkpoint: str | int = "latest") -> Run:
    """Loads a run.

    Args:
        workdir: the run's folder.
        checkpoint: `latest`, `best` or a step.

    Raises:
        UserError: there is no run or no such checkpoint, or its parts do not belong together.
    """
    config = load_config(workdir)
    with Checkpoints(workdir) as checkpoints:
        step = checkpoints.resolve(checkpoint)
        tokenizer = load_tokenizer(workdir / TOKENIZER_FOLDER)
        prompt_encoder = make_prompt_encoder(config.prompt_encoder, tokenizer)
        identity = _checked_identity(workdir, tokenizer, prompt_encoder)
        model = make_model(config, len(tokenizer), prompt_encoder)
        schedule = make_schedule(config.diffusion.schedule, config.model.embedding_dim, len(tokenizer))
        abstract = {
            "ema_params": jax.eval_shape(lambda: init_params(model, jax.random.key(0))),
            "schedule": jax.eval_shape(lambda: schedule),
        }
        fields = checkpoints.restore(abstract, step)
    return Run(
        workdir=workdir,
        config=config,
        tokenizer=tokenizer,
        prompt_encoder=prompt_encoder,
        model=model,
        params=fields["ema_params"],
        schedule=fields["schedule"],
        step=step,
        data_identity=identity["data"],
        row_lengths=load_row_lengths(workdir),
    )


def saved_identity(workdir: Path) -> Mapping[str, str]:
    """What training wrote of its data, tokenizer and prompt encoder.

    Raises:
        UserError: it is not there or cannot be read.
    """
    path = workdir / IDENTITY_FILE
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        saved = {}
    if not isinstance(saved, dict) or not {"data", "tokenizer", "prompt_encoder"} <= set(saved):
        raise UserError(f"{path} is missing or damaged: put back the one that training wrote")
    return saved


def _checked_identity(
    workdir: Path, tokenizer: PreTrainedTokenizerFast, prompt_encoder: PromptEncoder
) -> Mapping[str, str]:
    """`saved_identity`, of which tokenizer and prompt encoder must be those here."""
    saved = saved_identity(workdir)
    here = {"tokenizer": tokenizer_identity(tokenizer), "prompt_encoder": prompt_encoder.identity}
    for name, identity in here.items():
        if saved[name] != identity:
            raise UserError(
                f"--workdir={workdir} was trained with the {name.replace('_', ' ')} {saved[name]!r}, and here is "
                f"{identity!r}: put back what it was trained with"
            )
    return saved
