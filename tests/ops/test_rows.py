"""Packed rows against a loop over rows, and rows of one length against the same packed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sunfish_jax.ops.rows import EqualRows, PackedRows

# Two packs of 12 positions: one row missing, positions of no row behind others, a row as long as may be, and a last
# one that begins behind where its window does.
LENGTHS, SIZE, LONGEST = np.array([[5, 2, 0], [4, 5, 3]]), 12, 5
STARTS = [0, 5, 7, 12, 16, 21]
HEADS, DIM = 2, 3


@pytest.fixture
def packed():
    return PackedRows.in_packs(jnp.asarray(LENGTHS), SIZE, LONGEST)


def spans():
    """Each row's number and the positions it has."""
    return [
        (row, slice(start, start + length))
        for row, (start, length) in enumerate(zip(STARTS, LENGTHS.flat, strict=True))
    ]


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_rows_lie_one_after_the_other_in_each_pack(packed):
    assert packed.num_positions == 24
    np.testing.assert_array_equal(packed.starts, STARTS)
    inside, row = np.asarray(packed.inside), np.asarray(packed.row)
    before, after = (np.asarray(distance) for distance in packed.reach())
    seen = np.zeros(24, bool)
    for number, span in spans():
        length = span.stop - span.start
        seen[span] = True
        assert (row[span] == number).all()
        np.testing.assert_array_equal(before[span], np.arange(length))
        np.testing.assert_array_equal(after[span], np.arange(length)[::-1])
    np.testing.assert_array_equal(inside, seen)
    assert (after[~seen] == -1).all() and (before[~seen] == -1).all()


def test_windows_hold_their_rows_and_come_back_to_their_positions(packed):
    x = normal(24, HEADS, DIM)
    windows, mask = np.asarray(packed.windows(x)), np.asarray(packed.mask)
    assert windows.shape == (6, HEADS, LONGEST, DIM)
    for row, span in spans():
        np.testing.assert_array_equal(windows[row][:, mask[row]], x[span].swapaxes(0, 1))
    expected = np.where(np.asarray(packed.inside)[:, None, None], x, 0.0)
    np.testing.assert_array_equal(packed.positions(jnp.asarray(windows)), expected)


def test_values_of_rows_and_of_places(packed):
    of_rows, of_places = normal(6, 4), normal(LONGEST, 4, seed=1)
    spread, placed = (np.asarray(x) for x in (packed.spread(of_rows), packed.at_places(of_places)))
    sums = np.asarray(packed.sums(jnp.asarray(spread)))
    for row, span in spans():
        length = span.stop - span.start
        np.testing.assert_array_equal(spread[span], np.tile(of_rows[row], (length, 1)))
        np.testing.assert_array_equal(placed[span], of_places[:length])
        np.testing.assert_allclose(sums[row], length * of_rows[row], rtol=1e-5)


def test_gradients_are_those_of_the_same_function_row_by_row(packed):
    """Of what depends on nothing but the rows' own positions."""
    x, of_rows, weight = normal(24, HEADS, DIM), normal(6, HEADS * DIM, seed=1), normal(24, HEADS, DIM, seed=2)
    inside = np.asarray(packed.inside)

    def fast(x, of_rows):
        scaled = x * packed.spread(of_rows).reshape(x.shape)
        windows = jnp.sin(packed.windows(scaled)) * packed.mask[:, None, :, None]
        # Every position of a row reads all of the row.
        mixed = windows + windows.sum(axis=2, keepdims=True)
        return jnp.sum(jnp.where(inside[:, None, None], packed.positions(mixed), 0.0) * weight)

    def plain(x, of_rows):
        total = 0.0
        for row, span in spans():
            scaled = jnp.sin(x[span] * of_rows[row].reshape(HEADS, DIM))
            total += jnp.sum((scaled + scaled.sum(axis=0)) * weight[span])
        return total

    got, want = (jax.jit(jax.value_and_grad(function, (0, 1)))(x, of_rows) for function in (fast, plain))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert not np.asarray(got[1][0])[~inside].any()


def test_nothing_comes_back_from_beyond_a_row(packed):
    """A window reaches into its neighbours: what was done there is none of theirs."""
    gradient = jax.grad(lambda x: packed.windows(x).sum())(jnp.zeros((24, HEADS, DIM)))
    np.testing.assert_array_equal(np.asarray(gradient)[:, 0, 0], packed.inside)
    back = jax.grad(lambda x: packed.positions(x).sum())(jnp.zeros((6, HEADS, LONGEST, DIM)))
    np.testing.assert_array_equal(np.asarray(back)[:, 0, :, 0] > 0, packed.mask)


def test_repeated_rows_are_the_same_rows_again(packed):
    x = normal(48, HEADS, DIM)
    twice = packed.repeated(2)
    halves = [packed.windows(half) for half in jnp.split(x, 2)]
    # The last windows of the first half may begin later, now that there are positions behind them.
    got, want = np.asarray(twice.windows(x)), np.concatenate(halves)
    mask = np.tile(np.asarray(packed.mask), (2, 1))
    for row, span in enumerate(2 * [span for _, span in spans()]):
        own = np.asarray(twice.mask)[row]
        assert own.sum() == span.stop - span.start
        np.testing.assert_array_equal(got[row][:, own], want[row][:, mask[row]])


def test_equal_rows_are_packed_rows_of_one_length():
    rows, length = 3, 4
    equal, packed = EqualRows(rows, length), PackedRows.in_packs(jnp.full((rows, 1), length), length, length)
    x, of_rows, of_places = normal(rows * length, HEADS, DIM), normal(rows, 5), normal(length, 5)
    assert equal.mask is None and np.asarray(packed.mask).all()
    windows = equal.windows(x)
    pairs = [
        (equal.num_positions, packed.num_positions),
        (equal.reach(), packed.reach()),
        (equal.spread(of_rows), packed.spread(of_rows)),
        (equal.at_places(of_places), packed.at_places(of_places)),
        (windows, packed.windows(x)),
        (equal.positions(windows), packed.positions(windows)),
        (equal.repeated(2).reach(), packed.repeated(2).reach()),
    ]
    for got, want in pairs:
        jax.tree.map(np.testing.assert_array_equal, got, want)
