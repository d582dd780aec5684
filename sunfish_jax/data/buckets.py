"""Which rows go together by their length, and how many padded rows make one forward pass."""

import math

import numpy as np
from ml_collections import ConfigDict


def choose_buckets(lengths: np.ndarray, num_buckets: int, block_size: int, multiple: int = 16) -> tuple[int, ...]:
    """The lengths that leave the least padding when every row goes into the shortest bucket that holds it.

    Packed rows have little padding whatever their bucket; for them this is what attention's windows, as long as the
    bucket, hold beside their rows. Exact, by dynamic programming over the candidate lengths.

    Args:
      lengths: tokens in each row, at most `block_size`.
      num_buckets: how many lengths at most; each is one more shape to compile.
      block_size: the longest row allowed.
      multiple: buckets are multiples of this, or `block_size` itself.

    Returns:
      Lengths in increasing order. The last holds the longest row.
    """
    longest = math.ceil(int(np.max(lengths)) / multiple) * multiple
    candidates = sorted({min(size, block_size) for size in range(multiple, longest + 1, multiple)})
    # Rows no longer than each candidate; no row is shorter than 1, so a zeroth candidate of 0 holds none.
    sizes = [0, *candidates]
    rows_up_to = np.searchsorted(np.sort(lengths), sizes, side="right")
    # cost[j]: positions computed for all rows up to sizes[j], the longest of the buckets so far.
    cost = np.full(len(sizes), np.inf)
    cost[0] = 0
    choices: list[np.ndarray] = []
    for _ in range(min(num_buckets, len(candidates))):
        # via[i, j]: the bucket before j is i.
        new_rows = rows_up_to[None, :] - rows_up_to[:, None]
        via = np.where(np.tri(len(sizes), k=-1, dtype=bool).T, cost[:, None] + new_rows * np.array(sizes), np.inf)
        via[0, 0] = 0  # Fewer buckets than allowed: stay at the start.
        choices.append(np.argmin(via, axis=0))
        cost = np.min(via, axis=0)
    chosen, at = [], len(sizes) - 1
    for choice in reversed(choices):
        if at:
            chosen.append(sizes[at])
            at = choice[at]
    return tuple(reversed(chosen))


def rows_per_pass(length: int, config: ConfigDict) -> int:
    """B, the rows of one forward pass at a row length: about as many positions as `batch_size` blocks have."""
    return evenly_shared(config.train.batch_size * config.model.block_size / length, config.train)


def evenly_shared(number: float, train: ConfigDict) -> int:
    """About `number`, for devices to share: a multiple of theirs, at least one for each.

    Even where `batch_size` is, so that one and two devices share alike. `train` is that group of the configuration.
    """
    unit = math.lcm(2, train.num_devices) if train.batch_size % 2 == 0 else train.num_devices
    return max(unit, round(number / unit) * unit)
