"""Batches as a pure function of (seed, step), of packed rows so that little of them is padding.

Batch `step` depends on nothing but the corpus, the configuration and `step`: a resumed run reads what an
uninterrupted one would have read, without any iterator state.
"""

import dataclasses
import functools
import sys
from collections.abc import Iterator

import flax.struct
import grain
import jax
import numpy as np
from ml_collections import ConfigDict

from sunfish_jax.data.packs import Packs, balanced_packs, pack_size, packs_per_pass, rows_per_pack
from sunfish_jax.data.spans import known_spans
from sunfish_jax.data.tokens import TokenizedSplit
from sunfish_jax.errors import UserError
from sunfish_jax.models.prompt import Prompt, Prompts

# Batches made ahead of the step that asks for them.
_PREFETCH = 4
# Steps whose prompts are encoded together: among more prompts less of the encoder's last calls stays empty.
_STEPS_ENCODED_TOGETHER = 4
# The share of rows that are padded, by up to what a row of their kind may have: they teach where texts end.
_PADDED_SHARE = 0.125


@flax.struct.dataclass
class PackedBatch:
    """One optimiser step's rows: A forward passes of P packs. A row is one text or a part of one.

    A pack is b rows one after the other in n positions, with positions of no row behind the last one.

    Attributes:
      tokens: `[A, P, n]` int32; the padding token behind the end of a text.
      padding_mask: `[A, P, n]` bool, True at real tokens, end-of-text included.
      known_mask: `[A, P, n]` bool, True where the clean token is given (as in infilling); never at padding.
      lengths: `[A, P, b]` int32, the positions of each row, its padding included; 0 for no row.
      prompt: leading axes `[A, P, b]`.
      longest: S, which no row is longer than: the same for all steps that are compiled together.
    """

    tokens: np.ndarray | jax.Array
    padding_mask: np.ndarray | jax.Array
    known_mask: np.ndarray | jax.Array
    lengths: np.ndarray | jax.Array
    prompt: Prompt
    longest: int = flax.struct.field(pytree_node=False)


@dataclasses.dataclass(frozen=True)
class _Epoch:
    """One pass over the corpus: which packs each step takes.

    Attributes:
      steps: `[steps, 2]`, the bucket of each step and its first pack within the bucket's `packs`.
      packs: for each bucket, its packs in this epoch's order, of any size.
      phrasing: `[R]` in [0, 1), which of its prompts each row is asked for with.
    """

    steps: np.ndarray
    packs: list[Packs]
    phrasing: np.ndarray


class BatchSource:
    """The training batches, indexable by step without end (a `grain` random-access source).

    Rows are packed with others of about their length, a bucket. An epoch shuffles them within each bucket, and the
    order of the steps over all buckets. Rows that do not fill a last step move up to the next longer bucket; what
    does not fill one even in the longest (fewer rows than one step takes) sits out the epoch, and so does a row
    for which its pack has no room, as may happen after the first epoch.
    """

    def __init__(self, split: TokenizedSplit, buckets: tuple[int, ...], config: ConfigDict, prompts: Prompts):
        """Plans the steps of an epoch.

        Args:
          split: the rows.
          buckets: the longest rows packed together, in increasing order; the last holds the longest row of `split`.
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
        self._packs_per_pass = packs_per_pass(config)
        self._packs_per_step = config.train.accumulate_steps * self._packs_per_pass
        self._bucket_of_row = np.searchsorted(buckets, split.lengths)
        of_buckets = (split.lengths[self._bucket_of_row == bucket] for bucket in range(len(buckets)))
        self._rows_per_pack = [rows_per_pack(lengths, config) for lengths in of_buckets]
        self._epoch = functools.lru_cache(maxsize=2)(self._plan_epoch)
        self._prompts_of_group = functools.lru_cache(maxsize=1)(self._make_prompts)
        first = self._epoch(0)
        self._sizes = [
            pack_size(packs.fullest, longest, self._packs_per_pass)
            for packs, longest in zip(first.packs, buckets, strict=True)
        ]
        self.steps_per_epoch = len(first.steps)
        if not self.steps_per_epoch:
            raise UserError(
                f"the corpus is too small: {split.num_rows} rows of training text, but one optimiser step takes "
                f"{self._packs_per_step * self._rows_per_pack[-1]} of up to {buckets[-1]} tokens; lower "
                f"train.batch_size={config.train.batch_size}, train.accumulate_steps="
                f"{config.train.accumulate_steps} or model.block_size={config.model.block_size}, or give more text"
            )

    def __len__(self) -> int:
        """Training decides when to stop; epochs go on."""
        return sys.maxsize

    def __getitem__(self, step: int) -> PackedBatch:
        """The batch of optimiser step `step`, counted from 0; its prompts share memory with the next steps'."""
        bucket, packs = self._packs(step)
        longest, size = self._buckets[bucket], self._sizes[bucket]
        num_tokens = np.where(packs.rows < 0, 0, self._split.lengths[packs.rows])
        known_rows = known_spans(
            np.random.default_rng((self._seed, int(step), 1)),
            np.arange(longest) < num_tokens.reshape(-1, 1),
            self._infill_fraction,
        ).reshape(*packs.rows.shape, longest)
        # Of each position which of the pack's rows it belongs to, or lies behind, and its place in that row.
        starts = np.cumsum(packs.lengths, axis=1) - packs.lengths
        row = np.sum(starts[:, None, :] <= np.arange(size)[:, None], axis=-1) - 1
        place = np.arange(size) - np.take_along_axis(starts, row, axis=1)
        padding_mask = place < np.take_along_axis(num_tokens, row, axis=1)
        pack = np.arange(len(row))[:, None]
        # A missing row has a number of its own, -1, and no tokens.
        source = np.where(padding_mask, self._split.row_starts[packs.rows[pack, row]] + place, 0)
        tokens = self._split.tokens[source]

        def of_passes(array):
            return array.reshape(len(array) // self._packs_per_pass, self._packs_per_pass, *array.shape[1:])

        group, position = divmod(int(step), _STEPS_ENCODED_TOGETHER)
        prompts = self._prompts_of_group(group)[position]
        return PackedBatch(
            tokens=of_passes(np.where(padding_mask, tokens, self._split.pad_id).astype(np.int32)),
            padding_mask=of_passes(padding_mask),
            known_mask=of_passes(known_rows[pack, row, np.where(padding_mask, place, 0)] & padding_mask),
            lengths=of_passes(packs.lengths.astype(np.int32)),
            prompt=jax.tree.map(lambda leaf: of_passes(leaf.reshape(*packs.rows.shape, *leaf.shape[1:])), prompts),
            longest=longest,
        )

    def _packs(self, step: int) -> tuple[int, Packs]:
        """A step's bucket, and its packs."""
        number, position = divmod(int(step), self.steps_per_epoch)
        epoch = self._epoch(number)
        bucket, start = epoch.steps[position]
        packs = epoch.packs[bucket]
        chosen = slice(start, start + self._packs_per_step)
        rows, lengths = packs.rows[chosen], packs.lengths[chosen]
        return bucket, Packs(rows, lengths).within(self._sizes[bucket], self._split.lengths[rows])

    def _prompt_numbers(self, step: int) -> np.ndarray:
        """Of each of a step's rows the number of a prompt, -1 for none."""
        rows = self._packs(step)[1].rows.ravel()
        first, count = self._split.row_prompts[rows].T
        phrasing = self._epoch(int(step) // self.steps_per_epoch).phrasing[rows]
        return np.where((rows >= 0) & (count > 0), first + (phrasing * count).astype(np.int64), -1)

    def _make_prompts(self, group: int) -> list[Prompt]:
        """For each of the group's steps a prompt for each row."""
        first = group * _STEPS_ENCODED_TOGETHER
        numbers = [self._prompt_numbers(step) for step in range(first, first + _STEPS_ENCODED_TOGETHER)]
        prompts = self._prompts(np.concatenate(numbers))
        starts = np.cumsum([len(of_step) for of_step in numbers])[:-1]
        parts = zip(np.split(prompts.inputs, starts), np.split(prompts.mask, starts), strict=True)
        return [Prompt(inputs, mask) for inputs, mask in parts]

    def _pack_epoch(self, rng: np.random.Generator) -> list[Packs]:
        """For each bucket the packs of an epoch, in random order and of any size."""
        room = np.array(self._buckets)[self._bucket_of_row] - self._split.lengths
        padded = rng.random(self._split.num_rows) < _PADDED_SHARE
        lengths = self._split.lengths + np.where(padded, rng.integers(0, room + 1), 0)
        packed, left_over = [], np.zeros(0, np.int64)
        for bucket, per_pack in enumerate(self._rows_per_pack):
            per_step = self._packs_per_step * per_pack
            rows = np.concatenate([np.flatnonzero(self._bucket_of_row == bucket), left_over])
            rows = rng.permutation(rows)
            whole = len(rows) // per_step * per_step
            packs = balanced_packs(rows[:whole], lengths[rows[:whole]], per_pack, rng)
            order = rng.permutation(len(packs.rows))
            packed.append(Packs(packs.rows[order], packs.lengths[order]))
            left_over = rows[whole:]
        return packed

    def _plan_epoch(self, epoch: int) -> _Epoch:
        rng = np.random.default_rng((self._seed, epoch, 0))
        packed = self._pack_epoch(rng)
        steps = [
            (bucket, start)
            for bucket, packs in enumerate(packed)
            for start in range(0, len(packs.rows), self._packs_per_step)
        ]
        steps = rng.permutation(np.array(steps, np.int64).reshape(-1, 2))
        return _Epoch(steps, packed, phrasing=rng.random(self._split.num_rows))


def batch_iterator(source: BatchSource, start_step: int, end_step: int | None = None) -> Iterator[PackedBatch]:
    """The batches from `start_step` to before `end_step`, made ahead in a thread that begins at once."""
    steps = grain.MapDataset.source(source)[start_step:end_step]
    batches = iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=_PREFETCH)))
    batches.start_prefetch()
    return batches
