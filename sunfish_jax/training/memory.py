"""How much memory a training step needs on each device, from shapes alone: nothing is allocated."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sunfish_jax.data.batches import PackedBatch
from sunfish_jax.data.packs import packs_per_pass
from sunfish_jax.models.denoiser import TABLES, TextDenoiser, compute_params, quantized_kernels
from sunfish_jax.models.prompt import Prompt, round_up
from sunfish_jax.training.passes import draw_packs, pass_loss
from sunfish_jax.training.sharding import batch_sharding, state_shardings
from sunfish_jax.training.state import create_state
from sunfish_jax.training.step import make_train_step


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """Bytes that one device holds while it takes a training step.

    Attributes:
      state: its share of parameters, averages and moments.
      parameters: the whole parameters as the forward and backward passes read them.
      gradients: the whole accumulated gradients, float32.
      activations: what one microbatch's forward pass keeps for its backward pass.
    """

    state: int
    parameters: int
    gradients: int
    activations: int

    @property
    def total(self) -> int:
        """Their sum: temporaries within a layer come on top."""
        return self.state + self.parameters + self.gradients + self.activations


def step_memory(config: ConfigDict, model: TextDenoiser, mesh: Mesh) -> StepMemory:
    """Traces the whole sharded train step for rows of `block_size` and adds up what a device must hold.

    Args:
      config: the whole configuration.
      model: the denoiser.
      mesh: from `make_mesh`; its devices need not be able to hold the model.
    """
    state = jax.eval_shape(lambda: create_state(config, model))
    batch = abstract_batch(config, model)
    jax.eval_shape(make_train_step(config, model, mesh), state, batch)

    shardings = state_shardings(state, mesh)
    state_bytes = sum(
        math.prod(sharding.shard_shape(leaf.shape)) * _item_size(leaf)
        for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True)
    )
    narrow = jax.eval_shape(lambda params: compute_params(params, model.dtype), state.params)

    vocabulary = jax.eval_shape(lambda params: model.apply({"params": params}, method="vocabulary"), state.params)
    # The tables are read as what the vocabulary makes of them.
    others = {name: leaf for name, leaf in narrow.items() if name not in TABLES}
    quantized = jax.eval_shape(lambda params: quantized_kernels(model, params), narrow)

    def kept(params, quantized, vocabulary, batch):
        shape = batch.lengths.shape
        keys, numbers = jax.random.split(jax.random.key(0), 3), jnp.zeros(shape[:2], jnp.int32)
        drawn = draw_packs(batch, jnp.zeros(shape), keys, numbers, config.diffusion.conditioning_dropout)
        packs = jax.tree.map(lambda leaf: leaf[0], drawn)
        x_hat = jnp.zeros((*packs.tokens.shape, model.embedding_dim))

        def loss(params, vocabulary):
            return pass_loss(model, params, quantized, vocabulary, packs, x_hat, 1.0)

        return jax.vjp(loss, params, vocabulary, has_aux=True)[1]

    of_device = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(batch_sharding(mesh).shard_shape(leaf.shape), leaf.dtype), batch
    )
    # The backward pass is itself a pytree; its leaves are the arrays it keeps. The kernels and the head among them
    # are counted apart.
    kept_parameters = tree_bytes((others, vocabulary.head, quantized))
    activations = tree_bytes(jax.eval_shape(kept, narrow, quantized, vocabulary, of_device)) - kept_parameters
    return StepMemory(
        state=state_bytes,
        parameters=tree_bytes((others, vocabulary, quantized)),
        gradients=sum(4 * leaf.size for leaf in jax.tree.leaves(state.params)),
        activations=max(0, activations),
    )


def abstract_batch(config: ConfigDict, model: TextDenoiser) -> PackedBatch:
    """The shapes of a batch with rows of `block_size` and the longest prompts."""
    packs, block_size = packs_per_pass(config), config.model.block_size
    rows = math.ceil(config.train.batch_size / packs)
    positions = max(block_size, math.ceil(config.train.batch_size * block_size / packs))
    shape = (config.train.accumulate_steps, packs, positions)
    prompt_shape = (*shape[:2], rows, round_up(config.prompt_encoder.max_length))
    if model.prompt_module is None:
        inputs = jax.ShapeDtypeStruct((*prompt_shape, model.prompt_dim), jnp.float16)
    else:
        inputs = jax.ShapeDtypeStruct(prompt_shape, jnp.int32)
    return PackedBatch(
        tokens=jax.ShapeDtypeStruct(shape, jnp.int32),
        padding_mask=jax.ShapeDtypeStruct(shape, bool),
        known_mask=jax.ShapeDtypeStruct(shape, bool),
        lengths=jax.ShapeDtypeStruct((*shape[:2], rows), jnp.int32),
        prompt=Prompt(inputs=inputs, mask=jax.ShapeDtypeStruct(prompt_shape, bool)),
        longest=block_size,
    )


def tree_bytes(tree) -> int:
    """Bytes of all arrays of a pytree of arrays or shapes."""
    return sum(leaf.size * _item_size(leaf) for leaf in jax.tree.leaves(tree))


def _item_size(leaf) -> int:
    # A typed random key is two 32-bit words.
    return 8 if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize
