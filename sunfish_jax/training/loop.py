"""The training loop: steps, and between them figures, samples and checkpoints."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
from clu import parameter_overview
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sunfish_jax.alone import alone_in
from sunfish_jax.data.batches import PackedBatch, batch_iterator
from sunfish_jax.errors import UserError
from sunfish_jax.ops.allocator import give_back_freed_memory
from sunfish_jax.ops.compute_dtype import fastest_compute_dtype
from sunfish_jax.training.init_from import init_state, init_tokenizer
from sunfish_jax.training.interrupt import StopRequest
from sunfish_jax.training.preparation import Prepared, begin_workdir, prepare_run
from sunfish_jax.training.sharding import make_mesh, state_shardings
from sunfish_jax.training.state import TrainState, create_state
from sunfish_jax.training.step import TrainStep, make_train_step
from sunfish_jax.training.watching import HELD_OUT_MEAN, Evaluate, Sample, Stopped, make_evaluate, make_sample
from sunfish_jax.workdir.checkpoints import CHECKPOINTS_FOLDER, Checkpoints
from sunfish_jax.workdir.config import check_resumable, load_config, record_config
from sunfish_jax.workdir.progress import Progress, format_seconds, load_totals, save_totals
from sunfish_jax.workdir.writers import make_writer, metric_writers

# Long steps are reported before `logging.every_steps` of them are done.
_SECONDS_BETWEEN_LINES = 30.0
# Between the pieces in use freed ones add up from step to step, to a quarter of a gigabyte with `micro`. There they
# are given back in 0.03 s.
_SECONDS_BETWEEN_GIVING_BACK = 5.0


def train(config: ConfigDict, workdir: Path) -> None:
    """Trains until `train.num_steps`, from where the run in `workdir` stopped if there is one.

    What a new run starts from, in this order: the newest checkpoint in `workdir`, `train.init_from`, chance.
    SIGINT, SIGTERM and a closed terminal end it after the running step, saved.

    Args:
        config: the whole configuration, validated.
        workdir: the run's folder.

    Raises:
        UserError: something that was given cannot be used, or the loss is not finite.
    """

    def refuse():
        raise UserError(
            f"another training is running in --workdir={workdir}: stop it first, or name another workdir"
        )

    with alone_in(workdir, refuse):
        _train(config, workdir)


def _train(config: ConfigDict, workdir: Path) -> None:
    first_step = _saved_step(workdir)
    saved = None if first_step is None else load_config(workdir)
    config = _with_compute_dtype(config, saved)
    if first_step is not None:
        check_resumable(saved, config)
        if first_step >= config.train.num_steps:
            _record_changes(config, workdir, first_step)
            print(
                f"the run in {workdir} is at step {first_step} of {config.train.num_steps} already: "
                "raise --config.train.num_steps to go on"
            )
            return
        prepared = prepare_run(config, resumed=workdir)
    else:
        prepared = prepare_run(config, init_tokenizer(config) if config.train.init_from else None)
    mesh = make_mesh(config.train.num_devices)
    source = prepared.training_batches(config)
    # The first batches are made while the state is read.
    batches = batch_iterator(source, first_step or 0, config.train.num_steps)
    with (
        Checkpoints(workdir, config.checkpoint) as checkpoints,
        contextlib.ExitStack() as stack,
    ):
        state = _first_state(config, workdir, prepared, mesh, checkpoints, first_step)
        print(parameter_overview.get_parameter_overview(state.params, include_stats=False), flush=True)
        writer = make_writer(config, workdir, first_step or 0)
        stack.callback(writer.close)
        writer.write_hparams(flatten_dict(config.to_dict(), sep="."))
        stop = stack.enter_context(StopRequest())
        loop = Loop(
            config=config,
            workdir=workdir,
            checkpoints=checkpoints,
            writer=writer,
            stop=stop,
            evaluate=make_evaluate(config, prepared, stop),
            sample=make_sample(config, prepared),
            progress=load_totals(workdir, first_step or 0, config.train.num_steps),
            steps_per_epoch=source.steps_per_epoch,
        )
        step = CompiledStep(make_train_step(config, prepared.model, mesh))
        loop.run(state, step, batches)


def _with_compute_dtype(config: ConfigDict, saved: ConfigDict | None) -> ConfigDict:
    """The configuration with `auto` resolved: as the saved run did, so that it goes on alike, or by measuring."""
    if config.model.compute_dtype != "auto":
        return config
    config = config.copy_and_resolve_references()
    if saved:
        config.model.compute_dtype, why = saved.model.compute_dtype, "as the run began"
    else:
        config.model.compute_dtype, why = fastest_compute_dtype(config.model.width), "the fastest here"
    print(f"computing in {config.model.compute_dtype}, {why}", flush=True)
    return config


def _saved_step(workdir: Path) -> int | None:
    if not (workdir / CHECKPOINTS_FOLDER).is_dir():
        return None
    with Checkpoints(workdir) as checkpoints:
        return checkpoints.latest_step()


def _first_state(
    config: ConfigDict,
    workdir: Path,
    prepared: Prepared,
    mesh: Mesh,
    checkpoints: Checkpoints,
    first_step: int | None,
) -> TrainState:
    """The state to go on from, laid out over the mesh; a new run's files are written from here on."""
    shapes = jax.eval_shape(lambda: create_state(config, prepared.model))
    shardings = state_shardings(shapes, mesh)
    if first_step is not None:
        abstract = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            shapes,
            shardings,
        )
        state = checkpoints.restore(abstract, first_step)
        print(f"resuming {config.logging.name} in {workdir} from step {first_step}")
        _record_changes(config, workdir, first_step)
        return state
    token_counts = prepared.token_counts()
    state = jax.jit(lambda: create_state(config, prepared.model, token_counts), out_shardings=shardings)()
    if config.train.init_from:
        state, origin = init_state(state, config, prepared.prompt_encoder)
        print(f"starting from the weights of {origin.workdir}, step {origin.step}")
    begin_workdir(workdir, config, prepared)
    return state


def _record_changes(config: ConfigDict, workdir: Path, step: int):
    """Keeps the configuration that a run goes on with (its samples too), and says what changed."""
    for key, (old, new) in record_config(workdir, config, step).items():
        print(f"  {key} was {old!r} and is {new!r} from here on")


def _drop_unowned_programs():
    """Gives back what JAX holds: of tracing, a fifth of what a program takes, and programs nobody else has."""
    jax.clear_caches()
    give_back_freed_memory()


class CompiledStep:
    """The training step, compiled once for each length that a batch's rows may have, before its first use there."""

    def __init__(self, step: TrainStep):
        self._step = step
        self._compiled = {}

    def compile(self, state: TrainState, batch: PackedBatch) -> float:
        """Compiles for the shape of `batch` if that was not done yet. Returns the seconds it took."""
        longest = batch.longest
        if longest in self._compiled:
            return 0.0
        began = time.monotonic()
        self._compiled[longest] = self._step.compile(state, batch)
        _drop_unowned_programs()
        seconds = time.monotonic() - began
        print(f"compiled the step for rows of up to {longest} tokens in {seconds:.1f}s", flush=True)
        return seconds

    def __call__(self, state: TrainState, batch: PackedBatch) -> tuple[TrainState, dict[str, float]]:
        """One optimiser step. The old state is given up; returns when the new one is computed."""
        state, metrics = self._compiled[batch.longest](state, batch)
        return state, {name: float(value) for name, value in jax.device_get(metrics).items()}


@dataclasses.dataclass
class Loop:
    """Steps, and what happens between them.

    Attributes:
        config: the whole configuration.
        workdir: the run's folder.
        checkpoints: where states are saved.
        writer: gets the figures and the samples.
        stop: whether to end after the running step.
        evaluate: held-out figures of a state.
        sample: texts from a state.
        progress: the steps done.
        steps_per_epoch: optimiser steps in one pass over the corpus.
    """

    config: ConfigDict
    workdir: Path
    checkpoints: Checkpoints
    writer: metric_writers.MetricWriter
    stop: StopRequest
    evaluate: Evaluate
    sample: Sample
    progress: Progress
    steps_per_epoch: int

    def __post_init__(self):
        self._losses: list[float] = []
        self._last_line = self._gave_back = -math.inf
        self._done_once: set[str] = set()

    def run(self, state: TrainState, train_step: CompiledStep, batches: Iterator[PackedBatch]) -> TrainState:
        """Trains until the last step, or until a stop is asked for. Either way the state is saved.

        Raises:
            UserError: the loss is not finite. Nothing is saved then.
            OSError: figures or lines cannot be written. The state is saved.
        """
        config, progress, stop = self.config, self.progress, self.stop
        first_step = progress.step
        while progress.step < progress.num_steps and not stop:
            try:
                began = time.monotonic()
                batch = next(batches)
                compiling = train_step.compile(state, batch)
                state, metrics = train_step(state, batch)
                self._give_back_memory()
                progress.add_compiling(compiling)
                progress.add_step(time.monotonic() - began - compiling, int(np.sum(batch.padding_mask)))
                self._check_finite(metrics)
                self._report(metrics)
                # A checkpoint is kept for its held-out loss, so that comes first; samples can wait.
                held_out = None
                if self._is_due(config.eval.every_steps) and not stop:
                    held_out = self._once_free("evaluate", lambda state=state: self._evaluate(state))
                # Of each evaluation, or the best state might be none that is kept.
                if self._is_due(config.checkpoint.every_steps) or held_out is not None:
                    self._save(state, held_out)
                if self._is_due(config.logging.sample_every_steps) and not stop:
                    self._once_free("sample", lambda state=state: self._show_samples(state))
            except BrokenPipeError:
                # `main.py ... | head`. The state is whole: nothing is printed while it is given up.
                stop.ask_without_output(1)
            except OSError:
                # A full disk, perhaps: there may be room for the state all the same.
                if progress.step > first_step:
                    self._save(state, None)
                raise
        if progress.step > first_step:
            self._save(state, None)
        if not progress.step:
            stop.tell("stopped before the first step: there was nothing to save")
        elif progress.step < progress.num_steps:
            stop.tell(
                f"stopped at step {progress.step} of {progress.num_steps}, saved in {self.workdir}: "
                "run the same command again to go on"
            )
        else:
            if stop:
                print("stopped at the last step: --mode=eval and --mode=sample make what is missing of its figures")
            print(
                f"trained to step {progress.step} in {format_seconds(progress.seconds)} of training "
                f"({progress.real_tokens:,} real tokens), saved in {self.workdir}",
                flush=True,
            )
        return state

    def _give_back_memory(self):
        now = time.monotonic()
        if now - self._gave_back >= _SECONDS_BETWEEN_GIVING_BACK:
            give_back_freed_memory()
            self._gave_back = now

    def _is_due(self, every_steps: int) -> bool:
        return self.progress.step % every_steps == 0 or self.progress.step == self.progress.num_steps

    def _once_free(self, name: str, action: Callable):
        """Does something whose first time is mostly compiling, and leaves that one out of the time left.

        Its programs are not kept for the next time, which is far: they would take 0.1 GB beside those of the step,
        and are back from the compilation cache in seconds.
        """
        began = time.monotonic()
        result = action()
        _drop_unowned_programs()
        if name not in self._done_once:
            self._done_once.add(name)
            self.progress.add_compiling(time.monotonic() - began)
        return result

    def _check_finite(self, metrics: Mapping[str, float]):
        broken = [f"{name}={value}" for name, value in metrics.items() if not math.isfinite(value)]
        if broken:
            last = self.checkpoints.latest_step()
            kept = "no checkpoint was saved yet" if last is None else f"the checkpoint of step {last} is untouched"
            raise UserError(
                f"the loss is not finite at step {self.progress.step} ({', '.join(broken)}); {kept}: "
                "run the same command with a lower --config.optimizer.learning_rate"
            )

    def _report(self, metrics: Mapping[str, float]):
        self._losses.append(metrics["loss"])
        progress, now = self.progress, time.monotonic()
        due = self._is_due(self.config.logging.every_steps)
        if not due and now - self._last_line < _SECONDS_BETWEEN_LINES:
            return
        loss, speed = sum(self._losses) / len(self._losses), progress.tokens_per_second()
        print(progress.line(loss, speed), flush=True)
        self._last_line = now
        self._losses.clear()
        scalars = {name if "/" in name else f"train/{name}": value for name, value in metrics.items()}
        scalars |= {
            "train/loss": loss,
            "train/tokens_per_second": speed,
            "train/seconds": progress.seconds,
            "train/real_tokens": progress.real_tokens,
            "train/epoch": progress.step / self.steps_per_epoch,
        }
        self.writer.write_scalars(step=progress.step, scalars=scalars)
        self.writer.flush()

    def _evaluate(self, state: TrainState) -> float | None:
        """Writes the held-out figures and returns their mean; None if a stop was asked for meanwhile."""
        try:
            figures = self.evaluate(state)
        except Stopped:
            return None
        self.writer.write_scalars(step=self.progress.step, scalars=figures)
        levels = "  ".join(
            f"{name.removeprefix('held_out/')} {value:.3f}"
            for name, value in figures.items()
            if name.startswith("held_out/")
        )
        print(f"held-out cross-entropy at step {self.progress.step}: {levels}", flush=True)
        return figures[HELD_OUT_MEAN]

    def _show_samples(self, state: TrainState):
        texts = self.sample(state)
        self.writer.write_texts(
            step=self.progress.step, texts={f"samples/{name}": text for name, text in texts.items()}
        )
        print(f"samples at step {self.progress.step}:")
        for name, text in texts.items():
            print(f"  [{name}] {' '.join(text.split())}", flush=True)

    def _save(self, state: TrainState, held_out: float | None):
        # Totals without a checkpoint do no harm; a checkpoint without totals would count from zero.
        save_totals(self.workdir, self.progress)
        metrics = None if held_out is None else {"held_out": held_out}
        self.checkpoints.save(self.progress.step, state, metrics)
