"""The parts of the denoiser: norms, heads, noise-level features, one transformer layer."""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from sunfish_jax.ops.attention import attention
from sunfish_jax.ops.convolution import depthwise_convolution
from sunfish_jax.ops.dense import dense, squared_relu_mlp
from sunfish_jax.ops.dropout import dropout
from sunfish_jax.ops.quantized import QuantizedKernel, quantize_kernel
from sunfish_jax.ops.rotary import rotary_heads
from sunfish_jax.ops.rows import Rows

# The collection of variables that holds a model's kernels in eight bits.
QUANTIZED = "quantized"
# A layer's kernels that read its residual stream and those that write to it, each with its dimension of width W.
READERS = {"attention_in": 0, "cross_in": 0, "mlp_in": 0}
WRITERS = {"attention_out": 1, "cross_out": 1, "mlp_out": 0}

_EPSILON = 1e-6


def rms_norm(x: jax.Array, scale: jax.Array | float = 1.0) -> jax.Array:
    """x / sqrt(mean(x^2)) * scale over the last dimension, in float32 (Zhang and Sennrich 2019)."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + _EPSILON) * scale


def split_heads(x: jax.Array, batch: int, num_heads: int) -> jax.Array:
    """[B*S, H*d] -> [B, H, S, d]."""
    return x.reshape(batch, -1, num_heads, x.shape[-1] // num_heads).transpose(0, 2, 1, 3)


def merge_heads(x: jax.Array) -> jax.Array:
    """[B, H, S, d] -> [B*S, H*d]."""
    batch, num_heads, length, head_dim = x.shape
    return x.transpose(0, 2, 1, 3).reshape(batch * length, num_heads * head_dim)


def kernel_init(fan_in: int):
    """Normal with variance 1 / fan_in: keeps the variance of what it multiplies."""
    return nn.initializers.normal(fan_in**-0.5)


class NoiseLevelFeatures(nn.Module):
    """A representation of gamma from which the layers' adaptive scales are made."""

    dim: int
    num_frequencies: int = 32

    @nn.compact
    def __call__(self, gamma: jax.Array) -> jax.Array:
        """gamma [B] -> [B, dim] float32."""
        # gamma spans about [-10, 15]: wavelengths from far above that range down to one nat.
        frequencies = jnp.geomspace(0.05, 2 * jnp.pi, self.num_frequencies)
        angles = gamma[:, None] * frequencies
        features = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
        fan_in = 2 * self.num_frequencies
        hidden = dense(features, self.param("kernel_in", kernel_init(fan_in), (fan_in, self.dim)))
        hidden = nn.silu(hidden + self.param("bias_in", nn.initializers.zeros, (self.dim,)))
        return nn.silu(dense(hidden, self.param("kernel_out", kernel_init(self.dim), (self.dim, self.dim))))


def quantized_kernel(module: nn.Module, name: str, kernel: jax.Array) -> QuantizedKernel:
    """A kernel of a module, from the collection `QUANTIZED` where it was made once for many passes."""
    made_before = module.get_variable(QUANTIZED, name)
    return quantize_kernel(kernel) if made_before is None else made_before


class TransformerLayer(nn.Module):
    """Self-attention, cross-attention to the prompt, and a squared-ReLU feed-forward layer, all pre-norm.

    A causal layer reads a position's past and itself alone. A quantized one multiplies with its kernels in eight
    bits.
    """

    width: int
    num_heads: int
    mlp_ratio: int
    conv_width: int
    dropout: float
    site: int
    dtype: jnp.dtype
    quantized: bool = False
    causal: bool = False

    @nn.compact
    def __call__(self, x, rows, scales, prompts, dropout_seeds):
        """One layer.

        Args:
          x: [k*N, W] float32, the residual stream: all positions for the first of k prompts, then all for the
            second, and so on; or [N, W] before any prompt is read.
          rows: B rows among the N positions.
          scales: three [B, W] or [W], what the norms' outputs are multiplied with.
          prompts: k triples of keys and values [B, H, P, d] and mask [B, P], bool.
          dropout_seeds: [G] uint32, one for each of G equal parts of the positions, where k is 1; or None.

        Returns:
          [k*N, W] float32.
        """
        width, hidden, zeros = self.width, self.mlp_ratio * self.width, nn.initializers.zeros

        def taps(name):
            return self.param(name, zeros, (self.conv_width, width)) if self.conv_width else None

        def kernel(name, columns, init):
            values = self.param(name, init, (width, columns)).astype(self.dtype)
            return _Kernel(values, quantized_kernel(self, name, values) if self.quantized else None)

        parameters = _LayerParameters(
            attention_taps=taps("attention_taps"),
            attention_in=kernel("attention_in", 3 * width, kernel_init(width)),
            attention_out=kernel("attention_out", width, zeros),
            cross_in=kernel("cross_in", width, kernel_init(width)),
            cross_out=kernel("cross_out", width, zeros),
            mlp_taps=taps("mlp_taps"),
            # The second kernel too is [W, hidden]: squared_relu_mlp says why.
            mlp_out=kernel("mlp_out", hidden, zeros),
            mlp_in=kernel("mlp_in", hidden, kernel_init(width)),
        )
        first_site = jnp.uint32(3 * self.site)
        return _layer(
            parameters,
            x,
            rows,
            scales,
            prompts,
            dropout_seeds,
            first_site,
            self.num_heads,
            self.dropout,
            self.causal,
        )


class _Kernel(NamedTuple):
    """A kernel in the dtype of the layer's products; and in eight bits, if the layer is quantized."""

    values: jax.Array
    quantized: QuantizedKernel | None


class _LayerParameters(NamedTuple):
    """A layer's kernels, and the taps of its convolutions, float32, if it has any."""

    attention_taps: jax.Array | None
    attention_in: _Kernel
    attention_out: _Kernel
    cross_in: _Kernel
    cross_out: _Kernel
    mlp_taps: jax.Array | None
    mlp_out: _Kernel
    mlp_in: _Kernel


@jax.custom_vjp
def _gradient_made_once(x: jax.Array) -> jax.Array:
    """x itself. XLA may not make its gradient again in each loop that reads it."""
    return x


_gradient_made_once.defvjp(lambda x: (x, None), lambda _, g: (jax.lax.optimization_barrier(g),))


@functools.partial(jax.jit, static_argnames=("num_heads", "dropout_rate", "causal"))
def _layer(parameters, x, rows: Rows, scales, prompts, dropout_seeds, first_site, num_heads, dropout_rate, causal):
    """What `TransformerLayer` does: jitted, so that it is traced and differentiated once for all layers.

    XLA puts it into each of them, so the program is the same; tracing a step of `micro` takes half the time.
    """
    num_positions, width = rows.num_positions, x.shape[-1]

    def rows_of(x):
        return rows if len(x) == num_positions else rows.repeated(len(prompts))

    # Made again in the backward pass from x, which is kept anyway: as fast as keeping what is between x and h,
    # and a fifth less memory.
    @jax.checkpoint
    def norm(x, scale, taps=None):
        scale = scale if scale.ndim == 1 else rows.spread(scale)
        h = rms_norm(x.reshape(-1, num_positions, width), scale).reshape(x.shape)
        if taps is None:
            return h
        h = _gradient_made_once(h)
        return h + depthwise_convolution(h, taps, rows_of(x).reach(), causal)

    def residual(x, branch, site):
        return x + dropout(branch, dropout_seeds, first_site + site, dropout_rate)

    def merged(heads, rows):
        return rows.positions(heads).reshape(rows.num_positions, -1)

    dtype = parameters.attention_in.values.dtype
    qkv = dense(norm(x, scales[0], parameters.attention_taps), *parameters.attention_in)
    all_rows = rows_of(x)
    h = attention(*rotary_heads(qkv, all_rows, num_heads, dtype), all_rows.mask, causal)
    x = residual(x, dense(merged(h, all_rows), *parameters.attention_out), 0)

    def cross_attention(x, keys, values, mask):
        if keys.shape[2] == 1:
            # Whatever the query, the only value is the answer.
            return rows.spread(dense(merge_heads(values), *parameters.cross_out))
        q = dense(norm(x, scales[1]), *parameters.cross_in).astype(dtype)
        q = rows.windows(q.reshape(num_positions, num_heads, -1))
        return dense(merged(attention(q, keys, values, mask), rows), *parameters.cross_out)

    # Up to here in the first layer, a row is the same for all its prompts.
    parts = [x] * len(prompts) if len(x) == num_positions else jnp.split(x, len(prompts))
    pairs = zip(parts, prompts, strict=True)
    x = jnp.concatenate([residual(x, cross_attention(x, *prompt), 1) for x, prompt in pairs])

    h = norm(x, scales[2], parameters.mlp_taps)
    mlp_in, mlp_out = parameters.mlp_in, parameters.mlp_out
    h = squared_relu_mlp(h, mlp_in.values, mlp_out.values, mlp_in.quantized, mlp_out.quantized)
    return residual(x, h, 2)
