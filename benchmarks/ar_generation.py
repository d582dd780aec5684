"""Writing with the twin, token after token: each pass reads one position and what is kept of those before it."""

import functools
import math
from collections.abc import Mapping

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from ar_model import CausalTransformer

from sunfish_jax.diffusion.samplers import Known
from sunfish_jax.generation.generator import take_rows
from sunfish_jax.models.denoiser import PromptKeysValues, compute_params
from sunfish_jax.models.layers import merge_heads, rms_norm, split_heads
from sunfish_jax.models.prompt import Prompt
from sunfish_jax.ops.attention import attention
from sunfish_jax.ops.dense import dense, squared_relu_mlp
from sunfish_jax.ops.rotary import rotary

# More rows are done in turns.
_ROWS_AT_ONCE = 64


@flax.struct.dataclass
class LayerCache:
    """What a layer keeps of the positions before the one it reads. T positions, K taps of its convolutions.

    Attributes:
      keys, values: [B, H, T, d]; the keys are turned to their positions.
      attention_inputs, mlp_inputs: [B, K - 1, W] float32, what its convolutions read last.
    """

    keys: jax.Array
    values: jax.Array
    attention_inputs: jax.Array
    mlp_inputs: jax.Array


def empty_cache(model: CausalTransformer, rows: int, length: int) -> tuple[LayerCache, ...]:
    """The caches of all layers before the first position."""
    heads = jnp.zeros((rows, model.num_heads, length, model.width // model.num_heads), model.dtype)
    inputs = jnp.zeros((rows, max(0, model.conv_width - 1), model.width), jnp.float32)
    return (LayerCache(heads, heads, inputs, inputs),) * model.num_layers


def next_logits(
    model: CausalTransformer,
    params: Mapping,
    token: jax.Array,
    position: jax.Array,
    prompt: PromptKeysValues,
    caches: tuple[LayerCache, ...],
) -> tuple[jax.Array, tuple[LayerCache, ...]]:
    """Logits of the token at `position` from the one before it; the same as `CausalTransformer.logits` gives.

    Args:
      model, params: the twin.
      token: [B] int32, the token before, or `start_token`.
      position: [] int32.
      prompt: keys and values from `encode_prompt`.
      caches: of the positions before.

    Returns:
      [B, V] float32, and the caches with this position in them.
    """
    variables = {"params": params}
    x = model.apply(variables, token, method="embed")[:, None]
    scales = params["norm_scales"]
    kept = []
    for index, cache in enumerate(caches):
        x, cache = _layer(
            model,
            params[f"layers_{index}"],
            x,
            scales[3 * index : 3 * index + 3],
            position,
            (prompt.keys[index], prompt.values[index], prompt.mask),
            cache,
        )
        kept.append(cache)
    h = rms_norm(x, scales[-1]).reshape(-1, model.width)
    return model.apply(variables, h, method="next_logits"), tuple(kept)


def _layer(model, params, x, scales, position, prompt, cache):
    """`TransformerLayer` at one position: [B, 1, W] to the same, and the cache."""
    batch = x.shape[0]

    def product(h, name):
        return dense(h.reshape(-1, h.shape[-1]), params[name].astype(model.dtype)).astype(model.dtype)

    def local(h, name, before):
        if not model.conv_width:
            return h, before
        window = jnp.concatenate([before, h], axis=1)
        return h + (params[name] * window).sum(axis=1, keepdims=True), window[:, 1:]

    h, attention_inputs = local(rms_norm(x, scales[0]), "attention_taps", cache.attention_inputs)
    parts = jnp.split(product(h, "attention_in"), 3, axis=-1)
    q, k, v = (split_heads(part, batch, model.num_heads) for part in parts)
    keys = jax.lax.dynamic_update_slice_in_dim(cache.keys, rotary(k, position), position, axis=2)
    values = jax.lax.dynamic_update_slice_in_dim(cache.values, v, position, axis=2)
    past = jnp.broadcast_to(jnp.arange(keys.shape[2]) <= position, (batch, keys.shape[2]))
    h = merge_heads(attention(rotary(q, position), keys, values, past))
    x = x + dense(h, params["attention_out"].astype(model.dtype)).reshape(x.shape)

    q = split_heads(product(rms_norm(x, scales[1]), "cross_in"), batch, model.num_heads)
    h = merge_heads(attention(q, *prompt))
    x = x + dense(h, params["cross_out"].astype(model.dtype)).reshape(x.shape)

    h, mlp_inputs = local(rms_norm(x, scales[2]), "mlp_taps", cache.mlp_inputs)
    kernels = (params[name].astype(model.dtype) for name in ("mlp_in", "mlp_out"))
    x = x + squared_relu_mlp(h.reshape(-1, h.shape[-1]), *kernels).reshape(x.shape)
    return x, LayerCache(keys, values, attention_inputs, mlp_inputs)


def generate(
    model: CausalTransformer,
    params: Mapping,
    prompt: Prompt,
    keys: jax.Array,
    seq_len: int,
    *,
    temperature: float = 1.0,
    guidance_scale: float = 1.0,
    known: Known | None = None,
) -> np.ndarray:
    """Samples n rows of tokens, compiled once for a shape.

    A row depends on its prompt, its key and the settings, not on the rows beside it (up to the rounding of
    matrix products). Probabilities and the numbers that are compared with them are float64: in float32 rare
    tokens are drawn too rarely (arXiv 2409.02908).

    Args:
      model, params: the twin.
      prompt: [n, P]; where a row's mask is all False, there is no prompt.
      keys: [n] random keys, as `sample_keys` makes them.
      seq_len: S.
      temperature: divides the logits; 0 takes the likeliest token.
      guidance_scale: logits = uncond + scale (cond - uncond); 1 is no guidance, 0 ignores the prompt.
      known: given tokens, which are read and returned as they are. A gap is filled from what stands before it,
        and no text ends before its last given token.

    Returns:
      [n, S] int32; behind the end of a text there are only ends of text and given tokens.
    """
    n = len(keys)
    # Cast once, not at every position.
    params = compute_params(params, model.dtype)
    scale = float(guidance_scale) if np.any(prompt.mask) else 1.0
    # With guidance each text is read twice.
    readings = {0.0: ("without",), 1.0: ("with",)}.get(scale, ("with", "without"))
    if known is None:
        known = Known(np.zeros((n, seq_len), np.int32), np.zeros((n, seq_len), bool))
    size = math.ceil(n / math.ceil(n / _ROWS_AT_ONCE))
    tokens = []
    for start in range(0, n, size):
        # The last turn repeats rows rather than being compiled for another shape.
        rows = np.minimum(np.arange(start, start + size), n - 1)
        here = take_rows((prompt, known), rows)
        with jax.enable_x64(True):
            turn = _generate(
                model, params, *here, keys[rows], np.float64(temperature), np.float32(scale),
                readings=readings, greedy=temperature == 0,
            )  # fmt: skip
        tokens.append(np.asarray(turn))
    return np.concatenate(tokens)[:n]


@functools.partial(jax.jit, static_argnames=("model", "readings", "greedy"))
def _generate(model, params, prompt, known, keys, temperature, guidance_scale, *, readings, greedy):
    rows, length = known.tokens.shape
    end = jnp.int32(model.start_token)
    prompts = {"with": prompt, "without": prompt.replace(mask=jnp.zeros_like(prompt.mask))}
    read_under = jax.tree.map(lambda *parts: jnp.concatenate(parts), *(prompts[name] for name in readings))
    prompt_kv = model.apply({"params": params}, read_under, method="encode_prompt")

    def write_token(carry):
        position, token, ended, tokens, caches = carry
        read = jnp.tile(token, len(readings))
        logits, caches = next_logits(model, params, read, position, prompt_kv, caches)
        if len(readings) == 2:
            with_prompt, without_prompt = jnp.split(logits, 2)
            logits = without_prompt + guidance_scale * (with_prompt - without_prompt)
        goes_on = (known.mask & (jnp.arange(length) > position)).any(axis=-1)
        logits = logits.at[:, end].add(jnp.where(goes_on, -jnp.inf, jnp.float32(0)))
        if greedy:
            token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        else:
            token = draw(logits, jax.vmap(jax.random.fold_in, (0, None))(keys, position), temperature)
        token = jnp.where(ended, end, token)
        token = jnp.where(known.mask[:, position], known.tokens[:, position], token)
        # An end of text that is given with more behind it ends nothing.
        ended = (token == end) & ~goes_on
        return position + jnp.int32(1), token, ended, tokens.at[:, position].set(token), caches

    def unfinished(carry):
        position, _, ended, _, _ = carry
        return (position < length) & ~ended.all()

    start = (
        jnp.int32(0),
        jnp.full(rows, end),
        jnp.zeros(rows, bool),
        jnp.where(known.mask, known.tokens, end),
        empty_cache(model, rows * len(readings), length),
    )
    return jax.lax.while_loop(unfinished, write_token, start)[3]


def draw(logits: jax.Array, keys: jax.Array, temperature: jax.Array | float) -> jax.Array:
    """Draws a token from softmax(logits / temperature): the first whose cumulative probability passes a uniform.

    Args:
      logits: [n, V] float32.
      keys: [n] random keys.
      temperature: above 0.

    Returns:
      [n] int32.
    """
    exponents = logits.astype(jnp.float64) / temperature
    cumulative = jnp.cumsum(jnp.exp(exponents - exponents.max(axis=-1, keepdims=True)), axis=-1)
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (1,), jnp.float64))(keys)
    return jnp.sum(cumulative <= uniform * cumulative[:, -1:], axis=-1).astype(jnp.int32)
