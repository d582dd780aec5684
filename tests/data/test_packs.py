import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import default, full, mini, nano, tiny
from sunfish_jax.data.packs import Packs, balanced_packs, pack_size, packs_per_pass, rows_per_pack


@settings(deadline=None)
@given(num_packs=st.integers(0, 9), rows_per_pack=st.integers(1, 5), seed=st.integers(0, 99))
def test_every_row_is_in_one_pack_with_its_length(num_packs, rows_per_pack, seed):
    rng = np.random.default_rng(seed)
    rows = rng.permutation(100)[: num_packs * rows_per_pack]
    lengths = rng.integers(1, 50, len(rows))
    packs = balanced_packs(rows, lengths, rows_per_pack, rng)
    assert packs.rows.shape == packs.lengths.shape == (num_packs, rows_per_pack)
    assert sorted(packs.rows.ravel()) == sorted(rows)
    length_of = dict(zip(rows.tolist(), lengths.tolist(), strict=True))
    assert [length_of[row] for row in packs.rows.ravel().tolist()] == packs.lengths.ravel().tolist()
    # From the longest to the shortest, as `Packs.within` needs it.
    assert (np.diff(packs.lengths, axis=1) <= 0).all()


def test_packs_are_about_equally_full():
    rng = np.random.default_rng(0)
    lengths = rng.integers(97, 145, 4000)
    packs = balanced_packs(np.arange(4000), lengths, 4, rng)
    by_chance = lengths.reshape(-1, 4).sum(axis=1)
    assert np.ptp(packs.lengths.sum(axis=1)) <= 4 < np.ptp(by_chance) / 20
    assert packs.fullest == packs.lengths.sum(axis=1).max()


def test_rows_meet_others_in_another_drawing():
    lengths = np.random.default_rng(0).integers(97, 145, 4000)
    first, second = (
        balanced_packs(np.arange(4000), lengths, 4, np.random.default_rng(seed)).rows for seed in (1, 2)
    )
    together = {frozenset(pack) for pack in first.tolist()} & {frozenset(pack) for pack in second.tolist()}
    assert len(together) < 10


def test_an_overfull_pack_loses_padding_and_then_its_last_rows():
    lengths = np.array([[8, 6, 2], [9, 6, 5], [9, 6, 5], [9, 6, 5], [20, 6, 5]])
    num_tokens = np.array([[5, 6, 2], [8, 4, 5], [8, 4, 2], [8, 6, 5], [20, 6, 5]])
    packs = Packs(np.arange(15).reshape(5, 3), lengths).within(16, num_tokens)
    np.testing.assert_array_equal(packs.rows, [[0, 1, 2], [3, 4, -1], [6, 7, 8], [9, 10, -1], [-1, -1, -1]])
    np.testing.assert_array_equal(packs.lengths, [[8, 6, 2], [8, 4, 0], [8, 4, 4], [8, 6, 0], [0, 0, 0]])
    nothing = np.zeros((0, 3), int)
    assert Packs(nothing, nothing).within(16, nothing).fullest == 0


@pytest.mark.parametrize(
    ("batch_size", "num_devices", "expected"),
    [(4, 1, 2), (4, 2, 2), (8, 1, 4), (1, 1, 1), (3, 1, 2), (3, 3, 3), (16, 3, 6), (2, 2, 2), (64, 8, 32)],
)
def test_packs_of_a_pass_are_shared_by_devices(batch_size, num_devices, expected):
    config = default.get_config()
    config.train.batch_size, config.train.num_devices = batch_size, num_devices
    assert packs_per_pass(config) == expected


@pytest.mark.parametrize("config", [default, full, mini, nano, tiny])
def test_in_each_step_the_same_packs_have_an_estimate(config):
    config = config.get_config()
    packs = config.train.accumulate_steps * packs_per_pass(config)
    assert packs % config.diffusion.self_conditioning_every == 0


@pytest.mark.parametrize(("mean", "expected"), [(60, 9), (128, 4), (230, 2), (250, 2)])
def test_a_pass_has_about_as_many_positions_as_whole_blocks(mean, expected):
    assert rows_per_pack(np.array([mean - 10, mean + 10]), default.get_config()) == expected


def test_a_pack_has_room_for_the_fullest_and_for_the_longest_row():
    for fullest, longest, num_packs in [(487, 144, 2), (30, 256, 2), (115, 64, 8), (100, 64, 3), (7, 5, 32)]:
        size = pack_size(fullest, longest, num_packs)
        assert size >= max(fullest, longest)
        assert size - max(fullest + 2, longest) < 16
    assert pack_size(487, 144, 2) * 2 % 16 == 0 and pack_size(115, 64, 8) == 118
