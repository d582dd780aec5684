"""Rows side by side, padded to one length: what is evaluated, the same rows every time."""

import math
from collections.abc import Sequence

import flax.struct
import jax
import numpy as np
from ml_collections import ConfigDict

from sunfish_jax.data.buckets import choose_buckets, rows_per_pass
from sunfish_jax.data.tokens import TokenizedSplit
from sunfish_jax.models.prompt import Prompt, Prompts

# Row lengths of held-out rows, at most.
_HELD_OUT_BUCKETS = 3


@flax.struct.dataclass
class PaddedBatch:
    """A forward passes of B rows of S tokens. A row is one text or a part of one.

    Attributes:
      tokens: `[A, B, S]` int32; the padding token behind the end of a row.
      padding_mask: `[A, B, S]` bool, True at real tokens, end-of-text included.
      known_mask: `[A, B, S]` bool, True where the clean token is given (as in infilling); never at padding.
      prompt: leading axes `[A, B]`.
    """

    tokens: np.ndarray | jax.Array
    padding_mask: np.ndarray | jax.Array
    known_mask: np.ndarray | jax.Array
    prompt: Prompt


def pad_rows(split: TokenizedSplit, rows: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Gathers rows side by side.

    Args:
      split: the corpus.
      rows: `[n]`, the numbers of the rows; -1 for an empty one.
      length: S, at least the longest of them.

    Returns:
      Tokens `[n, S]` int32 and the padding mask `[n, S]` bool, True at tokens of the row.
    """
    lengths = np.where(rows < 0, 0, split.lengths[rows])
    padding_mask = np.arange(length) < lengths[:, None]
    positions = np.where(padding_mask, split.row_starts[rows][:, None] + np.arange(length), 0)
    return np.where(padding_mask, split.tokens[positions], split.pad_id).astype(np.int32), padding_mask


def held_out_row_numbers(split: TokenizedSplit, num_rows: int, config: ConfigDict) -> list[tuple[int, np.ndarray]]:
    """The same rows every time, drawn evenly from the split and grouped by length.

    The lengths are few: what is compiled for each stays in memory, and few lengths leave few batches half empty.

    Args:
      split: `validation` or `test`.
      num_rows: how many rows (all of them where there are fewer).
      config: the whole configuration.

    Returns:
      For each batch its length S and the numbers of its rows `[B]`, about as many positions as a forward pass has
      in training; -1 fills up the last batch of a bucket, so that there is one shape for each length. None from an
      empty split.
    """
    chosen = np.sort(np.random.default_rng(0).permutation(split.num_rows)[:num_rows])
    if not len(chosen):
        return []
    lengths = choose_buckets(split.lengths[chosen], _HELD_OUT_BUCKETS, config.model.block_size)
    bucket_of_row = np.searchsorted(lengths, split.lengths[chosen])
    batches = []
    for bucket, length in enumerate(lengths):
        rows = chosen[bucket_of_row == bucket]
        size = rows_per_pass(length, config)
        padded = np.full(math.ceil(len(rows) / size) * size, -1)
        padded[: len(rows)] = rows
        batches += [(length, part) for part in padded.reshape(-1, size)]
    return batches


def held_out_rows(
    split: TokenizedSplit, numbers: Sequence[tuple[int, np.ndarray]], prompts: Prompts
) -> list[PaddedBatch]:
    """Fixed batches for evaluation.

    Args:
      split: `validation` or `test`.
      numbers: which of its rows, as `held_out_row_numbers` gives them.
      prompts: makes prompts from their numbers in `split`; each row keeps one of its text's phrasings.

    Returns:
      Batches with A = 1 and nothing known. An empty row has no real token and no prompt.
    """
    batches = []
    for length, rows in numbers:
        tokens, padding_mask = pad_rows(split, rows, length)
        first, count = split.row_prompts[rows].T
        prompt = np.where((rows >= 0) & (count > 0), first + rows % np.maximum(count, 1), -1)
        batches.append(
            PaddedBatch(tokens[None], padding_mask[None], np.zeros_like(padding_mask)[None], prompts(prompt[None]))
        )
    return batches
