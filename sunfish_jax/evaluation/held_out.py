"""Held-out cross-entropy on a fixed grid of noise levels.

The training loss is no measure of progress: under the learned schedule its mean is about H / 2 however good
the model is. These figures are: the noise levels, the rows and the noise never change during a run
(unless it goes on with another `train.batch_size` or `num_devices`, by which the rows are put into batches).
"""

import functools
from collections import Counter
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from sunfish_jax.data.padded_rows import PaddedBatch
from sunfish_jax.diffusion import process
from sunfish_jax.evaluation.text_rows import shuffled_order

_NOISE_SEED = 0x5EED
# Self-conditioning and context use are measured on every fourth batch of each length, which is enough for
# differences of paired figures and keeps the evaluation during training to about twice one pass over the rows.
_DETAIL_EVERY = 4
_FIGURES = ("all", "true", "self_conditioned", "shuffled", "none")


def held_out_cross_entropy(model: nn.Module, params: Mapping, rows: Iterable[PaddedBatch]) -> dict[str, float]:
    """Cross-entropy of the clean token, in nats a token, at each level of the fixed noise grid.

    The levels are token SNRs rho = d_e e^(-gamma) in `process.HELD_OUT_SNRS`. Only real tokens count, nothing
    is given clean, dropout is off, and every row has the prompt it comes with. Besides, on a part of the
    rows:

    - `self_conditioning_gain`: how much lower it is with the model's first estimate as a further input;
    - context use: `true` is the same figure for those rows; `shuffled` for the same texts with their words
      in random order (a token's surroundings are then the text's words, but say nothing by their order);
      `none` for the best guess from the token's own noisy embedding, softmax(prior + log unigram). A model
      that has learnt word order is far below `shuffled`.

    Compiled once for each shape among the rows, the layers and what follows them apart: they are most of a
    program, and are shared by its two uses.

    Args:
        model: The denoiser.
        params: Its parameters, the tokens' `log_unigram` [V] among them; the moving average, usually.
        rows: Held-out batches with A = 1; the same ones each time.

    Returns:
        Scalars by name: `held_out/mean`, `held_out/rho_25` and so on, `held_out/self_conditioning_gain`,
        `context/true_25`, `context/shuffled_25`, `context/none_25`, and `context/gain`, the mean over levels
        of shuffled less true.
    """
    vocabulary = _vocabulary(model, params)
    sums = {name: np.zeros(len(process.HELD_OUT_SNRS)) for name in _FIGURES}
    counts, of_length = dict.fromkeys(("all", "true"), 0), Counter()
    for i, batch in enumerate(rows):
        batch = jax.tree.map(lambda leaf: leaf[0], batch)
        length = batch.tokens.shape[-1]
        detail = of_length[length] % _DETAIL_EVERY == 0
        of_length[length] += 1
        for name, values in _batch_sums(model, params, vocabulary, batch, i, detail).items():
            sums[name] += values
        real = int(np.sum(batch.padding_mask))
        counts["all"] += real
        counts["true"] += real * detail
    mean = sums.pop("all") / max(counts["all"], 1)
    columns = {name: values / max(counts["true"], 1) for name, values in sums.items()}
    gain = columns["true"] - columns.pop("self_conditioned")
    figures = {"held_out/mean": mean.mean(), "held_out/self_conditioning_gain": gain.mean()}
    figures["context/gain"] = (columns["shuffled"] - columns["true"]).mean()
    named = {"held_out/rho": mean} | {f"context/{name}": values for name, values in columns.items()}
    for name, values in named.items():
        figures |= {f"{name}_{snr:g}": value for snr, value in zip(process.HELD_OUT_SNRS, values, strict=True)}
    return {name: float(value) for name, value in figures.items()}


def _batch_sums(model, params, vocabulary, batch, number, detail) -> dict[str, np.ndarray]:
    """Summed cross-entropy of a batch at each level, for those of `_FIGURES` that are asked for."""
    tokens, mask = batch.tokens, batch.padding_mask
    order = shuffled_order(mask, seed=number)
    shuffled = np.take_along_axis(np.asarray(tokens), order, axis=1)
    prompt_kv = _encode_prompt(model, params, batch.prompt)
    read = functools.partial(_features, model, params, vocabulary, prompt_kv)
    embeddings = vocabulary.embeddings
    levels = []
    for j, snr in enumerate(process.HELD_OUT_SNRS):
        gamma = jnp.float32(process.gamma_of_snr(snr, embeddings.shape[-1]))
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(_NOISE_SEED), number), j)
        z, zeros = _diffused(embeddings, tokens, gamma, key)
        features = read(z, zeros, gamma)
        level = {"all": _cross_entropy(vocabulary, features, tokens, mask)}
        if detail:
            estimate = _estimate(vocabulary, features)
            # The noise goes with its token: what differs is the order alone.
            z_shuffled = jnp.take_along_axis(z, order[..., None], axis=1)
            level |= {
                "true": level["all"],
                "self_conditioned": _cross_entropy(vocabulary, read(z, estimate, gamma), tokens, mask),
                "shuffled": _cross_entropy(vocabulary, read(z_shuffled, zeros, gamma), shuffled, mask),
                "none": _without_context(vocabulary, tokens, mask, z, gamma),
            }
        levels.append(level)
    return {name: np.array([level[name] for level in levels]) for name in levels[0]}


@functools.partial(jax.jit, static_argnums=0)
def nearest_neighbour_distance(model: nn.Module, params: Mapping) -> jax.Array:
    """Mean distance of a token's embedding to the nearest other one, in units of their norm sqrt(d_e).

    Random directions give about sqrt(2) less a little; collapsing embeddings go to 0.
    """
    table = _vocabulary(model, params).embeddings
    table = table / jnp.linalg.norm(table, axis=-1, keepdims=True)
    vocab_size = table.shape[0]
    block = min(512, vocab_size)
    padded = jnp.pad(table, ((0, -vocab_size % block), (0, 0)))

    def closest(start):
        rows = jax.lax.dynamic_slice_in_dim(padded, start, block)
        cosine = rows @ table.T
        itself = start + jnp.arange(block)[:, None] == jnp.arange(vocab_size)
        return jnp.max(jnp.where(itself, -1.0, cosine), axis=-1)

    cosine = jax.lax.map(closest, jnp.arange(0, padded.shape[0], block)).reshape(-1)[:vocab_size]
    return jnp.mean(jnp.sqrt(jnp.maximum(2 - 2 * cosine, 0)))


@functools.partial(jax.jit, static_argnums=0)
def _vocabulary(model, params):
    return model.apply({"params": params}, method="vocabulary")


@functools.partial(jax.jit, static_argnums=0)
def _encode_prompt(model, params, prompt):
    return model.apply({"params": params}, prompt, method="encode_prompt")


@jax.jit
def _diffused(embeddings, tokens, gamma, key):
    """Noisy embeddings, and zeros of their shape."""
    noise = jax.random.normal(key, (*tokens.shape, embeddings.shape[-1]))
    return process.diffuse(embeddings[tokens], noise, gamma), jnp.zeros_like(noise)


@functools.partial(jax.jit, static_argnums=0)
def _features(model, params, vocabulary, prompt_kv, z, x_hat, gamma):
    """What the logits are made of, at one noise level."""
    gamma, known = jnp.full(len(z), gamma), jnp.zeros(z.shape[:2], bool)
    return model.apply({"params": params}, vocabulary, z, gamma, x_hat, known, prompt_kv, method="features")


@jax.jit
def _estimate(vocabulary, features):
    """The model's first estimate of the clean embeddings."""
    return vocabulary.expected_embedding(vocabulary.logits(features))


@jax.jit
def _cross_entropy(vocabulary, features, tokens, padding_mask):
    """Summed cross-entropy of the real tokens, in nats."""
    return jnp.sum(jnp.where(padding_mask, vocabulary.cross_entropy(features, tokens), 0.0))


@jax.jit
def _without_context(vocabulary, tokens, padding_mask, z, gamma):
    """The same for softmax(prior + log unigram), the exact posterior of a token seen alone."""
    scores = process.posterior_scale(gamma) * (z @ vocabulary.embeddings.T)
    log_probs = jax.nn.log_softmax(scores + vocabulary.log_unigram)
    losses = -jnp.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0]
    return jnp.sum(jnp.where(padding_mask, losses, 0.0))
