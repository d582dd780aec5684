"""Held-out cross-entropy on a fixed grid of noise levels.

The training loss is no measure of progress: under the learned schedule its mean is about H / 2 however good
the model is. These figures are: the noise levels, the rows and the noise never change during a run.
"""

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from sunfish_jax.data.batches import Batch
from sunfish_jax.diffusion import process

_NOISE_SEED = 0x5EED
# Self-conditioning and context use are measured on every fourth batch, which is enough for differences of
# paired figures and keeps the evaluation during training to about twice one pass over the rows.
_DETAIL_EVERY = 4


def held_out_cross_entropy(
    model: nn.Module, params: Mapping, rows: Sequence[Batch], *, log_unigram: np.ndarray | None = None
) -> dict[str, float]:
    """Cross-entropy of the clean token, in nats a token, at each level of the fixed noise grid.

    The levels are token SNRs rho = d_e e^(-gamma) in `process.HELD_OUT_SNRS`. Only real tokens count, nothing
    is given clean, dropout is off, and every row has the prompt it comes with. Besides, on a part of the
    rows:

    - `self_conditioning_gain`: how much lower it is with the model's first estimate as a further input;
    - context use: `true` is the same figure for those rows; `shuffled` for the same texts with their words
      in random order (a token's surroundings are then the text's words, but say nothing by their order);
      `none` for the best guess from the token's own noisy embedding, softmax(prior + log unigram). A model
      that has learnt word order is far below `shuffled`.

    Compiled once for each shape among the rows.

    Args:
        model: The denoiser.
        params: Its parameters; the moving average, usually.
        rows: Held-out batches with A = 1; the same ones each time.
        log_unigram: [V] log frequencies of the training tokens; None leaves `none` out.

    Returns:
        Scalars by name: `held_out/mean`, `held_out/rho_25` and so on, `held_out/self_conditioning_gain`,
        `context/true_25`, `context/shuffled_25`, `context/none_25`, and `context/gain`, the mean over levels
        of shuffled less true.
    """
    table = _embedding_table(model, params)
    levels = process.HELD_OUT_SNRS
    names = ("all", "detail", "self", "shuffled", "none")
    sums = {name: np.zeros(len(levels)) for name in names}
    counts = {name: 0 for name in names}
    noise_key = jax.random.key(_NOISE_SEED)
    for i, batch in enumerate(rows):
        batch = jax.tree.map(lambda leaf: leaf[0], batch)
        prompt_kv = _encode_prompt(model, params, batch.prompt)
        real = int(np.sum(batch.padding_mask))
        detail = i % _DETAIL_EVERY == 0
        counts["all"] += real
        counts["detail"] += real * detail
        shuffled = shuffle_words(batch.tokens, batch.padding_mask, seed=i) if detail else None
        for j, snr in enumerate(levels):
            gamma = jnp.float32(process.gamma_of_snr(snr, table.shape[-1]))
            key = jax.random.fold_in(jax.random.fold_in(noise_key, i), j)
            score = functools.partial(_cross_entropy, model, params)
            total = score(batch.tokens, batch.padding_mask, prompt_kv, gamma, key, False)
            sums["all"][j] += total
            if detail:
                sums["detail"][j] += total
                sums["self"][j] += score(batch.tokens, batch.padding_mask, prompt_kv, gamma, key, True)
                sums["shuffled"][j] += score(shuffled, batch.padding_mask, prompt_kv, gamma, key, False)
                if log_unigram is not None:
                    sums["none"][j] += _without_context(
                        table, batch.tokens, batch.padding_mask, gamma, key, log_unigram
                    )
    mean = sums.pop("all") / max(counts["all"], 1)
    true, self_conditioned, shuffled, none = (
        sums[name] / max(counts["detail"], 1) for name in ("detail", "self", "shuffled", "none")
    )
    figures = {"held_out/mean": mean.mean()}
    figures |= {f"held_out/rho_{snr:g}": value for snr, value in zip(levels, mean, strict=True)}
    figures["held_out/self_conditioning_gain"] = (true - self_conditioned).mean()
    columns = {"true": true, "shuffled": shuffled} | ({} if log_unigram is None else {"none": none})
    for name, values in columns.items():
        figures |= {f"context/{name}_{snr:g}": value for snr, value in zip(levels, values, strict=True)}
    figures["context/gain"] = (shuffled - true).mean()
    return {name: float(value) for name, value in figures.items()}


def log_unigram(counts: np.ndarray) -> np.ndarray:
    """Log frequencies [V] from how often each token occurs in the training text, with one added to each."""
    smoothed = np.asarray(counts, np.float64) + 1
    return np.log(smoothed / smoothed.sum()).astype(np.float32)


def shuffle_words(tokens: np.ndarray, padding_mask: np.ndarray, seed: int) -> np.ndarray:
    """The same texts with their tokens in random order, [B, S].

    Padding and each row's last real token (the end of text, where the text ends in the row) stay in place.
    """
    shuffled = np.array(tokens)
    rng = np.random.default_rng(seed)
    for row, mask in zip(shuffled, np.asarray(padding_mask), strict=True):
        places = np.flatnonzero(mask)[:-1]
        row[places] = rng.permutation(row[places])
    return shuffled


@functools.partial(jax.jit, static_argnums=0)
def nearest_neighbour_distance(model: nn.Module, params: Mapping) -> jax.Array:
    """Mean distance of a token's embedding to the nearest other one, in units of their norm sqrt(d_e).

    Random directions give about sqrt(2) less a little; collapsing embeddings go to 0.
    """
    table = _embedding_table(model, params)
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
def _embedding_table(model, params):
    return model.apply({"params": params}, method="embedding_table")


@functools.partial(jax.jit, static_argnums=0)
def _encode_prompt(model, params, prompt):
    return model.apply({"params": params}, prompt, method="encode_prompt")


@functools.partial(jax.jit, static_argnums=(0, 7))
def _cross_entropy(model, params, tokens, padding_mask, prompt_kv, gamma, key, self_conditioning):
    """Summed cross-entropy of the real tokens at one noise level, in nats."""
    variables = {"params": params}
    table = model.apply(variables, method="embedding_table")
    gamma = jnp.full(tokens.shape[:1], gamma)
    z = _diffuse(table, tokens, gamma, key)
    given = (jnp.zeros(tokens.shape, bool), prompt_kv)
    x_hat = jnp.zeros_like(z)
    if self_conditioning:
        x_hat = model.apply(variables, z, gamma, x_hat, *given, method="estimate")
    losses = model.apply(variables, tokens, z, gamma, x_hat, *given, method="cross_entropy")
    return jnp.sum(jnp.where(padding_mask, losses, 0.0))


@jax.jit
def _without_context(table, tokens, padding_mask, gamma, key, log_unigram):
    """The same for softmax(prior + log unigram), the exact posterior of a token seen alone."""
    gamma = jnp.full(tokens.shape[:1], gamma)
    z = _diffuse(table, tokens, gamma, key)
    prior = process.posterior_scale(gamma)[:, None, None] * (z @ table.T)
    log_probs = jax.nn.log_softmax(prior + log_unigram)
    losses = -jnp.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0]
    return jnp.sum(jnp.where(padding_mask, losses, 0.0))


def _diffuse(table, tokens, gamma, key):
    noise = jax.random.normal(key, (*tokens.shape, table.shape[-1]))
    return process.diffuse(table[tokens], noise, gamma)
