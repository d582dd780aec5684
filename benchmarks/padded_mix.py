"""What the networks compared with are trained on: the same rows, each padded to one of a few lengths."""

import numpy as np
from epoch_mix import Typical
from ml_collections import ConfigDict

from sunfish_jax.cache import data_folder
from sunfish_jax.data.buckets import choose_buckets, rows_per_pass
from sunfish_jax.data.padded_rows import PaddedBatch, pad_rows
from sunfish_jax.data.spans import known_spans
from sunfish_jax.data.tokens import TokenizedSplit
from sunfish_jax.models.prompt import Prompts
from sunfish_jax.models.prompt_table import PromptTable
from sunfish_jax.training.preparation import Prepared


def padded_batches(config: ConfigDict, prepared: Prepared, num_lengths: int) -> list[Typical]:
    """One batch for each of the row lengths that leave the least padding, with as many tokens as most of them have.

    Args:
      config: the whole configuration.
      prepared: the rows and the prompt encoder.
      num_lengths: how many lengths at most.
    """
    split, rng = prepared.splits["train"], np.random.default_rng(config.train.seed)
    lengths = choose_buckets(split.lengths, num_lengths, config.model.block_size)
    bucket_of_row = np.searchsorted(lengths, split.lengths)
    prompts = PromptTable(prepared.prompt_encoder, split.num_prompts, split.prompt_texts, data_folder())
    batches, num_steps = [], []
    for bucket, length in enumerate(lengths):
        rows = np.flatnonzero(bucket_of_row == bucket)
        shape = (config.train.accumulate_steps, rows_per_pass(length, config))
        per_step = shape[0] * shape[1]
        # Evenly spread over the rows by length, so that the batch has the padding of all of them.
        rows = rows[np.argsort(split.lengths[rows], kind="stable")]
        chosen = rng.permutation(rows[np.linspace(0, len(rows) - 1, per_step).round().astype(int)])
        batches.append(_batch(config, split, chosen, (*shape, length), prompts, rng))
        num_steps.append(len(rows) / per_step)
    total = sum(num_steps)
    each = zip(batches, lengths, num_steps, strict=True)
    return [Typical(batch, length, steps / total) for batch, length, steps in each]


def _batch(
    config: ConfigDict,
    split: TokenizedSplit,
    rows: np.ndarray,
    shape: tuple[int, int, int],
    prompts: Prompts,
    rng: np.random.Generator,
) -> PaddedBatch:
    tokens, padding_mask = pad_rows(split, rows, shape[-1])
    known_mask = known_spans(rng, padding_mask, config.diffusion.infill_fraction)
    first, count = split.row_prompts[rows].T
    numbers = np.where(count, first + rng.integers(0, np.maximum(count, 1)), -1)
    masks = (array.reshape(shape) for array in (tokens, padding_mask, known_mask))
    return PaddedBatch(*masks, prompts(numbers.reshape(shape[:2])))
