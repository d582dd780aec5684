"""Batches that stand for a whole epoch: one of each shape, with how many steps it stands for."""

import dataclasses

import numpy as np
from ml_collections import ConfigDict

from sunfish_jax.data.batches import BatchSource, PackedBatch
from sunfish_jax.data.padded_rows import PaddedBatch
from sunfish_jax.models.prompt import Prompt
from sunfish_jax.training.preparation import Prepared

# Steps looked at: they come in random order, so these have an epoch's mix however large the corpus is.
_MOST_STEPS = 500


@dataclasses.dataclass(frozen=True)
class Typical:
    """A step's batch, and what it stands for.

    Attributes:
      batch: of packed or of padded rows.
      length: S, which no row is longer than; what padded rows are padded to.
      share: of an epoch's steps, those that are like it.
    """

    batch: PackedBatch | PaddedBatch
    length: int
    share: float


def typical_batches(config: ConfigDict, prepared: Prepared) -> list[Typical]:
    """For each bucket of rows, of the steps that training begins with, the one with the median of real tokens."""

    def no_prompts(numbers: np.ndarray) -> Prompt:
        return Prompt(inputs=np.zeros((*numbers.shape, 0, 0)), mask=np.zeros((*numbers.shape, 0), bool))

    # Encoding prompts takes a while, and only a few of these batches are wanted.
    lengths_only = BatchSource(prepared.splits["train"], prepared.buckets, config, no_prompts)
    steps: dict[int, list[tuple[int, int]]] = {}
    for step in range(min(lengths_only.steps_per_epoch, _MOST_STEPS)):
        batch = lengths_only[step]
        steps.setdefault(batch.longest, []).append((int(batch.padding_mask.sum()), step))
    number = sum(map(len, steps.values()))
    source = prepared.training_batches(config)

    def typical(length: int) -> Typical:
        _, step = sorted(steps[length])[len(steps[length]) // 2]
        return Typical(source[step], length, len(steps[length]) / number)

    return [typical(length) for length in sorted(steps)]
