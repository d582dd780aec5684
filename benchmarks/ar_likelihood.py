"""How likely the twin holds a text to be: exactly, by the chain rule, where a denoiser has a bound."""

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
import numpy as np
from ar_model import CausalTransformer

from sunfish_jax.evaluation.bound import BitsPerByte
from sunfish_jax.evaluation.ratio import ratio_of_sums
from sunfish_jax.evaluation.text_rows import TextRows


@dataclasses.dataclass(frozen=True)
class Score:
    """-log p of R rows.

    Attributes:
      nats: [R] float64, end of text included.
      num_tokens: [R], end of text included.
      num_bytes: [R].
    """

    nats: np.ndarray
    num_tokens: np.ndarray
    num_bytes: np.ndarray

    @property
    def nats_per_token(self) -> float:
        """Cross-entropy."""
        return float(self.nats.sum() / self.num_tokens.sum())

    def bits_per_byte(self) -> BitsPerByte:
        """Total bits over total bytes, and the standard error of that ratio over independent rows."""
        value, error = ratio_of_sums(self.nats / math.log(2), self.num_bytes)
        return BitsPerByte(value, error, {}, len(self.nats), int(self.num_bytes.sum()))


def score(model: CausalTransformer, params: Mapping, text: TextRows) -> Score:
    """The likelihood of rows.

    Args:
      model, params: the twin.
      text: what to score; an empty row is left out.
    """
    columns = []
    for batch, num_bytes in zip(text.rows, text.row_bytes, strict=True):
        batch = jax.tree.map(lambda leaf: leaf[0], batch)
        nats = np.asarray(_cross_entropy(model, params, batch.tokens, batch.prompt), np.float64)
        nats = (nats * batch.padding_mask).sum(axis=-1)
        row = np.stack([nats, batch.padding_mask.sum(axis=-1), num_bytes], axis=-1)
        columns.append(row[batch.padding_mask.any(axis=-1)])
    return Score(*np.concatenate(columns).T)


@functools.partial(jax.jit, static_argnums=0)
def _cross_entropy(model, params, tokens, prompt):
    variables = {"params": params}
    prompt_kv = model.apply(variables, prompt, method="encode_prompt")
    return model.apply(variables, tokens, prompt_kv, method="cross_entropy")
