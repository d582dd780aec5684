"""What training changes from step to step, and the optimiser."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from sunfish_jax.diffusion.schedules import Schedule, make_schedule
from sunfish_jax.models.denoiser import TextDenoiser, init_params


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
    return optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, max(1, warmup_steps), num_steps)


def make_optimizer(config: ConfigDict, num_steps: int) -> optax.GradientTransformation:
    """AdamW with clipping; the embeddings have a rate of their own and no decay.

    Args:
      config: the `optimizer` group.
      num_steps: length of the run, at whose end the learning rate is zero.
    """

    def is_kernel(params):
        return jax.tree.map_with_path(lambda path, p: p.ndim > 1 and not _is_embedding(path), params)

    def embedding_rate(updates, state, params=None):
        del params
        scale = config.embedding_multiplier
        return jax.tree.map_with_path(lambda path, u: u * scale if _is_embedding(path) else u, updates), state

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(config.beta1, config.beta2),
        optax.add_decayed_weights(config.weight_decay, mask=is_kernel),
        optax.GradientTransformation(lambda params: optax.EmptyState(), embedding_rate),
        optax.scale_by_learning_rate(learning_rate_schedule(config, num_steps)),
    )


def _is_embedding(path) -> bool:
    return path[-1].key == "embedding"


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
    # One count is added to each so that an unseen token stays possible.
    frequencies = (token_counts + 1.0) / (token_counts + 1.0).sum()
    params["log_unigram"] = jnp.asarray(np.log(frequencies), jnp.float32)
    schedule = make_schedule(config.diffusion.schedule, model.embedding_dim, model.vocab_size)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        # A copy: the step donates its state, and one buffer cannot be donated twice.
        ema_params=jax.tree.map(jnp.copy, params),
        opt_state=make_optimizer(config.optimizer, config.train.num_steps).init(params),
        schedule=schedule,
        schedule_opt_state=make_schedule_optimizer(config.diffusion).init(schedule),
        key=step_key,
    )
