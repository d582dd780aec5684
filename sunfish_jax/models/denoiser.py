"""The denoiser: from noisy embeddings, their noise level and a prompt to logits over the vocabulary."""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from sunfish_jax.diffusion.process import posterior_scale
from sunfish_jax.models.layers import (
    QUANTIZED,
    NoiseLevelFeatures,
    TransformerLayer,
    kernel_init,
    quantized_kernel,
    rms_norm,
    split_heads,
)
from sunfish_jax.models.prompt import Prompt
from sunfish_jax.ops.compute_dtype import fastest_compute_dtype
from sunfish_jax.ops.cross_entropy import cross_entropy, expected_embedding, token_logits
from sunfish_jax.ops.dense import dense, transposed_copy
from sunfish_jax.ops.quantized import quantize_kernel
from sunfish_jax.ops.rows import EqualRows, PackedRows

# Parameters of two dimensions with these endings are kernels: matrices that features are multiplied with.
KERNEL_SUFFIXES = ("_in", "_out", "kernel")
# Parameters with a row for each token of the vocabulary.
TABLES = ("embedding", "head_table")


@flax.struct.dataclass
class PromptKeysValues:
    """What every layer attends to, computed once for a prompt.

    Attributes:
      keys: for each layer, [B, H, P, d].
      values: for each layer, [B, H, P, d].
      mask: [B, P] bool, at least one True a row.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    mask: jax.Array

    def layer(self, index: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Keys, values and mask for one layer."""
        return self.keys[index], self.values[index], self.mask


@flax.struct.dataclass
class Vocabulary:
    """What the model knows of the tokens, made from its parameters once for many passes.

    Attributes:
      embeddings: [V, D] float32, the clean embeddings E, rows of norm sqrt(D).
      head: [D + W, V] in the dtype of the products: E^T, and under it the head's own table U^T.
      log_unigram: [V] float32, log frequencies, constant: the prior over a token before anything is seen of it.
    """

    embeddings: jax.Array
    head: jax.Array
    log_unigram: jax.Array

    def logits(self, features: jax.Array) -> jax.Array:
        """Logits [..., V] float32 of what `TextDenoiser.features` returns, [..., D + W]."""
        return token_logits(features, self.head, self.log_unigram)

    def expected_embedding(self, logits: jax.Array) -> jax.Array:
        """softmax(logits) E, the mean embedding [..., D] float32; logits are [..., V]."""
        return expected_embedding(logits, self.embeddings.astype(self.head.dtype))

    def cross_entropy(self, features: jax.Array, tokens: jax.Array) -> jax.Array:
        """-log p(token) in nats, the shape of tokens, float32; features are [..., D + W]."""
        rows = features.reshape(-1, features.shape[-1])
        return cross_entropy(rows, self.head, self.log_unigram, tokens.reshape(-1)).reshape(tokens.shape)


class TextDenoiser(nn.Module):
    """A bidirectional transformer that predicts the clean tokens behind noisy embeddings.

    In bfloat16 its layers, and what makes the prompts' keys and values, may multiply with their kernels in eight
    bits instead (`quantized`).

    Shapes: B rows, S tokens, D embedding_dim, W width, V vocab_size, L num_layers, H num_heads, P prompt length.
    """

    vocab_size: int
    num_layers: int
    num_heads: int
    width: int
    embedding_dim: int
    mlp_ratio: int
    conditioning_dim: int
    conv_width: int
    dropout: float
    dtype: jnp.dtype
    remat: bool
    prompt_dim: int
    prompt_module: nn.Module | None = None
    quantized: bool = False

    @property
    def number_format(self) -> str:
        """Its value of the configuration's `model.compute_dtype`."""
        return "int8" if self.quantized else self.dtype.name

    def setup(self):
        width, zeros = self.width, nn.initializers.zeros
        self.raw_embedding = self.param(
            "embedding", nn.initializers.normal(1.0), (self.vocab_size, self.embedding_dim)
        )
        # Set from the training text and never trained; weights that a run starts from bring along that of theirs.
        self.log_unigram = self.param("log_unigram", zeros, (self.vocab_size,))
        self.input_kernel = self.param(
            "input_kernel", kernel_init(2 * self.embedding_dim), (2 * self.embedding_dim, width)
        )
        # Starts at zero, and stays there without self-conditioning: the network then ignores x_hat.
        self.estimate_kernel = self.param("estimate_kernel", zeros, (self.embedding_dim, width))
        self.known_vector = self.param("known_vector", zeros, (width,))
        self.noise_level = NoiseLevelFeatures(self.conditioning_dim)
        # One product makes the scales of all norms: three a layer and the last one.
        self.scales_kernel = self.param(
            "scales_kernel", zeros, (self.conditioning_dim, (3 * self.num_layers + 1) * width)
        )
        self.adapter_kernel = self.param("adapter_kernel", kernel_init(self.prompt_dim), (self.prompt_dim, width))
        self.null_prompt = self.param("null_prompt", nn.initializers.normal(1.0), (width,))
        self.prompt_kernel = self.param("prompt_kernel", kernel_init(width), (width, 2 * self.num_layers * width))
        layer = nn.remat(TransformerLayer) if self.remat else TransformerLayer
        sizes = (width, self.num_heads, self.mlp_ratio, self.conv_width, self.dropout)
        self.layers = [layer(*sizes, site, self.dtype, self.quantized) for site in range(self.num_layers)]
        # Zero at the start, where the single-token posterior is all that is predicted.
        self.head_table = self.param("head_table", zeros, (self.vocab_size, width))

    def vocabulary(self) -> Vocabulary:
        """The tokens' embeddings, and what makes logits of `features`."""
        norm = jnp.linalg.norm(self.raw_embedding, axis=-1, keepdims=True)
        embeddings = self.raw_embedding * (self.embedding_dim**0.5 / norm)
        # Turned here, once, so that no pass has to turn its gradient.
        parts = [transposed_copy(table.astype(self.dtype)) for table in (embeddings, self.head_table)]
        # Each by itself, and then moved whole: to turn them in the loop that joins them takes three times as long.
        head = jnp.concatenate(jax.lax.optimization_barrier(parts))
        return Vocabulary(embeddings, head, self.log_unigram)

    def encode_prompt(self, prompt: Prompt) -> PromptKeysValues:
        """Keys and values of every layer for prompts [B, P]; a row without a prompt gets the null prompt."""
        states = prompt.inputs
        if self.prompt_module is not None:
            states = self.prompt_module(prompt.inputs, prompt.mask)
        batch, length, _ = states.shape
        given = prompt.mask.any(axis=-1, keepdims=True)
        states = states.reshape(batch * length, -1)
        states = dense(states, self.adapter_kernel.astype(self.dtype)).reshape(batch, length, -1)
        states = rms_norm(jnp.where(given[..., None], states, self.null_prompt))
        # Only one position of a null prompt is read: they are all the same.
        mask = jnp.where(given, prompt.mask, jnp.arange(length) == 0)
        states = states.reshape(batch * length, -1)
        kernel = self.prompt_kernel.astype(self.dtype)
        quantized = quantized_kernel(self, "prompt_kernel", kernel) if self.quantized else None
        both = dense(states, kernel, quantized).astype(self.dtype)
        parts = [split_heads(part, batch, self.num_heads) for part in jnp.split(both, 2 * self.num_layers, axis=-1)]
        return PromptKeysValues(tuple(parts[: self.num_layers]), tuple(parts[self.num_layers :]), mask)

    def features(
        self,
        vocabulary: Vocabulary,
        z: jax.Array,
        gamma: jax.Array,
        x_hat: jax.Array,
        known_mask: jax.Array,
        *prompts: PromptKeysValues,
        packed: PackedRows | None = None,
        dropout_seeds: jax.Array | None = None,
    ) -> jax.Array:
        """What `Vocabulary.logits` takes: (alpha / sigma^2) z beside the network's h.

        logits = (alpha / sigma^2) z E^T + h U^T + log unigram: the network corrects the exact posterior of a single
        token (Plaid, Gulrajani and Hashimoto 2023).

        Args:
          vocabulary: from the method of that name.
          z: [B, S, D] noisy embeddings, clean ones where known; or [G, M, D] in G packs of rows.
          gamma: [B] noise level of each row, log(sigma^2 / alpha^2).
          x_hat: the shape of z, an earlier estimate of the clean embeddings, or zeros.
          known_mask: [B, S] or [G, M] bool, True where z is clean.
          *prompts: k times the `PromptKeysValues` of a prompt for each row, from `encode_prompt`. What comes before
            a prompt is read is computed once for all k.
          packed: where the B rows lie among the G M positions; None for rows of S.
          dropout_seeds: [B] or [G] uint32, where k is 1; None for no dropout.

        Returns:
          [k*B, S, D + W] or [k*G, M, D + W] float32: all for the first prompts, then all for the second, and so on.
        """
        shape, dim = z.shape[:2], z.shape[-1]
        z, x_hat, known = z.reshape(-1, dim), x_hat.reshape(-1, dim), known_mask.reshape(-1, 1)
        rows = EqualRows(*shape) if packed is None else packed
        prior = rows.spread(posterior_scale(gamma)[:, None]) * z
        context_free = jnp.where(known, z, _single_token_mean(vocabulary, prior))
        inputs = jnp.concatenate([z, context_free, x_hat], axis=-1)
        x = dense(inputs, jnp.concatenate([self.input_kernel, self.estimate_kernel]).astype(self.dtype))
        x = rms_norm(x + known * self.known_vector)

        scales = 1.0 + dense(self.noise_level(gamma), self.scales_kernel)
        scales = jnp.split(scales, 3 * self.num_layers + 1, axis=-1)
        for index, layer in enumerate(self.layers):
            x = layer(
                x,
                rows,
                scales[3 * index : 3 * index + 3],
                [prompt.layer(index) for prompt in prompts],
                dropout_seeds,
            )
        x = rms_norm(x.reshape(len(prompts), -1, self.width), rows.spread(scales[-1]))
        prior = jnp.broadcast_to(prior, (len(prompts), *prior.shape))
        return jnp.concatenate([prior, x], axis=-1).reshape(-1, shape[1], dim + self.width)

    def logits(self, vocabulary: Vocabulary, *inputs, packed: PackedRows | None = None) -> jax.Array:
        """Logits over the vocabulary, [B, S, V] float32; the arguments are those of `features`."""
        return vocabulary.logits(self.features(vocabulary, *inputs, packed=packed))

    def estimate(self, vocabulary: Vocabulary, *inputs, packed: PackedRows | None = None) -> jax.Array:
        """x_hat = softmax(logits) E, [B, S, D] float32; the arguments are those of `features`."""
        return vocabulary.expected_embedding(self.logits(vocabulary, *inputs, packed=packed))

    def cross_entropy(self, vocabulary: Vocabulary, tokens: jax.Array, *inputs, **packing) -> jax.Array:
        """-log p(token | z, gamma, x_hat, prompt) in nats, [B, S] float32.

        tokens is [B, S] int32; the other arguments are those of `features`.
        """
        return vocabulary.cross_entropy(self.features(vocabulary, *inputs, **packing), tokens)

    def __call__(self, tokens, z, gamma, x_hat, known_mask, prompt: Prompt) -> jax.Array:
        """Everything once, for initialisation: the arguments are those of `cross_entropy`."""
        keys_values = self.encode_prompt(prompt)
        return self.cross_entropy(self.vocabulary(), tokens, z, gamma, x_hat, known_mask, keys_values)


def _single_token_mean(vocabulary: Vocabulary, prior: jax.Array) -> jax.Array:
    """E[e | z] for each token by itself, with the tokens' frequencies as prior; no gradient flows.

    prior: [N, D], (alpha / sigma^2) z. Returns [N, D].
    """
    vocabulary, prior = jax.lax.stop_gradient((vocabulary, prior))
    logits = token_logits(prior, vocabulary.head[: prior.shape[-1]], vocabulary.log_unigram)
    return vocabulary.expected_embedding(logits)


def make_model(config: ConfigDict, vocab_size: int, prompt_encoder) -> TextDenoiser:
    """The denoiser that a configuration describes.

    Args:
      config: the whole configuration; `model.compute_dtype` may be `auto`.
      vocab_size: V, the tokenizer's size.
      prompt_encoder: gives the width of the prompt states and, if trained, the module that makes them.
    """
    fields = config.model.to_dict()
    del fields["block_size"]
    compute_dtype = fields.pop("compute_dtype")
    if compute_dtype == "auto":
        compute_dtype = fastest_compute_dtype(config.model.width)
    quantized = compute_dtype == "int8"
    dtype = jnp.dtype("bfloat16" if quantized else compute_dtype)
    return TextDenoiser(
        vocab_size=vocab_size,
        dtype=dtype,
        quantized=quantized,
        prompt_dim=prompt_encoder.output_dim,
        prompt_module=None if prompt_encoder.frozen else prompt_encoder.module.clone(dtype=dtype),
        **fields,
    )


def init_params(model: TextDenoiser, key: jax.Array) -> Any:
    """Fresh parameters; shapes do not depend on batch, row or prompt length."""
    rows, length = 1, 8
    if model.prompt_module is None:
        inputs = jnp.zeros((rows, length, model.prompt_dim), jnp.float16)
    else:
        inputs = jnp.zeros((rows, length), jnp.int32)
    prompt = Prompt(inputs=inputs, mask=jnp.ones((rows, length), bool))
    tokens = jnp.zeros((rows, length), jnp.int32)
    z = jnp.zeros((rows, length, model.embedding_dim))
    return model.init(key, tokens, z, jnp.zeros((rows,)), z, tokens > 0, prompt)["params"]


def compute_params(params: Any, dtype: jnp.dtype) -> Any:
    """Kernels in the dtype they are multiplied in, cast once for many passes; the rest stays float32."""

    def cast(path, p):
        return p.astype(dtype) if path[-1].key.endswith(KERNEL_SUFFIXES) and p.ndim > 1 else p

    return jax.tree.map_with_path(cast, params)


def quantized_kernels(model: TextDenoiser, params: Any) -> dict[str, Any]:
    """The variables beside `params` that hold kernels in eight bits, made once for many passes.

    They are those of the layers and that of the prompts' keys and values.

    Args:
      model: the denoiser.
      params: its parameters.

    Returns:
      A collection of variables by its name; nothing for a model that is not quantized.
    """
    if not model.quantized:
        return {}

    def kernels(group):
        return {name: quantize_kernel(p) for name, p in group.items() if name.endswith(KERNEL_SUFFIXES)}

    layers = {name: kernels(group) for name, group in params.items() if name.startswith("layers_")}
    return {QUANTIZED: layers | {"prompt_kernel": quantize_kernel(params["prompt_kernel"])}}
