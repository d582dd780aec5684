"""The arithmetic that a training step needs, as against what it happens to do."""

from collections.abc import Mapping

import numpy as np
from ml_collections import ConfigDict

from sunfish_jax.data.batches import PackedBatch
from sunfish_jax.models.denoiser import TextDenoiser
from sunfish_jax.models.layers import NoiseLevelFeatures


def forward_flops(model: TextDenoiser, tokens: np.ndarray, prompt: np.ndarray) -> dict[str, float]:
    """Operations in the matrix products of one forward pass, a product [m, k] @ [k, n] being 2 m k n.

    With n tokens and p prompt tokens a row, L layers, width W, feed-forward ratio r, embeddings D, vocabulary V,
    noise-level width C over F waves, prompt states of width d:

    - `input`: 2 n 3D W: from z, the single-token posterior mean and x_hat;
    - `layers`: 2 n L (6 + 2r) W^2, for attention 4, for cross-attention 2, and the feed-forward layer;
    - `attention`: 4 n (n + p) L W: scores and their mean of values, within the row and to the prompt;
    - `head`: 2 n W V, and `vocabulary` 2 n D V: one product with the head's table and one with the embeddings;
    - `noise`: 2 (2F C + C^2 + C (3L + 1) W) a row, for the scales of the norms;
    - `adapter`: 2 p d W, and `prompt`: 2 p W 2 L W for the keys and values.

    Norms, the short convolutions, softmax and other element-wise work are no matrix products and left out.

    Args:
      model: the denoiser, with a frozen prompt encoder.
      tokens: [R] tokens of each row.
      prompt: [R] tokens of its prompt.

    Returns:
      Operations by name of the part.
    """
    n, p = tokens.astype(np.float64), prompt.astype(np.float64)
    layers, width, dim = model.num_layers, model.width, model.embedding_dim
    noise_dim, waves = model.conditioning_dim, 2 * NoiseLevelFeatures.num_frequencies
    noise = waves * noise_dim + noise_dim**2 + noise_dim * (3 * layers + 1) * width
    return {
        "input": 2 * n.sum() * 3 * dim * width,
        "layers": 2 * n.sum() * layers * (6 + 2 * model.mlp_ratio) * width**2,
        "attention": 4 * (n * (n + p)).sum() * layers * width,
        "head": 2 * n.sum() * width * model.vocab_size,
        "vocabulary": 2 * n.sum() * dim * model.vocab_size,
        "noise": 2.0 * len(n) * noise,
        "adapter": 2 * p.sum() * model.prompt_dim * width,
        "prompt": 4 * p.sum() * layers * width**2,
    }


def useful_flops(model: TextDenoiser, batch: PackedBatch, diffusion: ConfigDict) -> float:
    """Operations that one optimiser step on `batch` needs, in matrix products.

    Counted are real tokens: no padding, neither as tokens nor as keys, and no product that is made a second time
    for the backward pass. A trained product counts three times (its value, and the gradients of both operands),
    where an operand is no function of parameters twice. The packs with a self-conditioning pass count it once,
    forward. Each pass needs the single-token posterior where the token is not given (where it is, nothing is
    predicted either): the mean embedding under logits from z. Those logits are a part of the last ones too, and
    count once, though they are made twice, which is faster than to keep them.

    Args:
      model: the denoiser.
      batch: of one step, in numpy.
      diffusion: that group of the configuration. Dropped prompts count as the null prompt's one token, in
        expectation.

    Returns:
      Operations (2 for a multiplication and an addition).
    """
    tokens = _of_rows(batch, batch.padding_mask)
    predicted = _of_rows(batch, batch.padding_mask & ~batch.known_mask)
    is_row = tokens > 0
    share = 1.0 - diffusion.conditioning_dropout
    prompt = batch.prompt.mask.reshape(*tokens.shape, -1).sum(-1)
    given = (share * prompt)[is_row]
    prompt = (share * np.maximum(1, prompt) + (1.0 - share))[is_row]
    every = diffusion.self_conditioning_every
    chosen = np.arange(len(tokens)) % every == 0 if every else np.zeros(len(tokens), bool)
    first = (chosen[:, None] & is_row)[is_row]
    tokens, predicted = tokens[is_row], predicted[is_row]

    trained = forward_flops(model, tokens, prompt)
    del trained["adapter"], trained["head"], trained["vocabulary"]
    total = 3 * sum(trained.values())
    # Of the three inputs only z is a function of parameters, the embeddings.
    total -= trained["input"] * 2 / 3
    total += 2 * forward_flops(model, tokens, given)["adapter"]
    # The vocabulary: three times for the loss, and once for the posterior's mean.
    loss = forward_flops(model, predicted, np.zeros_like(predicted))
    total += 3 * loss["head"] + 4 * loss["vocabulary"]

    estimate: Mapping[str, float] = forward_flops(model, tokens[first], prompt[first])
    total += sum(estimate[name] for name in ("input", "layers", "attention", "head", "noise"))
    # Its own logits and mean at every token, and the posterior's mean again.
    posterior = forward_flops(model, predicted[first], np.zeros_like(predicted[first]))
    total += 2 * estimate["vocabulary"] + posterior["vocabulary"]
    return float(total)


def _of_rows(batch: PackedBatch, mask: np.ndarray) -> np.ndarray:
    """How many True positions each row has, [packs, b]; the mask is [A, P, n]."""
    ends = np.cumsum(batch.lengths, axis=-1)[..., None]
    positions = np.arange(mask.shape[-1])
    of_row = (positions < ends) & (positions >= ends - batch.lengths[..., None])
    return (of_row & mask[..., None, :]).sum(-1).reshape(-1, batch.lengths.shape[-1])
