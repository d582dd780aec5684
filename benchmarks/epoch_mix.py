"""Batches that stand for a whole epoch: one of each shape, with how many steps it stands for."""

import dataclasses

import numpy as np
from ml_collections import ConfigDict

from sunfish_jax.data.batches import BatchSource, PackedBatch
from sunfish_jax.models.prompt import Prompt
from sunfish_jax.training.preparation import Prepared

# Steps looked at: they come in random order, so these have an epoch's mix however large the corpus is.
_MOST_STEPS = 500


@dataclasses.dataclass(frozen=True)
class Typical:
    """A step's batch, and the share of an epoch's steps that are like it."""

    batch: PackedBatch
    share: float

    @property
    def length(self) -> int:
        """S, the longest that its rows may be."""
        return self.batch.longest


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
    return [
        Typical(source[sorted(steps[length])[len(steps[length]) // 2][1]], len(steps[length]) / number)
        for length in sorted(steps)
    ]
