import itertools

import numpy as np
import pytest

from configs import default
from sunfish_jax.data.buckets import choose_buckets, rows_per_pass


def positions(lengths, buckets):
    return sum(min(bucket for bucket in buckets if bucket >= length) for length in lengths)


@pytest.mark.parametrize(("num_buckets", "block_size"), [(1, 96), (2, 96), (3, 90), (6, 96), (9, 96)])
def test_buckets_waste_no_more_than_any_others(num_buckets, block_size):
    rng = np.random.default_rng(num_buckets)
    lengths = np.minimum(rng.geometric(1 / 30, 200), block_size)
    chosen = choose_buckets(lengths, num_buckets, block_size)
    assert list(chosen) == sorted(set(chosen)) and len(chosen) <= num_buckets
    assert lengths.max() <= chosen[-1] <= block_size
    candidates = [min(size, block_size) for size in range(16, block_size + 16, 16)]
    every = (
        subset
        for size in range(1, num_buckets + 1)
        for subset in itertools.combinations(candidates, size)
        if subset[-1] >= lengths.max()
    )
    assert positions(lengths, chosen) == min(positions(lengths, subset) for subset in every)


def test_no_bucket_is_longer_than_the_rows_need():
    assert choose_buckets(np.array([3, 17, 40]), 7, 256) == (16, 32, 48)
    assert choose_buckets(np.array([100] * 5), 7, 100) == (100,)


@pytest.mark.parametrize(
    ("batch_size", "num_devices", "length", "rows"),
    [
        (4, 1, 256, 4),
        (4, 1, 112, 10),
        (4, 2, 80, 12),
        (4, 4, 176, 4),
        (1, 1, 256, 1),
        (1, 1, 48, 5),
        (3, 1, 256, 3),
        (3, 3, 112, 6),
        (8, 3, 256, 6),
    ],
)
def test_rows_hold_about_the_positions_of_whole_blocks(batch_size, num_devices, length, rows):
    config = default.get_config()
    config.train.batch_size, config.train.num_devices = batch_size, num_devices
    assert rows_per_pass(length, config) == rows
