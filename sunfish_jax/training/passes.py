"""The forward and backward passes of one optimiser step, on one device."""

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from sunfish_jax.data.batches import Batch
from sunfish_jax.diffusion.noisy_rows import NoisyRows, first_estimates, self_conditioned_rows
from sunfish_jax.models.denoiser import TextDenoiser, Vocabulary
from sunfish_jax.models.prompt import Prompt
from sunfish_jax.training.sharding import DATA_AXIS


@flax.struct.dataclass
class DrawnRows:
    """Rows with all that is drawn for them; leading axes [B] or, of all passes, [A, B].

    Attributes:
      tokens: [..., S] int32.
      known_mask: [..., S] bool, True where the clean embedding is given.
      prompt: those that were dropped are the null prompt.
      gamma: [...] noise levels.
      noise_key: [...] random keys.
      dropout_seed: [...] uint32.
    """

    tokens: jax.Array
    known_mask: jax.Array
    prompt: Prompt
    gamma: jax.Array
    noise_key: jax.Array
    dropout_seed: jax.Array

    def noisy_embeddings(self, embeddings: jax.Array) -> jax.Array:
        """z [B, S, D] of rows [B]; `embeddings` is E [V, D]."""
        shape = (self.tokens.shape[-1], embeddings.shape[-1])
        noise = jax.vmap(lambda key: jax.random.normal(key, shape))(self.noise_key)
        # Without the barrier XLA makes the random numbers again in every fusion that reads them.
        noise = jax.lax.optimization_barrier(noise)
        return NoisyRows(self.tokens, self.known_mask, self.gamma, noise).noisy_embeddings(embeddings)


def draw_rows(batch: Batch, gamma: jax.Array, keys: jax.Array, numbers: jax.Array, dropout: float) -> DrawnRows:
    """Draws noise, dropout and which prompts are dropped, each from a row's number in the step alone.

    Args:
      batch: rows [A, B].
      gamma: [A, B] noise levels.
      keys: [3] random keys: for noise, for dropout and for the dropping of prompts.
      numbers: [A, B], the same for a row however rows are spread over devices.
      dropout: the share of prompts to drop.
    """

    def for_each(function, of_rows):
        return jax.vmap(jax.vmap(function))(of_rows)

    noise_key, dropout_key, prompt_key = (
        for_each(lambda number, key=key: jax.random.fold_in(key, number), numbers) for key in keys
    )
    dropped = for_each(jax.random.uniform, prompt_key) < dropout
    return DrawnRows(
        tokens=batch.tokens,
        known_mask=batch.known_mask,
        prompt=batch.prompt.replace(mask=batch.prompt.mask & ~dropped[..., None]),
        gamma=gamma,
        noise_key=noise_key,
        dropout_seed=for_each(jax.random.bits, dropout_key),
    )


def device_gradients(
    model: TextDenoiser,
    config: ConfigDict,
    params: Mapping[str, Any],
    vocabulary: Vocabulary,
    batch: Batch,
    gamma: jax.Array,
    keys: jax.Array,
    num_targets: jax.Array,
) -> tuple[tuple[Any, Vocabulary], jax.Array]:
    """Gradients of the mean loss from this device's rows of every forward pass; runs under `jax.shard_map`.

    Args:
      model: the denoiser.
      config: the `diffusion` group.
      params: its parameters, kernels in the compute dtype.
      vocabulary: made of them.
      batch: rows [A, B].
      gamma: [A, B] noise levels.
      keys: as for `draw_rows`.
      num_targets: [] positions to predict in the whole optimiser step.

    Returns:
      Float32 gradients with respect to `params` (without what they do through the vocabulary) and to `vocabulary`,
      and each row's summed loss [A, B].
    """
    num_passes, num_rows = gamma.shape
    num_devices, device = jax.lax.axis_size(DATA_AXIS), jax.lax.axis_index(DATA_AXIS)
    first_rows = num_rows * (num_devices * jnp.arange(num_passes) + device)
    numbers = first_rows[:, None] + jnp.arange(num_rows)
    rows = draw_rows(batch, gamma, keys, numbers, config.conditioning_dropout)
    chosen = self_conditioned_rows(num_passes, num_rows, num_devices, config.self_conditioning_every)
    x_hat = estimates(model, params, vocabulary, rows, jnp.asarray(chosen)[device])
    loss_and_gradient = jax.value_and_grad(pass_loss, argnums=(1, 2), has_aux=True)

    def accumulate(total, of_pass):
        (_, row_losses), gradients = loss_and_gradient(model, params, vocabulary, *of_pass, num_targets)
        return jax.tree.map(lambda t, g: t + g.astype(jnp.float32), total, gradients), row_losses

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), (params, vocabulary))
    return jax.lax.scan(accumulate, zeros, (rows, x_hat))


def estimates(model, params, vocabulary, rows: DrawnRows, chosen: jax.Array) -> jax.Array:
    """The self-conditioning input of all passes, [A, B, S, D]: first estimates of some rows, zeros for the others.

    Made before the passes: it depends on none of them, and some rows of each make full passes together.

    Args:
      model: the denoiser.
      params: its parameters, kernels in the compute dtype.
      vocabulary: made of them.
      rows: of all passes, [A, B].
      chosen: as for `first_estimates`.
    """
    variables = {"params": params}
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), rows)

    def estimate(numbers):
        few = jax.tree.map(lambda leaf: leaf[numbers], flat)
        z = few.noisy_embeddings(vocabulary.embeddings)
        prompt = model.apply(variables, few.prompt, method="encode_prompt")
        no_estimate = jnp.zeros_like(z)
        return model.apply(
            variables, vocabulary, z, few.gamma, no_estimate, few.known_mask, prompt, method="estimate"
        )

    shape = (*flat.tokens.shape, model.embedding_dim)
    return first_estimates(estimate, shape, chosen).reshape(*rows.tokens.shape, -1)


def pass_loss(model, params, vocabulary, rows: DrawnRows, x_hat, num_targets) -> tuple[jax.Array, jax.Array]:
    """The summed loss of one forward pass's rows, over the number of targets of the whole step.

    Args:
      model: the denoiser.
      params: its parameters, kernels in the compute dtype.
      vocabulary: made of them.
      rows: [B].
      x_hat: [B, S, D] their first estimates, or zeros.
      num_targets: [] positions to predict in the whole optimiser step.

    Returns:
      The scalar loss, and each row's summed cross-entropy [B].
    """
    variables = {"params": params}
    z = rows.noisy_embeddings(vocabulary.embeddings)
    prompt = model.apply(variables, rows.prompt, method="encode_prompt")
    losses = model.apply(
        variables,
        vocabulary,
        rows.tokens,
        z,
        rows.gamma,
        x_hat,
        rows.known_mask,
        prompt,
        rows.dropout_seed,
        method="cross_entropy",
    )
    row_losses = jnp.sum(losses * ~rows.known_mask, axis=-1)
    return row_losses.sum() / num_targets, row_losses
