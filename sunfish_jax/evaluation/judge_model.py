"""The judge's network: a causal Llama that scores every token of a text in one pass.

The layers are those of Llama (Touvron et al. 2023, arXiv:2302.13971), with grouped-query attention (Ainslie et al.
2023, arXiv:2305.13245) and a head that is tied to the embeddings.
"""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from sunfish_jax.models.layers import merge_heads, split_heads
from sunfish_jax.ops.dense import dense

# Positions whose logits are in memory at a time: over 49,152 tokens, 50 MB.
_HEAD_POSITIONS = 256
_MASKED = -1e9


@flax.struct.dataclass
class Layers:
    """The weights of all layers, stacked along a first axis L that is left out below.

    Attributes:
        attention_norm, mlp_norm: `[d]` float32, the scales of the norms before each half of a layer.
        query_key_value: `[d, (H + 2 G) k]`: queries of H heads, then keys and values of G heads, k features each.
            Features i and i + k/2 of a query's or a key's head are the pair that rotary positions turn.
        attention_out: `[H k, d]`.
        gate_up: `[d, 2 f]`: what goes through SiLU, then what it multiplies.
        down: `[f, d]`.
    """

    attention_norm: jax.Array
    query_key_value: jax.Array
    attention_out: jax.Array
    mlp_norm: jax.Array
    gate_up: jax.Array
    down: jax.Array


@flax.struct.dataclass
class Llama:
    """A Llama's weights and the numbers that belong to them. Products are computed in the matrices' dtype.

    Attributes:
        embedding: `[V, d]`, also the head.
        layers: See `Layers`.
        final_norm: `[d]` float32.
        num_heads, num_kv_heads: H, and G, which divides it.
        rotary_base, norm_epsilon: Constants of the rotary positions and of the norms.
    """

    embedding: jax.Array
    layers: Layers
    final_norm: jax.Array
    num_heads: int = flax.struct.field(pytree_node=False)
    num_kv_heads: int = flax.struct.field(pytree_node=False)
    rotary_base: float = flax.struct.field(pytree_node=False)
    norm_epsilon: float = flax.struct.field(pytree_node=False)


def load_llama(metadata: Callable[[str], float], tensor: Callable[[str], np.ndarray], dtype: str) -> Llama:
    """Puts a Llama together from the contents of a GGUF file.

    Args:
        metadata: The file's value of a key, such as `llama.block_count`.
        tensor: The dequantised float32 tensor of a name, matrices as `[out, in]`.
        dtype: The matrices' dtype here.

    Returns:
        The network.
    """
    num_heads = metadata("llama.attention.head_count")
    num_kv_heads = metadata("llama.attention.head_count_kv")

    def kernel(*weights: np.ndarray) -> np.ndarray:
        return np.concatenate(weights).T.astype(jnp.dtype(dtype))

    def layer(i: int) -> Layers:
        def weight(name: str) -> np.ndarray:
            return tensor(f"blk.{i}.{name}.weight")

        query = pairs_to_halves(weight("attn_q"), num_heads)
        key = pairs_to_halves(weight("attn_k"), num_kv_heads)
        return Layers(
            attention_norm=weight("attn_norm"),
            query_key_value=kernel(query, key, weight("attn_v")),
            attention_out=kernel(weight("attn_output")),
            mlp_norm=weight("ffn_norm"),
            gate_up=kernel(weight("ffn_gate"), weight("ffn_up")),
            down=kernel(weight("ffn_down")),
        )

    layers = [layer(i) for i in range(metadata("llama.block_count"))]
    return Llama(
        embedding=tensor("token_embd.weight").astype(jnp.dtype(dtype)),
        layers=jax.tree.map(lambda *leaves: np.stack(leaves), *layers),
        final_norm=tensor("output_norm.weight"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        rotary_base=metadata("llama.rope.freq_base"),
        norm_epsilon=metadata("llama.attention.layer_norm_rms_epsilon"),
    )


def pairs_to_halves(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Reorders the rows of `[H k, d]` within each head: the pairs (2i, 2i + 1) of GGUF become (i, i + k/2).

    A query and a key that are reordered alike have the same product, and halves are quicker to turn than pairs.
    """
    return weight.reshape(num_heads, -1, 2, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)


@jax.jit
def negative_log_likelihoods(llama: Llama, tokens: jax.Array, targets: jax.Array) -> jax.Array:
    """-log p(target | the tokens up to and including this position), at every position.

    Args:
        llama: The network.
        tokens: `[B, S]` int32. Nothing depends on a later position, so padding at the end needs no mask.
        targets: `[B, S]` int32, the tokens that follow.

    Returns:
        `[B, S]` float32, nats.
    """
    hidden = _hidden_states(llama, tokens)
    num_positions, width = hidden.shape
    padding = -num_positions % _HEAD_POSITIONS

    def chunk(operands):
        hidden, targets = operands
        logits = jax.lax.dot_general(
            hidden, llama.embedding, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        return jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]

    hidden = jnp.pad(hidden, ((0, padding), (0, 0))).reshape(-1, _HEAD_POSITIONS, width)
    padded_targets = jnp.pad(targets.reshape(-1), (0, padding)).reshape(-1, _HEAD_POSITIONS)
    return jax.lax.map(chunk, (hidden, padded_targets)).reshape(-1)[:num_positions].reshape(targets.shape)


def _hidden_states(llama: Llama, tokens: jax.Array) -> jax.Array:
    """The normed output of the last layer, `[B * S, d]` in the compute dtype."""
    batch, length = tokens.shape
    x = llama.embedding[tokens.reshape(-1)].astype(jnp.float32)
    dtype, heads, groups = llama.embedding.dtype, llama.num_heads, llama.num_kv_heads
    head_dim = llama.layers.query_key_value.shape[-1] // (heads + 2 * groups)
    cos, sin = _rotary_angles(length, head_dim, llama.rotary_base)

    def apply_layer(x: jax.Array, layer: Layers):
        qkv = dense(_rms_norm(x, layer.attention_norm, llama.norm_epsilon), layer.query_key_value)
        qkv = split_heads(qkv, batch, heads + 2 * groups)
        q, k, v = jnp.split(qkv, (heads, heads + groups), axis=1)
        q, k = (_rotate(part, cos, sin).astype(dtype) for part in (q, k))
        x = x + dense(merge_heads(_causal_attention(q, k, v.astype(dtype))), layer.attention_out)

        hidden = dense(_rms_norm(x, layer.mlp_norm, llama.norm_epsilon), layer.gate_up)
        gate, up = jnp.split(hidden, 2, axis=-1)
        return x + dense(jax.nn.silu(gate) * up, layer.down), None

    # One layer is compiled, not thirty: a new length takes a second.
    x, _ = jax.lax.scan(apply_layer, x, llama.layers)
    return _rms_norm(x, llama.final_norm, llama.norm_epsilon).astype(dtype)


def _rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + epsilon) * scale


def _rotary_angles(length: int, head_dim: int, base: float) -> tuple[jax.Array, jax.Array]:
    """cos and sin of s * base^(-2i/k), `[S, k/2]` each."""
    # In float64, and constant: float32 loses digits of the later positions' angles.
    angles = np.arange(length)[:, None] * base ** (-np.arange(0, head_dim, 2) / head_dim)
    return jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)


def _rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary positions (Su et al. 2021): turns each pair (i, i + k/2) of `[B, H, S, k]`."""
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _causal_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(k)) v over positions that are not later.

    Args:
        q: `[B, H, S, k]`.
        k, v: `[B, G, S, k]`; the H / G query heads that follow each other share one of them.

    Returns:
        `[B, H, S, k]`.
    """
    batch, heads, length, head_dim = q.shape
    groups = k.shape[1]
    # The queries that share a key are rows of one product.
    q = q.reshape(batch, groups, -1, head_dim)
    scores = jax.lax.dot_general(q, k, (((3,), (3,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, groups, heads // groups, length, length) * head_dim**-0.5
    scores = jnp.where(jnp.tri(length, dtype=bool), scores, _MASKED)
    probabilities = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(batch, groups, -1, length)
    attended = jax.lax.dot_general(probabilities, v, (((3,), (2,)), ((0, 1), (0, 1))))
    return attended.reshape(batch, heads, length, head_dim)
