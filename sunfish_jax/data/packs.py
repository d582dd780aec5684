"""Rows put together into packs, one after the other, so that all packs of a kind are about equally full."""

import dataclasses
import math

import numpy as np
from ml_collections import ConfigDict

from sunfish_jax.data.buckets import evenly_shared

# The longest rows of which a pack has room for about so many.
_LONGEST_ROWS = 2
# Positions of a pass are a multiple of this, as XLA:CPU's products like them.
_MULTIPLE = 16
# Positions left free beside the fullest pack of the first epoch. In later ones other rows move up from shorter
# kinds, and other rows are padded; what does not fit all the same is cut (`Packs.within`).
_SPARE = 2


@dataclasses.dataclass(frozen=True)
class Packs:
    """Rows in packs.

    Attributes:
      rows: [K, b] numbers of rows, -1 for none.
      lengths: [K, b] how many positions each of them takes, its padding included.
    """

    rows: np.ndarray
    lengths: np.ndarray

    @property
    def fullest(self) -> int:
        """Positions that the fullest pack needs; 0 without packs."""
        return int(self.lengths.sum(axis=1).max(initial=0))

    def within(self, size: int, num_tokens: np.ndarray) -> "Packs":
        """The same in packs of `size` positions: where they need more, with less padding, and then fewer rows.

        Args:
          size: n.
          num_tokens: [K, b] what each row takes without padding.
        """
        excess = np.maximum(0, self.lengths.sum(axis=1, keepdims=True) - size)
        padding = self.lengths - num_tokens
        before = np.cumsum(padding, axis=1) - padding
        lengths = self.lengths - np.clip(excess - before, 0, padding)
        # Rows fall in length along a pack: from the left, those are kept that fit.
        fits = np.cumsum(lengths, axis=1) <= size
        return Packs(np.where(fits, self.rows, -1), np.where(fits, lengths, 0))


def balanced_packs(rows: np.ndarray, lengths: np.ndarray, rows_per_pack: int, rng: np.random.Generator) -> Packs:
    """Puts rows into packs of nearly the same number of positions.

    The longest rows come first, one into each pack, then the next longest, and so on; each time the emptiest pack
    gets the longest one. Rows of one length change places from one drawing to the next.

    Args:
      rows: [R] their numbers, R a multiple of `rows_per_pack`.
      lengths: [R] positions that each takes.
      rows_per_pack: b.
      rng: draws the order among equals.
    """
    order = rng.permutation(len(rows))
    order = order[np.argsort(-lengths[order], kind="stable")].reshape(rows_per_pack, -1)
    used = np.zeros(order.shape[1], np.int64)
    packed = np.empty_like(order)
    for column, longest_first in enumerate(order):
        packed[column, np.argsort(used, kind="stable")] = longest_first
        used += lengths[packed[column]]
    return Packs(rows[packed.T], lengths[packed.T])


def packs_per_pass(config: ConfigDict) -> int:
    """P, the packs of one forward pass, which devices share: each has room for about two of the longest rows."""
    return evenly_shared(config.train.batch_size / _LONGEST_ROWS, config.train)


def rows_per_pack(lengths: np.ndarray, config: ConfigDict) -> int:
    """b, the rows of a pack, so that a pass has about as many positions as `batch_size` whole blocks."""
    positions = config.train.batch_size * config.model.block_size / packs_per_pass(config)
    return max(1, round(positions / np.mean(lengths)))


def pack_size(fullest: int, longest: int, num_packs: int) -> int:
    """n, the positions of each of a pass's packs: they need up to `fullest`, and room for a row of `longest`."""
    multiple = math.ceil(_MULTIPLE / num_packs)
    return math.ceil(max(fullest + _SPARE, longest) / multiple) * multiple
