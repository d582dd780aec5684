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
from sunfish_jax.evaluation.text_rows import TextRows

_NOISE_SEED = 0xB0
_TERMS = ("prior", "recon", "diff", "padding")


@dataclasses.dataclass(frozen=True)
class BitsPerByte:
    """An upper bound on the negative log-likelihood.

    Attributes:
        value: Bits a byte of text.
        standard_error: Of `value`: over the rows, so both of the choice of rows and of the noise drawn.
        terms: What of `value` is prior, recon, diff and padding.
        num_rows, num_bytes: What it was measured on.
    """

    value: float
    standard_error: float
    terms: dict[str, float]
    num_rows: int
    num_bytes: int


def bits_per_byte(
    model: nn.Module,
    params: Mapping,
    schedule: Schedule,
    text: TextRows,
    *,
    num_draws: int,
) -> BitsPerByte:
    """The bound of `likelihood_bound` over all rows: total bits over total bytes.

    End of text counts, dropout and guidance are off, and self-conditioning is recomputed from the same z. The
    standard error is that of a ratio of sums over independent rows (Cochran 1977, section 6.3).

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
    value, n = terms.sum(), len(totals)
    deviation = bits.sum(axis=-1) - value * lengths
    error = math.sqrt(np.sum(deviation**2) * n / (n - 1)) / lengths.sum() if n > 1 else math.nan
    return BitsPerByte(float(value), error, dict(zip(_TERMS, terms.tolist(), strict=True)), n, int(lengths.sum()))


def likelihood_line(name: str, figure: BitsPerByte, detail: str) -> str:
    """What is printed of a figure."""
    return (
        f"{name}: {figure.value:.3f} ± {figure.standard_error:.3f} bits per byte "
        f"({detail}; {figure.num_rows} rows, {figure.num_bytes} bytes)"
    )


def frequency_figure(texts: Mapping[str, TextRows], params: Mapping) -> dict[str, float]:
    """Prints and returns what a model of the tokens' frequencies alone would reach on `likelihood_texts`."""
    value = texts["with prompt"].bits_per_byte_by_frequency(np.asarray(params["log_unigram"]))
    print(f"by the tokens' frequencies alone: {value:.3f} bits per byte", flush=True)
    return {"value": value}


@functools.partial(jax.jit, static_argnums=(0, 7))
def _bound(model, params, schedule, tokens, padding_mask, prompt, key, num_draws):
    variables = {"params": params}
    prompt_kv = model.apply(variables, prompt, method="encode_prompt")
    known = jnp.zeros(tokens.shape, bool)

    def denoise(z, gamma, x_hat):
        return model.apply(variables, z, gamma, x_hat, known, prompt_kv, method="logits")

    table = model.apply(variables, method="embedding_table")
    return likelihood_bound(denoise, table, schedule, tokens, padding_mask, key=key, num_draws=num_draws)
