"""How likely the twin holds a text to be: exactly, by the chain rule, where a denoiser has a bound."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from ar_model import CausalTransformer
from ml_collections import ConfigDict

from sunfish_jax.data.batches import Batch, held_out_row_numbers, held_out_rows
from sunfish_jax.evaluation.bound import BitsPerByte
from sunfish_jax.models.prompt_table import PromptTable
from sunfish_jax.training.preparation import Prepared


@dataclasses.dataclass(frozen=True)
class HeldOutText:
    """Rows to score.

    Attributes:
      rows: batches with A = 1; an empty row has no real token.
      row_bytes: [B] for each of them, the UTF-8 bytes each row stands for.
    """

    rows: Sequence[Batch]
    row_bytes: Sequence[np.ndarray]


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
        bits, n = self.nats / math.log(2), len(self.nats)
        value = bits.sum() / self.num_bytes.sum()
        deviation = bits - value * self.num_bytes
        error = math.sqrt(np.sum(deviation**2) * n / (n - 1)) / self.num_bytes.sum() if n > 1 else math.nan
        return BitsPerByte(float(value), error, {"exact": float(value)}, n, int(self.num_bytes.sum()))


def held_out_text(prepared: Prepared, config: ConfigDict, split: str, num_rows: int) -> HeldOutText:
    """The rows that the denoiser's evaluation takes as well."""
    texts = prepared.splits[split]
    prompts = PromptTable(prepared.prompt_encoder, texts.num_prompts, texts.prompt_texts)
    numbers = held_out_row_numbers(texts, num_rows, config)
    return HeldOutText(
        rows=held_out_rows(texts, num_rows, config, prompts),
        row_bytes=[np.where(rows < 0, 0, texts.row_bytes[rows]) for _, rows in numbers],
    )


def score(model: CausalTransformer, params: Mapping, text: HeldOutText, *, prompted: bool) -> Score:
    """The likelihood of rows.

    Args:
      model, params: the twin.
      text: what to score.
      prompted: with each row's prompt, or with none.
    """
    columns = []
    for batch, num_bytes in zip(text.rows, text.row_bytes, strict=True):
        batch = jax.tree.map(lambda leaf: leaf[0], batch)
        prompt = batch.prompt if prompted else batch.prompt.replace(mask=np.zeros_like(batch.prompt.mask))
        nats = np.asarray(_cross_entropy(model, params, batch.tokens, prompt), np.float64)
        nats = (nats * batch.padding_mask).sum(axis=-1)
        row = np.stack([nats, batch.padding_mask.sum(axis=-1), num_bytes], axis=-1)
        columns.append(row[batch.padding_mask.any(axis=-1)])
    return Score(*np.concatenate(columns).T)


@functools.partial(jax.jit, static_argnums=0)
def _cross_entropy(model, params, tokens, prompt):
    variables = {"params": params}
    prompt_kv = model.apply(variables, prompt, method="encode_prompt")
    return model.apply(variables, tokens, prompt_kv, method="cross_entropy")
