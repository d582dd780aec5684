"""The forward and backward passes of one optimiser step, on one device."""

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from sunfish_jax.data.batches import PackedBatch
from sunfish_jax.diffusion.process import diffuse
from sunfish_jax.diffusion.self_conditioning import first_estimates, self_conditioned_packs
from sunfish_jax.models.denoiser import TextDenoiser, Vocabulary, quantized_kernels
from sunfish_jax.models.prompt import Prompt
from sunfish_jax.ops.rows import PackedRows
from sunfish_jax.training.sharding import DATA_AXIS


@flax.struct.dataclass
class DrawnPacks:
    """Packs of b rows each with all that is drawn for them; leading axes [P] or, of all passes, [A, P].

    Attributes:
      tokens: [..., n] int32.
      known_mask: [..., n] bool, True where the clean embedding is given.
      lengths: [..., b] int32, the positions of each row.
      prompt: [..., b], those that were dropped are the null prompt.
      gamma: [..., b] noise levels.
      noise_key: [...] random keys.
      dropout_seed: [...] uint32.
      longest: S, which no row is longer than.
    """

    tokens: jax.Array
    known_mask: jax.Array
    lengths: jax.Array
    prompt: Prompt
    gamma: jax.Array
    noise_key: jax.Array
    dropout_seed: jax.Array
    longest: int = flax.struct.field(pytree_node=False)

    def rows(self) -> PackedRows:
        """Where the rows of packs [P] lie among their P n positions."""
        return PackedRows.in_packs(self.lengths, self.tokens.shape[-1], self.longest)

    def inputs(self, model: TextDenoiser, variables: Any, vocabulary: Vocabulary) -> tuple[jax.Array, Any]:
        """Of packs [P] the noisy embeddings z [P, n, D], and the prompts of their rows, encoded."""
        clean = vocabulary.embeddings[self.tokens]
        noise = jax.vmap(lambda key: jax.random.normal(key, clean.shape[1:]))(self.noise_key)
        # Without the barrier XLA makes the random numbers again in every fusion that reads them.
        noise = jax.lax.optimization_barrier(noise)
        gamma = self.rows().spread(self.gamma.reshape(-1, 1)).reshape(self.tokens.shape)
        # To the process each position is a row of its own: it has the noise level of its row.
        noisy = diffuse(clean[:, :, None], noise[:, :, None], gamma)[:, :, 0]
        prompt = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), self.prompt)
        keys_values = model.apply(variables, prompt, method="encode_prompt")
        return jnp.where(self.known_mask[..., None], clean, noisy), keys_values


def draw_packs(
    batch: PackedBatch, gamma: jax.Array, keys: jax.Array, numbers: jax.Array, dropout: float
) -> DrawnPacks:
    """Draws noise, dropout and which prompts are dropped, each from a pack's number in the step alone.

    Args:
      batch: packs [A, P].
      gamma: [A, P, b] noise levels.
      keys: [3] random keys: for noise, for dropout and for the dropping of prompts.
      numbers: [A, P], the same for a pack however packs are spread over devices.
      dropout: the share of prompts to drop.
    """

    def for_each(function, of_packs):
        return jax.vmap(jax.vmap(function))(of_packs)

    noise_key, dropout_key, prompt_key = (
        for_each(lambda number, key=key: jax.random.fold_in(key, number), numbers) for key in keys
    )
    dropped = for_each(lambda key: jax.random.uniform(key, gamma.shape[2:]), prompt_key) < dropout
    return DrawnPacks(
        tokens=batch.tokens,
        known_mask=batch.known_mask,
        lengths=batch.lengths,
        prompt=batch.prompt.replace(mask=batch.prompt.mask & ~dropped[..., None]),
        gamma=gamma,
        noise_key=noise_key,
        dropout_seed=for_each(jax.random.bits, dropout_key),
        longest=batch.longest,
    )


def targets(lengths: jax.Array, known_mask: jax.Array) -> jax.Array:
    """Which positions are predicted: all of a row but the given ones. [..., n] bool.

    The few padded ones too: they teach where texts end.

    Args:
      lengths: [..., b], the positions of each row.
      known_mask: [..., n] bool.
    """
    used = jnp.sum(lengths, axis=-1, keepdims=True)
    return (jnp.arange(known_mask.shape[-1]) < used) & ~known_mask


def have_given(batch: PackedBatch) -> jax.Array:
    """Which rows have given tokens, [A, P, b] bool."""
    lengths = batch.lengths.reshape(-1, batch.lengths.shape[-1])
    rows = PackedRows.in_packs(lengths, batch.known_mask.shape[-1], batch.longest)
    return (rows.sums(batch.known_mask.reshape(-1, 1).astype(jnp.float32)) > 0).reshape(batch.lengths.shape)


def device_gradients(
    model: TextDenoiser,
    config: ConfigDict,
    params: Mapping[str, Any],
    vocabulary: Vocabulary,
    batch: PackedBatch,
    gamma: jax.Array,
    keys: jax.Array,
    step: jax.Array,
    num_targets: jax.Array,
) -> tuple[tuple[Any, Vocabulary], jax.Array]:
    """Gradients of the mean loss from this device's packs of every forward pass; runs under `jax.shard_map`.

    Args:
      model: the denoiser.
      config: the `diffusion` group.
      params: its parameters, kernels in the compute dtype.
      vocabulary: made of them.
      batch: packs [A, P] of b rows.
      gamma: [A, P, b] noise levels.
      keys: as for `draw_packs`.
      step: [] int32, optimiser steps before this one.
      num_targets: [] positions to predict in the whole optimiser step.

    Returns:
      Float32 gradients with respect to `params` (without what they do through the vocabulary) and to `vocabulary`,
      and each row's summed loss and its number of targets, [A, P, b, 2].
    """
    num_passes, num_packs, _ = gamma.shape
    num_devices, device = jax.lax.axis_size(DATA_AXIS), jax.lax.axis_index(DATA_AXIS)
    first_packs = num_packs * (num_devices * jnp.arange(num_passes) + device)
    numbers = first_packs[:, None] + jnp.arange(num_packs)
    packs = draw_packs(batch, gamma, keys, numbers, config.conditioning_dropout)
    turns = self_conditioned_packs(num_passes, num_packs, num_devices, config.self_conditioning_every)
    # For all passes; no gradient flows to what is made of the parameters here.
    quantized = quantized_kernels(model, params)
    x_hat = estimates(model, params, quantized, vocabulary, packs, jnp.asarray(turns)[step % len(turns), device])
    loss_and_gradient = jax.value_and_grad(pass_loss, argnums=(1, 3), has_aux=True)

    def accumulate(total, of_pass):
        (_, of_rows), gradients = loss_and_gradient(model, params, quantized, vocabulary, *of_pass, num_targets)
        return jax.tree.map(lambda t, g: t + g.astype(jnp.float32), total, gradients), of_rows

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), (params, vocabulary))
    return jax.lax.scan(accumulate, zeros, (packs, x_hat))


def estimates(model, params, quantized, vocabulary, packs: DrawnPacks, chosen: jax.Array) -> jax.Array:
    """The self-conditioning input of all passes, [A, P, n, D]: first estimates of some packs, zeros for the others.

    Made before the passes: it depends on none of them, and some packs of each make full passes together.

    Args:
      model: the denoiser.
      params: its parameters, kernels in the compute dtype.
      quantized: what `quantized_kernels` makes of them.
      vocabulary: made of them.
      packs: of all passes, [A, P].
      chosen: as for `first_estimates`.
    """
    variables = {"params": params} | quantized
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), packs)

    def estimate(numbers):
        few = jax.tree.map(lambda leaf: leaf[numbers], flat)
        z, prompts = few.inputs(model, variables, vocabulary)
        inputs = vocabulary, z, few.gamma.ravel(), jnp.zeros_like(z), few.known_mask, prompts
        return model.apply(variables, *inputs, packed=few.rows(), method="estimate")

    shape = (*flat.tokens.shape, model.embedding_dim)
    return first_estimates(estimate, shape, chosen).reshape(*packs.tokens.shape, -1)


def pass_loss(
    model, params, quantized, vocabulary, packs: DrawnPacks, x_hat, num_targets
) -> tuple[jax.Array, jax.Array]:
    """The summed loss of one forward pass's rows, over the number of targets of the whole step.

    Args:
      model: the denoiser.
      params: its parameters, kernels in the compute dtype.
      quantized: what `quantized_kernels` makes of them.
      vocabulary: made of them.
      packs: [P] of b rows.
      x_hat: [P, n, D] their first estimates, or zeros.
      num_targets: [] positions to predict in the whole optimiser step.

    Returns:
      The scalar loss, and each row's summed cross-entropy and its number of targets, [P, b, 2].
    """
    variables = {"params": params} | quantized
    z, prompts = packs.inputs(model, variables, vocabulary)
    rows = packs.rows()
    losses = model.apply(
        variables,
        vocabulary,
        packs.tokens,
        z,
        packs.gamma.ravel(),
        x_hat,
        packs.known_mask,
        prompts,
        packed=rows,
        dropout_seeds=packs.dropout_seed,
        method="cross_entropy",
    )
    predicted = targets(packs.lengths, packs.known_mask).astype(jnp.float32)
    losses = losses * predicted
    of_rows = rows.sums(jnp.stack([jax.lax.stop_gradient(losses).ravel(), predicted.ravel()], axis=-1))
    return losses.sum() / num_targets, of_rows.reshape(*packs.lengths.shape, 2)
