"""Rows of text to be scored, with the bytes each stands for, and the same rows made worse on purpose."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from ml_collections import ConfigDict

from sunfish_jax.data.padded_rows import PaddedBatch, held_out_row_numbers, held_out_rows
from sunfish_jax.data.tokens import TokenizedSplit
from sunfish_jax.models.prompt_encoder import PromptEncoder
from sunfish_jax.models.prompt_table import PromptTable

# Of `likelihood_texts`, what a model is to be compared with: text without order, and text it has seen.
REFERENCES = ("shuffled", "training text")


@dataclasses.dataclass(frozen=True)
class TextRows:
    """Rows, always the same ones of a split.

    Attributes:
        rows: Batches with A = 1; an empty row has no real token.
        row_bytes: [B] for each of them, the UTF-8 bytes each row stands for.
    """

    rows: Sequence[PaddedBatch]
    row_bytes: Sequence[np.ndarray]

    @classmethod
    def of(cls, split: TokenizedSplit, num_rows: int, config: ConfigDict, encoder: PromptEncoder) -> "TextRows":
        """Some rows of a split, drawn evenly, or all of them where there are no more; each with its prompt."""
        prompts = PromptTable(encoder, split.num_prompts, split.prompt_texts)
        numbers = held_out_row_numbers(split, num_rows, config)
        return cls(
            rows=held_out_rows(split, numbers, prompts),
            row_bytes=[np.where(rows < 0, 0, split.row_bytes[rows]) for _, rows in numbers],
        )

    def without_prompts(self) -> "TextRows":
        """The same rows, to be read without their prompts."""
        prompts = (batch.prompt.replace(mask=np.zeros_like(batch.prompt.mask)) for batch in self.rows)
        rows = [batch.replace(prompt=prompt) for batch, prompt in zip(self.rows, prompts, strict=True)]
        return dataclasses.replace(self, rows=rows)

    def shuffled(self) -> "TextRows":
        """The same rows, each one's tokens in random order but for the last."""
        rows = []
        for number, batch in enumerate(self.rows):
            order = shuffled_order(batch.padding_mask[0], seed=number)
            rows.append(batch.replace(tokens=np.take_along_axis(np.asarray(batch.tokens), order[None], axis=-1)))
        return dataclasses.replace(self, rows=rows)

    def bits_per_byte_by_frequency(self, log_unigram: np.ndarray) -> float:
        """What predicting each token by its frequency alone would cost; log_unigram is [V]."""
        nats = sum(-(log_unigram[batch.tokens] * batch.padding_mask).sum(dtype=np.float64) for batch in self.rows)
        return float(nats / math.log(2) / sum(of_rows.sum() for of_rows in self.row_bytes))


def likelihood_texts(
    splits: Mapping[str, TokenizedSplit], split: str, config: ConfigDict, encoder: PromptEncoder
) -> dict[str, TextRows]:
    """What the likelihood is measured on, by name: the split's rows with and without prompts, and `REFERENCES`."""
    num_rows = config.eval.bound_rows
    text = TextRows.of(splits[split], num_rows, config, encoder)
    return {
        "with prompt": text,
        "without prompt": text.without_prompts(),
        "shuffled": text.shuffled(),
        "training text": TextRows.of(splits["train"], num_rows, config, encoder),
    }


def shuffled_order(mask: np.ndarray, seed: int) -> np.ndarray:
    """Each row's positions in random order, [B, S], where `mask` is True; the others stay in place.

    So does the last of them, which is the end of text where the text ends in the row.
    """
    order = np.tile(np.arange(mask.shape[1]), (len(mask), 1))
    rng = np.random.default_rng(seed)
    for row, real in zip(order, np.asarray(mask), strict=True):
        places = np.flatnonzero(real)[:-1]
        row[places] = rng.permutation(places)
    return order
