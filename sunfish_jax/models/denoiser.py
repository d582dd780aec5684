"""The denoiser: from noisy embeddings, their noise level and a prompt to logits over the vocabulary."""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from sunfish_jax.diffusion.process import posterior_scale
from sunfish_jax.models.layers import NoiseLevelFeatures, TransformerLayer, kernel_init, rms_norm, split_heads
from sunfish_jax.models.prompt import Prompt
from sunfish_jax.ops.compute_dtype import fastest_compute_dtype
from sunfish_jax.ops.cross_entropy import cross_entropy, expected_embedding, token_logits
from sunfish_jax.ops.dense import dense, row_major

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
      head: [D + W, V] in the dtype of the products: E^T, and under it the head's own table H^T.
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
        self.layers = [
            layer(width, self.num_heads, self.mlp_ratio, self.conv_width, self.dropout, site, self.dtype)
            for site in range(self.num_layers)
        ]
        # Zero at the start, where the single-token posterior is all that is predicted.
        self.head_table = self.param("head_table", zeros, (self.vocab_size, width))

    def vocabulary(self) -> Vocabulary:
        """The tokens' embeddings, and what makes logits of `features`."""
        norm = jnp.linalg.norm(self.raw_embedding, axis=-1, keepdims=True)
        embeddings = self.raw_embedding * (self.embedding_dim**0.5 / norm)
        # Turned here, once, so that no pass has to turn its gradient.
        head = jnp.concatenate([embeddings.astype(self.dtype).T, self.head_table.astype(self.dtype).T])
        return Vocabulary(embeddings, row_major(head), self.log_unigram)

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
        both = dense(states, self.prompt_kernel.astype(self.dtype)).astype(self.dtype)
        parts = [split_heads(part, batch, self.num_heads) for part in jnp.split(both, 2 * self.num_layers, axis=-1)]
        return PromptKeysValues(tuple(parts[: self.num_layers]), tuple(parts[self.num_layers :]), mask)

    def features(self, vocabulary, z, gamma, x_hat, known_mask, *prompts, row_seeds=None) -> jax.Array:
        """What `Vocabulary.logits` takes: (alpha / sigma^2) z beside the network's h.

        logits = (alpha / sigma^2) z E^T + h H^T + log unigram: the network corrects the exact posterior of a single
        token (Plaid, Gulrajani and Hashimoto 2023).

        Args:
          vocabulary: from the method of that name.
          z: [B, S, D] noisy embeddings; clean ones where known.
          gamma: [B] noise level, log(sigma^2 / alpha^2).
          x_hat: [B, S, D] an earlier estimate of the clean embeddings, or zeros.
          known_mask: [B, S] bool, True where z is clean.
          *prompts: k times the `PromptKeysValues` of a prompt for each row, from `encode_prompt`. What comes before
            a prompt is read is computed once for all k.
          row_seeds: [B] uint32 for dropout, where k is 1; None for none.

        Returns:
          [k*B, S, D + W] float32: all rows for the first prompts, then all for the second, and so on.
        """
        batch, length, dim = z.shape
        prior = posterior_scale(gamma)[:, None, None] * z
        context_free = _single_token_mean(vocabulary, prior)
        context_free = jnp.where(known_mask[..., None], z, context_free)
        inputs = jnp.concatenate([z, context_free, x_hat], axis=-1).reshape(batch * length, 3 * dim)
        kernel = jnp.concatenate([self.input_kernel, self.estimate_kernel]).astype(self.dtype)
        x = dense(inputs, kernel).reshape(batch, length, self.width)
        x = rms_norm(x + known_mask[..., None] * self.known_vector)

        scales = 1.0 + dense(self.noise_level(gamma), self.scales_kernel)
        scales = jnp.split(scales[:, None, :], 3 * self.num_layers + 1, axis=-1)
        for index, layer in enumerate(self.layers):
            x = layer(
                x,
                scales[3 * index : 3 * index + 3],
                [prompt.layer(index) for prompt in prompts],
                row_seeds,
            )
        x = rms_norm(x.reshape(-1, batch, length, self.width), scales[-1]).reshape(x.shape)
        return jnp.concatenate([jnp.tile(prior, (len(prompts), 1, 1)), x], axis=-1)

    def logits(self, vocabulary, z, gamma, x_hat, known_mask, prompt) -> jax.Array:
        """Logits over the vocabulary, [B, S, V] float32; the arguments are those of `features`."""
        return vocabulary.logits(self.features(vocabulary, z, gamma, x_hat, known_mask, prompt))

    def estimate(self, vocabulary, z, gamma, x_hat, known_mask, prompt) -> jax.Array:
        """x_hat = softmax(logits) E, [B, S, D] float32; the arguments are those of `features`."""
        return vocabulary.expected_embedding(self.logits(vocabulary, z, gamma, x_hat, known_mask, prompt))

    def cross_entropy(self, vocabulary, tokens, z, gamma, x_hat, known_mask, prompt, row_seeds=None) -> jax.Array:
        """-log p(token | z, gamma, x_hat, prompt) in nats, [B, S] float32.

        tokens is [B, S] int32; the other arguments are those of `features`.
        """
        features = self.features(vocabulary, z, gamma, x_hat, known_mask, prompt, row_seeds=row_seeds)
        return vocabulary.cross_entropy(features, tokens)

    def __call__(self, tokens, z, gamma, x_hat, known_mask, prompt: Prompt) -> jax.Array:
        """Everything once, for initialisation: the arguments are those of `cross_entropy`."""
        keys_values = self.encode_prompt(prompt)
        return self.cross_entropy(self.vocabulary(), tokens, z, gamma, x_hat, known_mask, keys_values)


def _single_token_mean(vocabulary: Vocabulary, prior: jax.Array) -> jax.Array:
    """E[e | z] for each token by itself, with the tokens' frequencies as prior; no gradient flows.

    prior: [B, S, D], (alpha / sigma^2) z. Returns [B, S, D].
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
    dtype = fields.pop("compute_dtype")
    dtype = jnp.dtype(fastest_compute_dtype() if dtype == "auto" else dtype)
    return TextDenoiser(
        vocab_size=vocab_size,
        dtype=dtype,
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
