"""The autoregressive twin of the denoiser: the same layers made causal, each token predicted from those before it.

What differs from `sunfish_jax.models.denoiser`: tokens come in clean, through an embedding as wide as the layers;
there is no noise level, so the norms have plain learned scales, and the logits have no single-token posterior.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sunfish_jax.models.denoiser import PromptKeysValues, TextDenoiser, init_params
from sunfish_jax.models.layers import TransformerLayer, kernel_init, rms_norm
from sunfish_jax.models.prompt import Prompt
from sunfish_jax.ops.cross_entropy import cross_entropy, token_logits
from sunfish_jax.ops.dropout import dropout
from sunfish_jax.ops.rows import EqualRows, PackedRows


class CausalTransformer(nn.Module):
    """p(token | the tokens before it in its row, prompt).

    Shapes: B rows, S tokens, W width, V vocab_size, L num_layers, H num_heads, P prompt length.

    Attributes:
      start_token: what stands before the first token of a row: the end of the text before.
    """

    vocab_size: int
    num_layers: int
    num_heads: int
    width: int
    mlp_ratio: int
    conv_width: int
    dropout: float
    dtype: jnp.dtype
    prompt_dim: int
    start_token: int
    prompt_module: nn.Module | None = None

    def setup(self):
        width, zeros = self.width, nn.initializers.zeros
        self.embedding = self.param("embedding", nn.initializers.normal(1.0), (self.vocab_size, width))
        # As in the denoiser: set from the training text and never trained.
        self.log_unigram = self.param("log_unigram", zeros, (self.vocab_size,))
        self.norm_scales = self.param("norm_scales", nn.initializers.ones, (3 * self.num_layers + 1, width))
        self.adapter_kernel = self.param("adapter_kernel", kernel_init(self.prompt_dim), (self.prompt_dim, width))
        self.null_prompt = self.param("null_prompt", nn.initializers.normal(1.0), (width,))
        self.prompt_kernel = self.param("prompt_kernel", kernel_init(width), (width, 2 * self.num_layers * width))
        self.layers = [
            TransformerLayer(
                width, self.num_heads, self.mlp_ratio, self.conv_width, self.dropout, site, self.dtype, causal=True
            )
            for site in range(self.num_layers)
        ]
        # Zero at the start, so that an untrained model predicts the tokens' frequencies. A table of tokens is no
        # kernel to the optimiser: Adam, not Muon, trains it.
        self.head_table = self.param("head_table", zeros, (self.vocab_size, width))

    # The denoiser's own: both read prompts alike, here with no kernel in eight bits.
    encode_prompt = TextDenoiser.encode_prompt
    quantized = False

    def embed(self, tokens: jax.Array) -> jax.Array:
        """What goes into the first layer: [...] int32 -> [..., W] float32."""
        return rms_norm(self.embedding[tokens])

    def hidden(
        self,
        tokens: jax.Array,
        prompt: PromptKeysValues,
        packed: PackedRows | None = None,
        dropout_seeds: jax.Array | None = None,
    ) -> jax.Array:
        """The last norm's output at every position, which has read only the tokens before it.

        Args:
          tokens: [B, S] int32; or [G, M] in G packs of rows.
          prompt: keys and values from `encode_prompt`, for each row.
          packed: where the rows lie among the G M positions; None for rows of S.
          dropout_seeds: [B] or [G] uint32; None for no dropout.

        Returns:
          [B * S, W] or [G * M, W] float32.
        """
        rows = EqualRows(*tokens.shape) if packed is None else packed
        is_first = rows.reach()[0] == 0
        x = self.embed(jnp.where(is_first, self.start_token, jnp.roll(tokens.ravel(), 1)))
        # The layers use three sites each, from 0.
        x = dropout(x, dropout_seeds, 3 * self.num_layers, self.dropout)
        for index, layer in enumerate(self.layers):
            scales = self.norm_scales[3 * index : 3 * index + 3]
            x = layer(x, rows, scales, [prompt.layer(index)], dropout_seeds)
        return rms_norm(x, self.norm_scales[-1])

    def logits(self, tokens: jax.Array, prompt: PromptKeysValues) -> jax.Array:
        """Logits of each token given those before it, [B, S, V] float32; arguments as for `hidden`."""
        return self.next_logits(self.hidden(tokens, prompt)).reshape(*tokens.shape, -1)

    def next_logits(self, h: jax.Array) -> jax.Array:
        """The last norm's output [N, W] to logits [N, V] float32."""
        return token_logits(h, self.head_table.astype(self.dtype).T, self.log_unigram)

    def cross_entropy(self, tokens: jax.Array, prompt: PromptKeysValues, **packing) -> jax.Array:
        """-log p(token | the tokens before it, prompt) in nats, [B, S] float32; arguments as for `hidden`."""
        h, table = self.hidden(tokens, prompt, **packing), self.head_table.astype(self.dtype).T
        return cross_entropy(h, table, self.log_unigram, tokens.reshape(-1)).reshape(tokens.shape)

    def __call__(self, tokens: jax.Array, prompt: Prompt) -> jax.Array:
        """Everything once, for initialisation: `cross_entropy` with the prompt not yet encoded."""
        return self.cross_entropy(tokens, self.encode_prompt(prompt))


def make_twin(denoiser: TextDenoiser, start_token: int) -> CausalTransformer:
    """The twin of a denoiser: its layers, and a feed-forward width that brings it nearest to its parameters."""

    def twin(mlp_ratio: int) -> CausalTransformer:
        return CausalTransformer(
            vocab_size=denoiser.vocab_size,
            num_layers=denoiser.num_layers,
            num_heads=denoiser.num_heads,
            width=denoiser.width,
            mlp_ratio=mlp_ratio,
            conv_width=denoiser.conv_width,
            dropout=denoiser.dropout,
            dtype=denoiser.dtype,
            prompt_dim=denoiser.prompt_dim,
            start_token=start_token,
            prompt_module=denoiser.prompt_module,
        )

    same = twin(denoiser.mlp_ratio)
    missing = count_parameters(denoiser) - count_parameters(same)
    a_ratio_more = 2 * denoiser.num_layers * denoiser.width**2
    return twin(max(1, denoiser.mlp_ratio + round(missing / a_ratio_more)))


def count_parameters(model: CausalTransformer | TextDenoiser) -> int:
    """How many trainable parameters a model has: the tokens' frequencies are not trained."""
    init = init_params if isinstance(model, TextDenoiser) else init_twin
    shapes = jax.eval_shape(lambda: init(model, jax.random.key(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes)) - model.vocab_size


def init_twin(model: CausalTransformer, key: jax.Array) -> Any:
    """Fresh parameters; shapes do not depend on batch, row or prompt length."""
    rows, length = 1, 8
    if model.prompt_module is None:
        inputs = jnp.zeros((rows, length, model.prompt_dim), jnp.float16)
    else:
        inputs = jnp.zeros((rows, length), jnp.int32)
    prompt = Prompt(inputs=inputs, mask=jnp.ones((rows, length), bool))
    return model.init(key, jnp.zeros((rows, length), jnp.int32), prompt)["params"]
