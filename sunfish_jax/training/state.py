"""What training changes from step to step, and the optimiser."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sunfish_jax.data.tokens import log_frequencies
from sunfish_jax.diffusion.schedules import Schedule, make_schedule
from sunfish_jax.models.denoiser import KERNEL_SUFFIXES, TABLES, TextDenoiser, init_params
from sunfish_jax.training.muon import scale_by_muon


@flax.struct.dataclass
class TrainState:
    """Everything a step reads and writes; a step is a function of this and of the batch alone.

    Attributes:
      step: [] int32, optimiser steps taken.
      params: the model's parameters, float32.
      ema_params: their exponential moving average, which evaluation and sampling use.
      opt_state: the optimiser's state.
      schedule: the noise schedule, itself fitted while training.
      schedule_opt_state: the state of the schedule's optimiser.
      key: the run's random key; step randomness is `fold_in(key, step)`.
    """

    step: jax.Array
    params: Any
    ema_params: Any
    opt_state: optax.OptState
    schedule: Schedule
    schedule_opt_state: optax.OptState
    key: jax.Array


def learning_rate_schedule(config: ConfigDict, num_steps: int) -> optax.Schedule:
    """Linear warm-up, then cosine decay to zero at `num_steps`; `config` is the `optimizer` group."""
    warmup_steps = min(config.warmup_steps, num_steps // 2)
    warmup_steps = max(1, warmup_steps)
    # A run of one step is all warm-up; optax wants some decay after it.
    return optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, warmup_steps, max(num_steps, warmup_steps + 1)
    )


def make_optimizer(
    config: ConfigDict, num_steps: int, compute_dtype: jnp.dtype, mesh: Mesh | None = None
) -> optax.GradientTransformation:
    """Muon for the kernels and Adam for the rest, or AdamW for all; clipped, tables of tokens at their own rate.

    Args:
      config: the `optimizer` group.
      num_steps: length of the run, at whose end the learning rate is zero.
      compute_dtype: what Muon's matrix products are computed in.
      mesh: the devices that share Muon's work; None for one.
    """
    adam = optax.scale_by_adam(config.beta1, config.beta2)
    if config.name == "muon":
        direction = optax.partition({True: scale_by_muon(compute_dtype, mesh), False: adam}, _is_kernel)
    else:
        direction = adam

    def table_rate(updates, params=None):
        del params
        scale = config.table_multiplier
        return jax.tree.map_with_path(lambda path, u: u * scale if path[-1].key in TABLES else u, updates)

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        direction,
        optax.add_decayed_weights(config.weight_decay, mask=_is_kernel),
        optax.stateless(table_rate),
        optax.scale_by_learning_rate(learning_rate_schedule(config, num_steps)),
    )


def _is_kernel(params: Any) -> Any:
    """True for the matrices that features are multiplied with, False for tables of tokens, taps and vectors."""
    return jax.tree.map_with_path(lambda path, p: p.ndim == 2 and path[-1].key.endswith(KERNEL_SUFFIXES), params)


def make_schedule_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """What fits the learned noise schedule; `config` is the `diffusion` group."""
    return optax.adam(config.schedule_learning_rate)


def create_state(config: ConfigDict, model: TextDenoiser, token_counts: np.ndarray | None = None) -> TrainState:
    """The state before the first step.

    Args:
      config: the whole configuration.
      model: the denoiser.
      token_counts: [V] how often each token occurs in the training text; None takes them for equally frequent.
    """
    if token_counts is None:
        token_counts = np.zeros(model.vocab_size)
    key = jax.random.key(config.train.seed)
    init_key, step_key = jax.random.split(key)
    params = init_params(model, init_key)
    params["log_unigram"] = jnp.asarray(log_frequencies(token_counts))
    schedule = make_schedule(config.diffusion.schedule, model.embedding_dim, model.vocab_size)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        # A copy: the step donates its state, and one buffer cannot be donated twice.
        ema_params=jax.tree.map(jnp.copy, params),
        opt_state=make_optimizer(config.optimizer, config.train.num_steps, model.dtype).init(params),
        schedule=schedule,
        schedule_opt_state=make_schedule_optimizer(config.diffusion).init(schedule),
        key=step_key,
    )
