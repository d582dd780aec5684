"""A small prompt encoder trained from scratch together with the denoiser."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from sunfish_jax.ops.attention import attention
from sunfish_jax.ops.dense import dense, squared_relu_mlp

_kernel_init = nn.initializers.lecun_normal()
# Of a kernel that is stored [outputs, inputs].
_transposed_init = nn.initializers.lecun_normal(in_axis=-1, out_axis=-2)


class PromptTransformer(nn.Module):
    """A bidirectional transformer with learned positions, pre-norm and without biases.

    Attributes:
        vocab_size: Of the corpus tokenizer, whose tokens it reads.
        max_length: The longest prompt, in tokens, rounded up as prompts are.
        num_layers: Layers of self-attention and feed-forward.
        num_heads: Attention heads; divides `width`.
        width: d, of the states.
        dtype: Matrix products are computed in it; everything else in float32.
    """

    vocab_size: int
    max_length: int
    num_layers: int
    num_heads: int
    width: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Encodes prompts.

        Args:
            tokens: `[..., P]` int32, P at most `max_length`.
            mask: `[..., P]` bool, True at tokens.

        Returns:
            `[..., P, d]` float32 states; at padding they mean nothing.
        """
        *batch, length = tokens.shape
        rows, head_dim = tokens.size // length, self.width // self.num_heads
        mask = mask.reshape(rows, length)
        embed_init = nn.initializers.normal(self.width**-0.5)
        embedded = nn.Embed(self.vocab_size, self.width, embedding_init=embed_init, name="tokens")(tokens)
        positions = self.param("positions", embed_init, (self.max_length, self.width))
        # Batch and sequence stay merged, [rows * P, d], as the dense layers want them.
        x = ((embedded + positions[:length]) * self.width**0.5).reshape(rows * length, self.width)

        def heads(y: jax.Array) -> jax.Array:
            return y.reshape(rows, length, self.num_heads, head_dim).transpose(0, 2, 1, 3)

        for i in range(self.num_layers):
            normed = nn.RMSNorm(name=f"attention_norm_{i}")(x)
            query, key, value = (
                heads(dense(normed, self._kernel(f"{name}_{i}", self.width, self.width))).astype(self.dtype)
                for name in ("query", "key", "value")
            )
            attended = attention(query, key, value, mask).transpose(0, 2, 1, 3).reshape(x.shape)
            x += dense(attended, self._kernel(f"attention_output_{i}", self.width, self.width))
            x += squared_relu_mlp(
                nn.RMSNorm(name=f"mlp_norm_{i}")(x),
                self._kernel(f"mlp_in_{i}", self.width, 4 * self.width),
                # Stored the other way round: squared_relu_mlp says why.
                self._kernel(f"mlp_out_{i}", self.width, 4 * self.width, _transposed_init),
            )
        return nn.RMSNorm(name="output_norm")(x).reshape(*batch, length, self.width)

    def _kernel(self, name: str, rows: int, columns: int, init=_kernel_init) -> jax.Array:
        return self.param(f"{name}_kernel", init, (rows, columns)).astype(self.dtype)
