"""Where the rows of a pass lie among its positions: of one length, or packed, each behind the one before it."""

from typing import Protocol

import flax.struct
import jax
import jax.numpy as jnp

# How many parts of a row are added up in one loop.
_PARTS = 8


class Rows(Protocol):
    """B rows among N positions.

    What is done to each position by itself is done to [N, ...], where little or nothing is padding; attention is
    done in windows [B, H, S, d], S positions that hold a row.
    """

    @property
    def num_positions(self) -> int:
        """N."""

    @property
    def longest(self) -> int:
        """S, which no row is longer than."""

    @property
    def mask(self) -> jax.Array | None:
        """[B, S] bool, True where a window's position is of its row; None where all are."""

    def reach(self) -> tuple[jax.Array, jax.Array]:
        """How many positions of its row come before each position, and how many after: [N] int32 each.

        Both are -1 at positions of no row.
        """

    def repeated(self, times: int) -> "Rows":
        """The same rows again and again: `times` B rows among `times` N positions."""

    def spread(self, values: jax.Array) -> jax.Array:
        """Each position gets what its row has: [B, W] -> [N, W]."""

    def at_places(self, table: jax.Array) -> jax.Array:
        """Each position gets what its place in the row has: [S, W] -> [N, W]."""

    def windows(self, x: jax.Array) -> jax.Array:
        """[N, H, d] -> [B, H, S, d]. Where `mask` is False is whatever lies there, and no gradient comes back."""

    def positions(self, x: jax.Array) -> jax.Array:
        """[B, H, S, d] -> [N, H, d]: from each window what is of its row; zeros at positions of no row."""


@flax.struct.dataclass
class EqualRows:
    """`Rows` of one length, so that N = B S.

    Attributes:
      num_rows: B.
      longest: S.
    """

    num_rows: int = flax.struct.field(pytree_node=False)
    longest: int = flax.struct.field(pytree_node=False)

    @property
    def num_positions(self) -> int:
        return self.num_rows * self.longest

    @property
    def mask(self) -> None:
        return None

    def reach(self) -> tuple[jax.Array, jax.Array]:
        before = jnp.tile(jnp.arange(self.longest), self.num_rows)
        return before, self.longest - 1 - before

    def repeated(self, times: int) -> "EqualRows":
        return EqualRows(times * self.num_rows, self.longest)

    def spread(self, values: jax.Array) -> jax.Array:
        return self._flat(values[:, None])

    def at_places(self, table: jax.Array) -> jax.Array:
        return self._flat(table[None])

    def _flat(self, values: jax.Array) -> jax.Array:
        shape = (self.num_rows, self.longest, values.shape[-1])
        return jnp.broadcast_to(values, shape).reshape(-1, values.shape[-1])

    def windows(self, x: jax.Array) -> jax.Array:
        return x.reshape(self.num_rows, self.longest, *x.shape[1:]).swapaxes(1, 2)

    def positions(self, x: jax.Array) -> jax.Array:
        return x.swapaxes(1, 2).reshape(-1, *x.shape[1::2])


@flax.struct.dataclass
class PackedRows:
    """`Rows` of any lengths; behind the last of them, and between them, may be positions of no row.

    Attributes:
      starts: [B] int32, the first position of each row, from 0 and never falling.
      lengths: [B] int32, from 0 to S; no row reaches the start of the next.
      num_positions: N, at least S.
      longest: S.
    """

    starts: jax.Array
    lengths: jax.Array
    num_positions: int = flax.struct.field(pytree_node=False)
    longest: int = flax.struct.field(pytree_node=False)

    @classmethod
    def in_packs(cls, lengths: jax.Array, size: int, longest: int) -> "PackedRows":
        """Rows one after the other in packs of `size` positions, one after the other; lengths are [packs, rows]."""
        starts = jnp.cumsum(lengths, axis=1) - lengths + size * jnp.arange(len(lengths))[:, None]
        return cls(starts.ravel(), lengths.ravel(), size * len(lengths), longest)

    @property
    def mask(self) -> jax.Array:
        place = self._window_starts[:, None] + jnp.arange(self.longest) - self.starts[:, None]
        return (place >= 0) & (place < self.lengths[:, None])

    @property
    def _window_starts(self) -> jax.Array:
        # The last windows begin before their rows, so that they end where the positions do.
        return jnp.minimum(self.starts, self.num_positions - self.longest)

    @property
    def row(self) -> jax.Array:
        """[N] int32, the row of each position, or the one it lies behind."""
        return jnp.sum(self.starts <= jnp.arange(self.num_positions)[:, None], axis=1) - 1

    @property
    def inside(self) -> jax.Array:
        """[N] bool, True at positions of a row."""
        return self.reach()[1] >= 0

    def reach(self) -> tuple[jax.Array, jax.Array]:
        row = self.row
        before = jnp.arange(self.num_positions) - self.starts[row]
        after = self.lengths[row] - 1 - before
        return jnp.where(after < 0, -1, before), jnp.maximum(after, -1)

    def repeated(self, times: int) -> "PackedRows":
        offsets = self.num_positions * jnp.arange(times)[:, None]
        starts, lengths = (self.starts + offsets).ravel(), jnp.tile(self.lengths, times)
        return PackedRows(starts, lengths, times * self.num_positions, self.longest)

    def spread(self, values: jax.Array) -> jax.Array:
        return _spread(self, values)

    def sums(self, values: jax.Array) -> jax.Array:
        """Each row gets the sum of what its positions have: [N, W] -> [B, W]."""
        # A part of each row at a time, in one loop that gathers and adds: a sum over all of it would want what it
        # adds up in an array of its own.
        length = -(-self.longest // _PARTS)
        total = 0
        for part in range(_PARTS):
            place = part * length + jnp.arange(length)
            index = jnp.minimum(self.starts[:, None] + place, self.num_positions - 1)
            inside = place < self.lengths[:, None]
            total += jnp.where(inside[..., None], values.at[index].get(mode="promise_in_bounds"), 0)
        return jax.lax.optimization_barrier(total).sum(axis=1)

    def at_places(self, table: jax.Array) -> jax.Array:
        place = jnp.maximum(self.reach()[0], 0)
        return table.at[place].get(mode="promise_in_bounds")

    def windows(self, x: jax.Array) -> jax.Array:
        return _windows(self, x)

    def positions(self, x: jax.Array) -> jax.Array:
        return _positions(self, x)


# Each position is of one row at most, so the gradients too are read from one place each. The automatic ones would
# be scatters, which XLA:CPU works through one element at a time.


@jax.custom_vjp
def _spread(rows: PackedRows, values: jax.Array) -> jax.Array:
    return values.at[rows.row].get(mode="promise_in_bounds")


def _spread_forward(rows, values):
    return _spread(rows, values), rows


def _spread_backward(rows, g):
    return None, rows.sums(g)


_spread.defvjp(_spread_forward, _spread_backward)


@jax.custom_vjp
def _windows(rows: PackedRows, x: jax.Array) -> jax.Array:
    index = rows._window_starts[:, None] + jnp.arange(rows.longest)
    return x.at[index].get(mode="promise_in_bounds").swapaxes(1, 2)


def _windows_forward(rows, x):
    return _windows(rows, x), rows


def _windows_backward(rows, g):
    return None, _positions(rows, g)


_windows.defvjp(_windows_forward, _windows_backward)


@jax.custom_vjp
def _positions(rows: PackedRows, x: jax.Array) -> jax.Array:
    row = rows.row
    place = jnp.minimum(jnp.arange(rows.num_positions) - rows._window_starts[row], rows.longest - 1)
    return jnp.where(rows.inside[:, None, None], x.at[row, :, place].get(mode="promise_in_bounds"), 0)


def _positions_forward(rows, x):
    return _positions(rows, x), rows


def _positions_backward(rows, g):
    return None, jnp.where(rows.mask[:, None, :, None], _windows(rows, g), 0)


_positions.defvjp(_positions_forward, _positions_backward)
