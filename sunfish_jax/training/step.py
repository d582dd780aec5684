"""One optimiser step: (state, batch) -> (state, metrics)."""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from sunfish_jax.data.batches import PackedBatch
from sunfish_jax.diffusion.process import noise_quantiles, stratified_uniforms
from sunfish_jax.diffusion.schedules import Schedule, fit_schedule
from sunfish_jax.models.denoiser import TextDenoiser, compute_params
from sunfish_jax.ops.eigen import compiler_options
from sunfish_jax.training.passes import device_gradients, have_given, targets
from sunfish_jax.training.sharding import DATA_AXIS, batch_sharding, state_shardings
from sunfish_jax.training.state import (
    TrainState,
    create_state,
    learning_rate_schedule,
    make_optimizer,
    make_schedule_optimizer,
)


class TrainStep:
    """An optimiser step in two programs, of which only the first depends on the shape of the batch.

    A large step takes a program of some hundred megabytes and half a minute to compile. What of that is the
    optimiser's is there once, not for each shape.

    Attributes:
      gradients: jitted, (state, batch) to a pytree whose shapes are the same for every batch.
      update: jitted, (state, gradients) to the next state, giving up the old one, and float32 scalars by name.
    """

    def __init__(self, gradients: Callable, update: Callable):
        self.gradients, self.update = gradients, update
        self._compiled_update = None

    @classmethod
    def sharded(
        cls,
        gradients: Callable,
        update: Callable,
        mesh: Mesh,
        state_shardings: Any,
        gradient_shardings: Any,
        dtype: jnp.dtype,
    ) -> "TrainStep":
        """Jits the two functions for a state and gradients that lie on the mesh in this way.

        `dtype` is that of the gradients' products. The update's, of many small matrices, gain nothing in Eigen.
        """
        return cls(
            jax.jit(
                gradients,
                in_shardings=(state_shardings, batch_sharding(mesh)),
                out_shardings=gradient_shardings,
                compiler_options=compiler_options(dtype),
            ),
            jax.jit(
                update,
                donate_argnums=0,
                in_shardings=(state_shardings, gradient_shardings),
                out_shardings=(state_shardings, None),
            ),
        )

    def __call__(self, state: Any, batch: PackedBatch) -> tuple[Any, dict[str, jax.Array]]:
        """The next state and scalars by name; the old state is given up."""
        return self.update(state, self.gradients(state, batch))

    def compile(
        self, state: Any, batch: PackedBatch
    ) -> Callable[[Any, PackedBatch], tuple[Any, dict[str, jax.Array]]]:
        """The same function, compiled for batches of this shape."""
        lowered = self.gradients.lower(state, batch)
        # Compiling, or reading what was compiled before, is XLA's work, beside which Python can trace the update.
        with ThreadPoolExecutor(1) as thread:
            compiling = thread.submit(lowered.compile)
            if self._compiled_update is None:
                self._compiled_update = self.update.lower(state, lowered.out_info).compile()
        gradients, update = compiling.result(), self._compiled_update
        return lambda state, batch: update(state, gradients(state, batch))


@flax.struct.dataclass
class BatchGradients:
    """What an optimiser step takes from its batch.

    Attributes:
      params: gradients of the mean loss, float32, with the parameters' tree.
      loss: [] mean cross-entropy over the positions to predict.
      schedule: the noise schedule, fitted to the losses of the batch's rows.
      schedule_opt_state: the state of its optimiser.
    """

    params: Any
    loss: jax.Array
    schedule: Schedule
    schedule_opt_state: optax.OptState


def make_train_step(config: ConfigDict, model: TextDenoiser, mesh: Mesh) -> TrainStep:
    """The step of a `TrainState`.

    Args:
      config: the whole configuration.
      model: the denoiser.
      mesh: one axis named "data", over which each microbatch's packs are split.

    Returns:
      The step; its scalars are `loss` (mean cross-entropy over the positions to predict), `grad_norm`,
      `learning_rate` and the schedule's parameters.
    """
    optimizer = make_optimizer(config.optimizer, config.train.num_steps, model.dtype, mesh)
    schedule_optimizer = make_schedule_optimizer(config.diffusion)
    learning_rate = learning_rate_schedule(config.optimizer, config.train.num_steps)

    def vocabulary_of(params):
        return model.apply({"params": params}, method="vocabulary")

    def batch_gradients(state: TrainState, batch: PackedBatch) -> BatchGradients:
        gamma_key, *pack_keys = jax.random.split(jax.random.fold_in(state.key, state.step), 4)
        shape = batch.lengths.shape
        uniforms, given = stratified_uniforms(gamma_key, math.prod(shape)).reshape(shape), have_given(batch)
        gamma = state.schedule.gamma(noise_quantiles(uniforms, given))
        num_targets = jnp.maximum(1, jnp.sum(targets(batch.lengths, batch.known_mask))).astype(jnp.float32)
        narrow = compute_params(state.params, model.dtype)
        vocabulary, to_params = jax.vjp(vocabulary_of, state.params)
        (grads, of_vocabulary), of_rows = summed_gradients(
            narrow, vocabulary, batch, gamma, jnp.stack(pack_keys), state.step, num_targets
        )
        # The parameters of which the vocabulary is made are read through it alone.
        (through_vocabulary,) = to_params(jax.tree.map(lambda g, v: g.astype(v.dtype), of_vocabulary, vocabulary))
        grads = jax.tree.map(jnp.add, grads, through_vocabulary)

        losses, num_predicted = of_rows.reshape(-1, 2).T
        # Rows with given tokens are easier at the same gamma: the schedule describes the others.
        plain = ~given.ravel() & (num_predicted > 0)
        mean_losses = losses / jnp.maximum(1, num_predicted)
        schedule, schedule_opt_state = fit_schedule(
            state.schedule,
            state.schedule_opt_state,
            schedule_optimizer,
            gamma.ravel(),
            mean_losses,
            plain.astype(jnp.float32),
        )
        return BatchGradients(grads, losses.sum() / num_targets, schedule, schedule_opt_state)

    def update(state: TrainState, gradients: BatchGradients) -> tuple[TrainState, dict[str, jax.Array]]:
        updates, opt_state = optimizer.update(gradients.params, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = ema_decay(config.optimizer.ema_decay, state.step)
        ema_params = jax.tree.map(lambda e, p: e + (1.0 - decay) * (p - e), state.ema_params, params)
        metrics = {
            "loss": gradients.loss,
            "grad_norm": optax.tree.norm(gradients.params),
            "learning_rate": learning_rate(state.step),
            **{f"schedule/{name}": value for name, value in vars(state.schedule).items()},
        }
        next_state = TrainState(
            step=state.step + 1,
            params=params,
            ema_params=ema_params,
            opt_state=opt_state,
            schedule=gradients.schedule,
            schedule_opt_state=gradients.schedule_opt_state,
            key=state.key,
        )
        return next_state, metrics

    def gradients_of_all_devices(*arguments):
        gradients, of_rows = device_gradients(model, config.diffusion, *arguments)
        # A sum over one device would be a second copy of all gradients.
        return gradients if mesh.size == 1 else jax.lax.psum(gradients, DATA_AXIS), of_rows

    packs = P(None, DATA_AXIS)
    summed_gradients = jax.shard_map(
        gradients_of_all_devices,
        mesh=mesh,
        in_specs=(P(), P(), packs, packs, P(), P(), P()),
        out_specs=(P(), packs),
        check_vma=False,
    )
    shardings = state_shardings(jax.eval_shape(lambda: create_state(config, model)), mesh)
    whole = NamedSharding(mesh, P())
    gradient_shardings = BatchGradients(shardings.params, whole, shardings.schedule, shardings.schedule_opt_state)
    return TrainStep.sharded(batch_gradients, update, mesh, shardings, gradient_shardings, model.dtype)


def ema_decay(decay: float, step: jax.Array) -> jax.Array:
    """The decay at a step: small at first, so that the average forgets the initial parameters."""
    return jnp.minimum(decay, (1.0 + step) / (10.0 + step))
