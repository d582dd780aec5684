"""Where the figures and texts of a run are written: TensorBoard, the log, Weights & Biases."""

import html
import os
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from sunfish_jax.errors import UserError
from sunfish_jax.workdir import event_writer

# `clu.metric_writers` imports TensorFlow in this one submodule; ours has its place before the first import.
sys.modules.setdefault("clu.metric_writers.summary_writer", event_writer)

from clu import metric_writers  # noqa: E402

# Holds the W&B id of the run, under which it goes on when resumed.
WANDB_RUN_FILE = "wandb_run_id.txt"
# What the curves on W&B are drawn over. W&B's own count of steps never goes back, and would leave out the points
# that a resumed run makes again.
_WANDB_STEP = "step"


class WandbWriter(event_writer.SummaryWriter):
    """A CLU `MetricWriter` that sends scalars and texts to Weights & Biases."""

    def __init__(self, workdir: Path, name: str):
        """Starts the run of this workdir, or goes on with it when the workdir is resumed.

        Args:
            workdir: the run's folder; W&B keeps its files in `wandb/` there, offline ones included.
            name: the run's name on Weights & Biases.

        Raises:
            UserError: `wandb` is not installed, or cannot begin a run.
        """
        try:
            import wandb
        except ImportError:
            raise UserError(
                "logging.wandb is True but wandb is not installed: run `uv sync --extra wandb`, "
                "or leave out --config.logging.wandb"
            ) from None
        self._wandb = wandb
        id_file = workdir / WANDB_RUN_FILE
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4))
        try:
            self._run = wandb.init(
                project="sunfish_jax", name=name, dir=os.fspath(workdir), id=id_file.read_text(), resume="allow"
            )
        except wandb.Error as error:
            raise UserError(
                f"Weights & Biases cannot begin a run ({error}): run `wandb login`, set WANDB_MODE=offline, or "
                "leave out --config.logging.wandb"
            ) from error
        self._run.define_metric("*", step_metric=_WANDB_STEP)

    def write_scalars(self, step: int, scalars: Mapping[str, Any]):
        """Writes one point of each named curve."""
        self._run.log({name: float(value) for name, value in scalars.items()} | {_WANDB_STEP: int(step)})

    def write_texts(self, step: int, texts: Mapping[str, str]):
        """Writes texts as they are."""
        pages = {name: self._wandb.Html(f"<pre>{html.escape(text)}</pre>") for name, text in texts.items()}
        self._run.log(pages | {_WANDB_STEP: int(step)})

    def write_hparams(self, hparams: Mapping[str, Any]):
        """Writes the configuration."""
        self._run.config.update(dict(hparams), allow_val_change=True)

    def flush(self):
        """Weights & Biases sends by itself."""

    def close(self):
        """Ends the W&B run."""
        self._run.finish()


def make_writer(config: ConfigDict, workdir: Path, first_step: int = 0) -> metric_writers.MetricWriter:
    """The writer of a run's figures.

    Args:
        config: the whole configuration; `logging.wandb` and `logging.name` are read.
        workdir: TensorBoard's event files go here.
        first_step: the step the run goes on from; 0 for a new one.

    Returns:
        A CLU writer to TensorBoard, to the log (shown with `--verbosity=0`) and, if asked for, to W&B.

    Raises:
        UserError: W&B was asked for and is not installed, or cannot begin a run.
    """
    writers = [
        metric_writers.LoggingWriter(),
        event_writer.SummaryWriter(os.fspath(workdir), first_step),
    ]
    if config.logging.wandb:
        writers.append(WandbWriter(workdir, config.logging.name))
    return metric_writers.MultiWriter(writers)
