"""Batches as a pure function of (seed, step), in length buckets so that little of them is padding.

Batch `step` depends on nothing but the corpus, the configuration and `step`: a resumed run reads what an
uninterrupted one would have read, without any iterator state.
"""

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Iterator, Sequence

import flax.struct
import grain
import jax
import numpy as np
from ml_collections import ConfigDict

from sunfish_jax.data.buckets import choose_buckets, rows_per_pass
from sunfish_jax.data.spans import known_spans
from sunfish_jax.data.tokens import TokenizedSplit
from sunfish_jax.errors import UserError
from sunfish_jax.models.prompt import Prompt

# Batches made ahead of the step that asks for them.
_PREFETCH = 4
# Steps whose prompts are encoded together: a call of the encoder takes prompts of one width, and among more prompts
# fewer of its rows stay empty.
_STEPS_ENCODED_TOGETHER = 4
# Row lengths of held-out rows, at most.
_HELD_OUT_BUCKETS = 3


@flax.struct.dataclass
class Batch:
    """One optimiser step's rows: A forward passes of B rows of S tokens. A row is one text or a part of one.

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


# Numbers of prompts, -1 for none, to what the model reads; the axes stay.
Prompts = Callable[[np.ndarray], Prompt]


@dataclasses.dataclass(frozen=True)
class _Epoch:
    """One pass over the corpus: which rows each step takes.

    Attributes:
      steps: `[steps, 2]`, the bucket of each step and its first row within the bucket's `rows`.
      rows: for each bucket, its rows in this epoch's order.
      phrasing: `[R]` in [0, 1), which of its prompts each row is asked for with.
    """

    steps: np.ndarray
    rows: list[np.ndarray]
    phrasing: np.ndarray


class BatchSource:
    """The training batches, indexable by step without end (a `grain` random-access source).

    An epoch shuffles the rows of each bucket and the order of the steps over all buckets. Rows that do not
    fill a last step move up to the next longer bucket; what does not fill one even in the longest (fewer rows
    than one step takes) sits out the epoch.
    """

    def __init__(self, split: TokenizedSplit, buckets: tuple[int, ...], config: ConfigDict, prompts: Prompts):
        """Plans the steps of an epoch.

        Args:
          split: the rows.
          buckets: row lengths in increasing order; the last holds the longest row of `split`.
          config: the whole configuration: `train`, `model.block_size`, `diffusion.infill_fraction` are read.
          prompts: makes prompts from their numbers in `split`.

        Raises:
          UserError: too few rows for one step.
        """
        self._split = split
        self._buckets = buckets
        self._prompts = prompts
        self._seed = config.train.seed
        self._infill_fraction = config.diffusion.infill_fraction
        self._accumulate = config.train.accumulate_steps
        self._rows_per_pass = [rows_per_pass(length, config) for length in buckets]
        self._rows_per_step = [self._accumulate * rows for rows in self._rows_per_pass]
        self._bucket_of_row = np.searchsorted(buckets, split.lengths)
        self._epoch = functools.lru_cache(maxsize=2)(self._plan_epoch)
        self._prompts_of_group = functools.lru_cache(maxsize=1)(self._make_prompts)
        self.steps_per_epoch = len(self._epoch(0).steps)
        if not self.steps_per_epoch:
            raise UserError(
                f"the corpus is too small: {split.num_rows} rows of training text, but one optimiser step "
                f"takes {self._rows_per_step[-1]} of {buckets[-1]} tokens; lower train.batch_size="
                f"{config.train.batch_size} or train.accumulate_steps={self._accumulate}, or give more text"
            )

    def __len__(self) -> int:
        """Training decides when to stop; epochs go on."""
        return sys.maxsize

    def __getitem__(self, step: int) -> Batch:
        """The batch of optimiser step `step`, counted from 0; its prompts share memory with the next steps'."""
        bucket, rows = self._rows(step)
        tokens, padding_mask = pad_rows(self._split, rows, self._buckets[bucket])
        known_mask = known_spans(
            np.random.default_rng((self._seed, int(step), 1)), padding_mask, self._infill_fraction
        )
        group, position = divmod(int(step), _STEPS_ENCODED_TOGETHER)
        shape = (self._accumulate, self._rows_per_pass[bucket])
        return Batch(
            tokens=tokens.reshape(*shape, -1),
            padding_mask=padding_mask.reshape(*shape, -1),
            known_mask=known_mask.reshape(*shape, -1),
            prompt=jax.tree.map(
                lambda leaf: leaf.reshape(*shape, *leaf.shape[1:]), self._prompts_of_group(group)[position]
            ),
        )

    def _rows(self, step: int) -> tuple[int, np.ndarray]:
        """A step's bucket, and the numbers of its rows."""
        number, position = divmod(int(step), self.steps_per_epoch)
        epoch = self._epoch(number)
        bucket, start = epoch.steps[position]
        return bucket, epoch.rows[bucket][start : start + self._rows_per_step[bucket]]

    def _prompt_numbers(self, step: int) -> np.ndarray:
        """Of each of a step's rows the number of a prompt, -1 for none."""
        _, rows = self._rows(step)
        first, count = self._split.row_prompts[rows].T
        phrasing = self._epoch(int(step) // self.steps_per_epoch).phrasing[rows]
        return np.where(count, first + (phrasing * count).astype(np.int64), -1)

    def _make_prompts(self, group: int) -> list[Prompt]:
        """For each of the group's steps a prompt for each row."""
        first = group * _STEPS_ENCODED_TOGETHER
        numbers = [self._prompt_numbers(step) for step in range(first, first + _STEPS_ENCODED_TOGETHER)]
        prompts = self._prompts(np.concatenate(numbers))
        starts = np.cumsum([len(of_step) for of_step in numbers])[:-1]
        parts = zip(np.split(prompts.inputs, starts), np.split(prompts.mask, starts), strict=True)
        return [Prompt(inputs, mask) for inputs, mask in parts]

    def _plan_epoch(self, epoch: int) -> _Epoch:
        rng = np.random.default_rng((self._seed, epoch, 0))
        phrasing = rng.random(self._split.num_rows)
        rows, steps = [], []
        left_over = np.zeros(0, np.int64)
        for bucket, per_step in enumerate(self._rows_per_step):
            here = rng.permutation(np.concatenate([np.flatnonzero(self._bucket_of_row == bucket), left_over]))
            whole = len(here) // per_step * per_step
            steps += [(bucket, start) for start in range(0, whole, per_step)]
            rows.append(here[:whole])
            left_over = here[whole:]
        return _Epoch(rng.permutation(np.array(steps, np.int64).reshape(-1, 2)), rows, phrasing)


def batch_iterator(source: BatchSource, start_step: int, end_step: int | None = None) -> Iterator[Batch]:
    """The batches from `start_step` to before `end_step`, made ahead in a thread that begins at once."""
    steps = grain.MapDataset.source(source)[start_step:end_step]
    batches = iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=_PREFETCH)))
    batches.start_prefetch()
    return batches


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
      For each batch its length S and the numbers of its rows `[B]`. B is as for training rows of that length; -1
      fills up the last batch of a bucket, so that there is one shape for each length. None from an empty split.
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
) -> list[Batch]:
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
            Batch(tokens[None], padding_mask[None], np.zeros_like(padding_mask)[None], prompts(prompt[None]))
        )
    return batches
