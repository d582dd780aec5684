"""The likelihood bound of held-out text, in bits per byte."""

import dataclasses
import functools
import math
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sunfish_jax.diffusion.likelihood import likelihood_bound
from sunfish_jax.diffusion.schedules import Schedule
from sunfish_jax.evaluation.ratio import ratio_of_sums
from sunfish_jax.evaluation.text_rows import TextRows

_NOISE_SEED = 0xB0
_TERMS = ("prior", "recon", "diff", "padding")


@dataclasses.dataclass(frozen=True)
class BitsPerByte:
    """The negative log-likelihood of some rows of text, or an upper bound of it.

    Attributes:
        value: Bits a byte of text.
        standard_error: Of `value`: over the rows, so both of the choice of rows and of what noise was drawn.
        terms: What `value` is the sum of, by name; empty where it is exact.
        num_rows, num_bytes: What it was measured on.
    """

    value: float
    standard_error: float
    terms: dict[str, float]
    num_rows: int
    num_bytes: int

    def __str__(self) -> str:
        parts = ", ".join(f"{term} {value:.3f}" for term, value in self.terms.items()) or "exact"
        return (
            f"{self.value:.3f} ± {self.standard_error:.3f} bits per byte "
            f"({parts}; {self.num_rows} rows, {self.num_bytes} bytes)"
        )


def bits_per_byte(
    model: nn.Module,
    params: Mapping,
    schedule: Schedule,
    text: TextRows,
    *,
    num_draws: int,
) -> BitsPerByte:
    """The bound of `likelihood_bound` over all rows: total bits over total bytes.

    End of text counts, dropout and guidance are off, and self-conditioning is recomputed from the same z.

    Args:
        model: The denoiser.
        params: Its parameters; the moving average, usually.
        schedule: The run's schedule.
        text: The rows, of which those without a real token are left out.
        num_draws: Stratified draws of the noise level a row; 64 or more for a figure to report.

    Returns:
        The figure, its standard error and its terms.
    """
    totals = []
    for i, (batch, num_bytes) in enumerate(zip(text.rows, text.row_bytes, strict=True)):
        batch = jax.tree.map(lambda leaf: leaf[0], batch)
        key = jax.random.fold_in(jax.random.key(_NOISE_SEED), i)
        bound = _bound(model, params, schedule, batch.tokens, batch.padding_mask, batch.prompt, key, num_draws)
        columns = [*(np.asarray(getattr(bound, name), np.float64) for name in _TERMS), num_bytes]
        totals.append(np.stack(columns, axis=-1)[np.asarray(batch.padding_mask).any(axis=-1)])
    totals = np.concatenate(totals)
    bits, lengths = totals[:, :-1] / math.log(2), totals[:, -1]
    terms = bits.sum(axis=0) / lengths.sum()
    value, error = ratio_of_sums(bits.sum(axis=-1), lengths)
    by_name = dict(zip(_TERMS, terms.tolist(), strict=True))
    return BitsPerByte(value, error, by_name, num_rows=len(totals), num_bytes=int(lengths.sum()))


@functools.partial(jax.jit, static_argnums=(0, 7))
def _bound(model, params, schedule, tokens, padding_mask, prompt, key, num_draws):
    variables = {"params": params}
    prompt_kv = model.apply(variables, prompt, method="encode_prompt")
    known = jnp.zeros(tokens.shape, bool)
    vocabulary = model.apply(variables, method="vocabulary")

    def denoise(z, gamma, x_hat):
        return model.apply(variables, vocabulary, z, gamma, x_hat, known, prompt_kv, method="logits")

    embeddings = vocabulary.embeddings
    return likelihood_bound(denoise, embeddings, schedule, tokens, padding_mask, key=key, num_draws=num_draws)
