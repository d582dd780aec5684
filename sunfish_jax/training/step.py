"""One optimiser step: (state, batch) -> (state, metrics)."""

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

from sunfish_jax.data.batches import Batch
from sunfish_jax.diffusion.noisy_rows import NoisyRows, first_estimate
from sunfish_jax.diffusion.process import stratified_uniforms
from sunfish_jax.diffusion.schedules import Schedule, fit_schedule
from sunfish_jax.models.denoiser import TextDenoiser, compute_params
from sunfish_jax.training.sharding import DATA_AXIS, batch_sharding, state_shardings
from sunfish_jax.training.state import (
    TrainState,
    create_state,
    learning_rate_schedule,
    make_optimizer,
    make_schedule_optimizer,
)


class TrainStep:
    """An optimiser step in two programs, of which only the first depends on the row length.

    A large step takes a program of some hundred megabytes and ten seconds to compile, a third of it for the
    optimiser: that third is there once, not for each row length.

    Attributes:
      gradients: jitted, (state, batch) to a pytree whose shapes are the same for every batch.
      update: jitted, (state, gradients) to the next state, giving up the old one, and float32 scalars by name.
    """

    def __init__(self, gradients: Callable, update: Callable):
        self.gradients, self.update = gradients, update
        self._compiled_update = None

    @classmethod
    def sharded(
        cls, gradients: Callable, update: Callable, mesh: Mesh, state_shardings: Any, gradient_shardings: Any
    ) -> "TrainStep":
        """Jits the two functions for a state and gradients that lie on the mesh in this way."""
        return cls(
            jax.jit(
                gradients, in_shardings=(state_shardings, batch_sharding(mesh)), out_shardings=gradient_shardings
            ),
            jax.jit(
                update,
                donate_argnums=0,
                in_shardings=(state_shardings, gradient_shardings),
                out_shardings=(state_shardings, None),
            ),
        )

    def __call__(self, state: Any, batch: Batch) -> tuple[Any, dict[str, jax.Array]]:
        """The next state and scalars by name; the old state is given up."""
        return self.update(state, self.gradients(state, batch))

    def compile(self, state: Any, batch: Batch) -> Callable[[Any, Batch], tuple[Any, dict[str, jax.Array]]]:
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
      mesh: one axis named "data", over which each microbatch's rows are split.

    Returns:
      The step; its scalars are `loss` (mean cross-entropy over the positions to predict), `grad_norm`,
      `learning_rate` and the schedule's parameters.
    """
    optimizer = make_optimizer(config.optimizer, config.train.num_steps, model.dtype)
    schedule_optimizer = make_schedule_optimizer(config.diffusion)
    learning_rate = learning_rate_schedule(config.optimizer, config.train.num_steps)

    def batch_gradients(state: TrainState, batch: Batch) -> BatchGradients:
        gamma_key, *row_keys = jax.random.split(jax.random.fold_in(state.key, state.step), 4)
        shape = batch.tokens.shape[:2]
        gamma = state.schedule.gamma(stratified_uniforms(gamma_key, shape[0] * shape[1])).reshape(shape)
        # Every position but the given ones is predicted, the few padded ones too: they teach where texts end.
        num_targets = jnp.maximum(1, jnp.sum(~batch.known_mask)).astype(jnp.float32)
        narrow = compute_params(state.params, model.dtype)
        grads, row_losses = summed_gradients(narrow, batch, gamma, jnp.stack(row_keys), num_targets)

        targets = jnp.sum(~batch.known_mask, axis=-1)
        # Rows with given tokens are easier at the same gamma: the schedule describes the others.
        plain = (targets == batch.tokens.shape[-1]).astype(jnp.float32).ravel()
        mean_losses = (row_losses / jnp.maximum(1, targets)).ravel()
        schedule, schedule_opt_state = fit_schedule(
            state.schedule, state.schedule_opt_state, schedule_optimizer, gamma.ravel(), mean_losses, plain
        )
        return BatchGradients(grads, row_losses.sum() / num_targets, schedule, schedule_opt_state)

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

    def device_gradients(params, batch: Batch, gamma, row_keys, num_targets):
        """Gradients of the mean loss, and each row's summed loss, from this device's rows of every microbatch."""
        local_rows = gamma.shape[1]
        all_rows = local_rows * jax.lax.axis_size(DATA_AXIS)
        loss_and_gradient = jax.value_and_grad(microbatch_loss, argnums=1, has_aux=True)

        def accumulate(total, microbatch):
            index, rows, row_gamma = microbatch
            first_row = index * all_rows + jax.lax.axis_index(DATA_AXIS) * local_rows
            (_, row_losses), grads = loss_and_gradient(
                model, params, config.diffusion, rows, row_gamma, row_keys, first_row, num_targets
            )
            return jax.tree.map(lambda t, g: t + g.astype(jnp.float32), total, grads), row_losses

        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        microbatches = (jnp.arange(gamma.shape[0]), batch, gamma)
        grads, row_losses = jax.lax.scan(accumulate, zeros, microbatches)
        # A sum over one device would be a second copy of all gradients.
        return grads if mesh.size == 1 else jax.lax.psum(grads, DATA_AXIS), row_losses

    rows = P(None, DATA_AXIS)
    summed_gradients = jax.shard_map(
        device_gradients,
        mesh=mesh,
        in_specs=(P(), rows, rows, P(), P()),
        out_specs=(P(), rows),
        check_vma=False,
    )
    shardings = state_shardings(jax.eval_shape(lambda: create_state(config, model)), mesh)
    whole = NamedSharding(mesh, P())
    gradient_shardings = BatchGradients(shardings.params, whole, shardings.schedule, shardings.schedule_opt_state)
    return TrainStep.sharded(batch_gradients, update, mesh, shardings, gradient_shardings)


def microbatch_loss(model, params, config, batch, gamma, row_keys, first_row, num_targets):
    """The summed loss of one forward pass's rows, over the number of targets of the whole step.

    Args:
      model: the denoiser.
      params: its parameters, kernels in the compute dtype.
      config: the `diffusion` group.
      batch: rows without the microbatch axis: tokens [B, S] and so on.
      gamma: [B] noise levels.
      row_keys: three keys for noise, dropout and the dropping of prompts; each row folds in its global index.
      first_row: [] global index of the first row.
      num_targets: [] positions to predict in the whole optimiser step.

    Returns:
      The scalar loss, and each row's summed cross-entropy [B].
    """
    variables = {"params": params}
    num_rows, length = batch.tokens.shape
    noise_keys, dropout_keys, prompt_keys = jax.vmap(
        lambda key: jax.vmap(lambda row: jax.random.fold_in(key, row))(first_row + jnp.arange(num_rows))
    )(row_keys)
    noise = jax.vmap(lambda key: jax.random.normal(key, (length, model.embedding_dim)))(noise_keys)
    # Without the barrier XLA makes the random numbers again in every fusion that reads them.
    noise = jax.lax.optimization_barrier(noise)
    row_seeds = jax.vmap(jax.random.bits)(dropout_keys)
    dropped = jax.vmap(jax.random.uniform)(prompt_keys) < config.conditioning_dropout
    prompt = batch.prompt.replace(mask=batch.prompt.mask & ~dropped[:, None])

    rows = NoisyRows(batch.tokens, batch.known_mask, gamma, noise)
    z = rows.noisy_embeddings(model.apply(variables, method="embedding_table"))
    keys_values = model.apply(variables, prompt, method="encode_prompt")

    def estimate(chosen):
        # Stopped at the inputs, so that nothing of this pass is kept for the backward pass.
        frozen, noisy, prompts = jax.lax.stop_gradient((variables, z[chosen], keys_values.select(chosen)))
        no_estimate = jnp.zeros_like(noisy)
        known_mask = batch.known_mask[chosen]
        return model.apply(frozen, noisy, gamma[chosen], no_estimate, known_mask, prompts, method="estimate")

    x_hat = first_estimate(estimate, z, first_row, config.self_conditioning_every)
    losses = model.apply(
        variables,
        batch.tokens,
        z,
        gamma,
        x_hat,
        batch.known_mask,
        keys_values,
        row_seeds,
        method="cross_entropy",
    )
    row_losses = jnp.sum(losses * ~batch.known_mask, axis=-1)
    return row_losses.sum() / num_targets, row_losses


def ema_decay(decay: float, step: jax.Array) -> jax.Array:
    """The decay at a step: small at first, so that the average forgets the initial parameters."""
    return jnp.minimum(decay, (1.0 + step) / (10.0 + step))
