"""Training the twin within a budget: the denoiser's data and optimiser; the best by held-out loss is kept."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from ar_budget import Budget, learning_rate_share
from ar_likelihood import score
from ar_model import CausalTransformer, count_parameters, init_twin, make_twin
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from sunfish_jax.data.batches import PackedBatch, batch_iterator
from sunfish_jax.data.tokens import log_frequencies
from sunfish_jax.errors import UserError
from sunfish_jax.evaluation.text_rows import TextRows
from sunfish_jax.models.denoiser import compute_params
from sunfish_jax.ops.compute_dtype import fastest_compute_dtype
from sunfish_jax.ops.rows import PackedRows
from sunfish_jax.training.interrupt import StopRequest
from sunfish_jax.training.loop import CompiledStep
from sunfish_jax.training.preparation import Prepared, begin_workdir, prepare_run
from sunfish_jax.training.sharding import DATA_AXIS, make_mesh, state_shardings
from sunfish_jax.training.state import make_optimizer
from sunfish_jax.training.step import TrainStep, ema_decay
from sunfish_jax.training.watching import on_one_device
from sunfish_jax.workdir.checkpoints import CHECKPOINTS_FOLDER, Checkpoints
from sunfish_jax.workdir.config import check_resumable, has_config, load_config, record_config
from sunfish_jax.workdir.progress import Progress, format_seconds, load_totals, save_totals
from sunfish_jax.workdir.writers import make_writer, metric_writers

# An empty file that makes a run a twin's, in its workdir.
TWIN_FILE = "twin"
# The newest checkpoint, to go on from, and the best.
_KEPT = ConfigDict({"keep": 1, "keep_every_steps": 10**9})
# Steps over which the optimiser's own schedule decays: none that a run reaches.
_NO_DECAY = 2**30
_SECONDS_BETWEEN_LINES = 30.0


@flax.struct.dataclass
class TwinState:
    """Everything a step reads and writes.

    Attributes:
      step: [] int32, optimiser steps taken.
      params: the model's parameters, float32.
      ema_params: their exponential moving average, which is what is evaluated.
      opt_state: the optimiser's state.
      key: the run's random key; step randomness is `fold_in(key, step)`.
      learning_rate_share: [] float32, what the learning rate is multiplied with in the next step.
    """

    step: jax.Array
    params: Any
    ema_params: Any
    opt_state: optax.OptState
    key: jax.Array
    learning_rate_share: jax.Array


@dataclasses.dataclass(frozen=True)
class Twin:
    """A trained twin.

    Attributes:
      workdir: where it was loaded from.
      config: the saved configuration.
      prepared: its data, tokenizer and prompt encoder, and the denoiser that it is the twin of.
      model: the network.
      params: the moving average of its parameters.
      step: the checkpoint's step.
      progress: time and tokens up to that step.
    """

    workdir: Path
    config: ConfigDict
    prepared: Prepared
    model: CausalTransformer
    params: Any
    step: int
    progress: Progress

    @property
    def prompt_encoder(self):
        """The one it was trained with."""
        return self.prepared.prompt_encoder


def open_twin(workdir: Path, checkpoint: str = "best") -> Twin:
    """Loads a twin from its workdir.

    Args:
      workdir: the run's folder.
      checkpoint: `best` by held-out loss, `latest`, or a step.

    Raises:
      UserError: there is no twin, or no such checkpoint.
    """
    if not (workdir / TWIN_FILE).is_file():
        raise UserError(f"--workdir={workdir} holds no autoregressive twin: name another folder")
    config = load_config(workdir)
    prepared = prepare_run(config, resumed=workdir)
    model = make_twin(prepared.model, prepared.tokenizer.eos_token_id)
    abstract = jax.eval_shape(lambda: init_twin(model, jax.random.key(0)))
    with Checkpoints(workdir) as checkpoints:
        step = checkpoints.resolve(checkpoint)
        params = checkpoints.restore({"ema_params": abstract}, step)["ema_params"]
    return Twin(workdir, config, prepared, model, params, step, load_totals(workdir, step, 0))


def create_twin_state(config: ConfigDict, model: CausalTransformer, token_counts: np.ndarray) -> TwinState:
    """The state before the first step; token_counts [V] is how often each token occurs in the training text."""
    init_key, step_key = jax.random.split(jax.random.key(config.train.seed))
    params = init_twin(model, init_key)
    params["log_unigram"] = jnp.asarray(log_frequencies(token_counts))
    return TwinState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        # A copy: the step donates its state, and one buffer cannot be donated twice.
        ema_params=jax.tree.map(jnp.copy, params),
        opt_state=make_full_rate_optimizer(config.optimizer, model).init(params),
        key=step_key,
        learning_rate_share=jnp.ones(()),
    )


def make_full_rate_optimizer(config: ConfigDict, model: CausalTransformer) -> optax.GradientTransformation:
    """The denoiser's, always at the full learning rate: the share of it goes by the budget, not by steps alone."""
    config = config.copy_and_resolve_references()
    config.warmup_steps = 0
    return make_optimizer(config, _NO_DECAY, model.dtype)


def make_twin_step(config: ConfigDict, model: CausalTransformer, mesh: Mesh) -> TrainStep:
    """The step of a `TwinState`, as `sunfish_jax.training.step.make_train_step` makes the denoiser's.

    Every real token is predicted; nothing follows an end of text that would have to be learned.

    Returns:
      The step; its scalars are `loss` (nats a token) and `grad_norm`.
    """
    optimizer = make_full_rate_optimizer(config.optimizer, model)

    def batch_gradients(state: TwinState, batch: PackedBatch):
        dropout_key, prompt_key = jax.random.split(jax.random.fold_in(state.key, state.step))
        dropout_seeds = jax.random.bits(dropout_key, batch.tokens.shape[:2])
        prompted = jax.random.uniform(prompt_key, batch.lengths.shape) >= config.diffusion.conditioning_dropout
        batch = batch.replace(prompt=batch.prompt.replace(mask=batch.prompt.mask & prompted[..., None]))
        num_targets = jnp.sum(batch.padding_mask).astype(jnp.float32)
        grads, nats = summed_gradients(compute_params(state.params, model.dtype), batch, dropout_seeds, num_targets)
        return grads, nats.sum() / num_targets

    def update(state: TwinState, gradients) -> tuple[TwinState, dict[str, jax.Array]]:
        grads, loss = gradients
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        updates = jax.tree.map(lambda update: state.learning_rate_share * update, updates)
        params = optax.apply_updates(state.params, updates)
        decay = ema_decay(config.optimizer.ema_decay, state.step)
        ema_params = jax.tree.map(lambda e, p: e + (1.0 - decay) * (p - e), state.ema_params, params)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        next_state = state.replace(step=state.step + 1, params=params, ema_params=ema_params, opt_state=opt_state)
        return next_state, metrics

    def microbatch_loss(params, packs: PackedBatch, dropout_seeds, num_targets):
        variables = {"params": params}
        prompts = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), packs.prompt)
        keys_values = model.apply(variables, prompts, method="encode_prompt")
        rows = PackedRows.in_packs(packs.lengths, packs.tokens.shape[-1], packs.longest)
        packing = {"packed": rows, "dropout_seeds": dropout_seeds}
        losses = model.apply(variables, packs.tokens, keys_values, **packing, method="cross_entropy")
        nats = jnp.sum(losses * packs.padding_mask)
        return nats / num_targets, nats

    def device_gradients(params, batch: PackedBatch, dropout_seeds, num_targets):
        """Gradients of the mean loss, and the nats of each of this device's microbatches."""

        def accumulate(total, microbatch):
            (_, nats), grads = jax.value_and_grad(microbatch_loss, has_aux=True)(params, *microbatch, num_targets)
            return jax.tree.map(lambda t, g: t + g.astype(jnp.float32), total, grads), nats

        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        grads, nats = jax.lax.scan(accumulate, zeros, (batch, dropout_seeds))
        return jax.lax.psum(grads, DATA_AXIS), jax.lax.psum(nats, DATA_AXIS)

    packs = P(None, DATA_AXIS)
    summed_gradients = jax.shard_map(
        device_gradients, mesh=mesh, in_specs=(P(), packs, packs, P()), out_specs=(P(), P()), check_vma=False
    )
    no_counts = np.zeros(model.vocab_size)
    shardings = state_shardings(jax.eval_shape(lambda: create_twin_state(config, model, no_counts)), mesh)
    gradient_shardings = shardings.params, NamedSharding(mesh, P())
    return TrainStep.sharded(batch_gradients, update, mesh, shardings, gradient_shardings, model.dtype)


def train(config: ConfigDict, workdir: Path, *, budget: Budget, eval_every: int) -> bool:
    """Trains until the budget is spent, from where the run in `workdir` stopped if there is one.

    Compiling, evaluating and saving do not count, as they do not for the denoiser. The learning rate falls to
    zero with what is left. SIGINT and SIGTERM end it after the running step, saved.

    Args:
      config: the whole configuration, validated.
      workdir: the run's folder.
      budget: of all sittings together.
      eval_every: steps between two evaluations.

    Returns:
      Whether the budget is spent, rather than a stop asked for.

    Raises:
      UserError: something that was given cannot be used, or the loss is not finite.
    """
    if has_config(workdir) and not (workdir / TWIN_FILE).is_file():
        raise UserError(f"--workdir={workdir} holds a run that is no twin: name another folder")
    resuming = _has_checkpoint(workdir)
    saved = load_config(workdir) if resuming else None
    if config.model.compute_dtype == "int8":
        raise UserError("config.model.compute_dtype='int8' is for the denoiser: give the twin bfloat16 or float32")
    if config.model.compute_dtype == "auto":
        config.model.compute_dtype = saved.model.compute_dtype if saved else fastest_compute_dtype()
    if resuming:
        check_resumable(saved, config)
    prepared = prepare_run(config, resumed=workdir if resuming else None)
    model = make_twin(prepared.model, prepared.tokenizer.eos_token_id)
    print(
        f"the twin: {count_parameters(model):,} trainable parameters, feed-forward {model.mlp_ratio} times the "
        f"width, products in {model.dtype.name}; the denoiser: {count_parameters(prepared.model):,}",
        flush=True,
    )
    mesh = make_mesh(config.train.num_devices)

    def create() -> TwinState:
        return create_twin_state(config, model, prepared.token_counts())

    shapes = jax.eval_shape(create)
    shardings = state_shardings(shapes, mesh)
    with Checkpoints(workdir, _KEPT) as checkpoints, contextlib.ExitStack() as stack:
        if resuming:
            abstract = jax.tree.map(
                lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
                shapes,
                shardings,
            )
            first_step = checkpoints.resolve("latest")
            state = checkpoints.restore(abstract, first_step)
            progress = load_totals(workdir, first_step, 0)
            if budget.spent(progress) >= 1.0:
                # It is only evaluated, as what it was trained as.
                config.model.dropout = saved.model.dropout
            record_config(workdir, config, first_step)
        else:
            first_step, progress = 0, load_totals(workdir, 0, 0)
            state = jax.jit(create, out_shardings=shardings)()
            begin_workdir(workdir, config, prepared)
            (workdir / TWIN_FILE).touch()
        writer = make_writer(config, workdir, first_step)
        stack.callback(writer.close)
        loop = TwinLoop(
            budget=budget,
            warmup_steps=config.optimizer.warmup_steps,
            eval_every=eval_every,
            every_steps=config.logging.every_steps,
            workdir=workdir,
            checkpoints=checkpoints,
            writer=writer,
            stop=stack.enter_context(StopRequest()),
            evaluate=make_evaluate(config, prepared, model),
            progress=progress,
        )
        batches = batch_iterator(prepared.training_batches(config), first_step)
        loop.run(state, CompiledStep(make_twin_step(config, model, mesh)), batches)
        return loop.finished


def _has_checkpoint(workdir: Path) -> bool:
    if not (workdir / CHECKPOINTS_FOLDER).is_dir():
        return False
    with Checkpoints(workdir) as checkpoints:
        return checkpoints.latest_step() is not None


def make_evaluate(
    config: ConfigDict, prepared: Prepared, model: CausalTransformer
) -> Callable[[TwinState], dict[str, float]]:
    """Makes the evaluation of a state on the validation rows that the denoiser is evaluated on as well.

    Returns:
      A function of a state to `nats_per_token` and `bits_per_byte`, with the rows' prompts.
    """
    text = TextRows.of(prepared.splits["validation"], config.eval.num_rows, config, prepared.prompt_encoder)

    def evaluate(state: TwinState) -> dict[str, float]:
        scored = score(model, on_one_device(state.ema_params), text)
        return {"nats_per_token": scored.nats_per_token, "bits_per_byte": scored.bits_per_byte().value}

    return evaluate


@dataclasses.dataclass
class TwinLoop:
    """Steps until the budget is spent, and evaluations between them.

    Attributes:
      budget: over all sittings.
      warmup_steps: over which the learning rate rises, or half the budget, whichever is shorter.
      eval_every: steps between two evaluations; each is saved.
      every_steps: steps between two lines, if that takes no longer than half a minute.
      workdir: the run's folder.
      checkpoints: where states are saved.
      writer: gets the figures.
      stop: whether to end after the running step.
      evaluate: held-out figures of a state, `nats_per_token` and `bits_per_byte`.
      progress: the steps done.
    """

    budget: Budget
    warmup_steps: int
    eval_every: int
    every_steps: int
    workdir: Path
    checkpoints: Checkpoints
    writer: metric_writers.MetricWriter
    stop: StopRequest
    evaluate: Callable[[TwinState], dict[str, float]]
    progress: Progress

    def __post_init__(self):
        self._losses: list[float] = []
        self._last_line = -math.inf

    @property
    def finished(self) -> bool:
        """Whether the budget is spent."""
        return self.budget.spent(self.progress) >= 1.0

    def run(self, state: TwinState, step: CompiledStep, batches: Iterator[PackedBatch]) -> TwinState:
        """Trains until the budget is spent, or until a stop is asked for; either way the state is saved.

        Raises:
          UserError: the loss is not finite. Nothing is saved then.
        """
        progress = self.progress
        evaluated = True
        while not self.finished and not self.stop:
            began = time.monotonic()
            batch = next(batches)
            compiling = step.compile(state, batch)
            # By what the steps before spent.
            share = learning_rate_share(self.budget.spent(progress), progress.step, self.warmup_steps)
            state = state.replace(learning_rate_share=_like(state.learning_rate_share, share))
            state, metrics = step(state, batch)
            progress.add_step(time.monotonic() - began - compiling, int(np.sum(batch.padding_mask)))
            self._report(metrics)
            evaluated = progress.step % self.eval_every == 0 and not self.stop
            if evaluated:
                self._evaluate_and_save(state)
        if self.finished and not evaluated:
            self._evaluate_and_save(state)
        elif not self.finished:
            self._save(state, None)
            print(
                f"stopped at step {progress.step}, {self.budget.spent(progress):.0%} of the way, saved in "
                f"{self.workdir}: run the same command again to go on",
                flush=True,
            )
        return state

    def _report(self, metrics: dict[str, float]):
        progress = self.progress
        if not math.isfinite(metrics["loss"]):
            raise UserError(
                f"the loss is not finite at step {progress.step} (loss={metrics['loss']}): run the same command "
                "with a lower --config.optimizer.learning_rate"
            )
        self._losses.append(metrics["loss"])
        now = time.monotonic()
        due = progress.step % self.every_steps == 0 or self.finished
        if not due and now - self._last_line < _SECONDS_BETWEEN_LINES:
            return
        loss, speed = sum(self._losses) / len(self._losses), progress.tokens_per_second()
        left = format_seconds(self.budget.seconds_left(progress))
        print(f"step {progress.step}  loss {loss:.4f}  {speed:,.0f} tokens/s  {left} left", flush=True)
        scalars = {
            "train/loss": loss,
            "train/grad_norm": metrics["grad_norm"],
            "train/tokens_per_second": speed,
            "train/seconds": progress.seconds,
            "train/real_tokens": progress.real_tokens,
        }
        self.writer.write_scalars(step=progress.step, scalars=scalars)
        self.writer.flush()
        self._last_line = now
        self._losses.clear()

    def _evaluate_and_save(self, state: TwinState):
        figures = self.evaluate(state)
        step = self.progress.step
        self.writer.write_scalars(step=step, scalars={f"held_out/{name}": value for name, value in figures.items()})
        self._save(state, figures["nats_per_token"])
        print(
            f"held out at step {step}: {figures['nats_per_token']:.4f} nats a token, "
            f"{figures['bits_per_byte']:.4f} bits per byte (best at step {self.checkpoints.best_step()})",
            flush=True,
        )

    def _save(self, state: TwinState, held_out: float | None):
        metrics = None if held_out is None else {"held_out": held_out}
        save_totals(self.workdir, self.progress)
        self.checkpoints.save(self.progress.step, state, metrics)


def _like(old: jax.Array, value: float) -> jax.Array:
    return jax.device_put(jnp.asarray(value, old.dtype), old.sharding)
