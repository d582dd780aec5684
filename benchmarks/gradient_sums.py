"""How far gradients in one number format lie from those in another, beside what other batches would change."""

import collections
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from sunfish_jax.models.denoiser import KERNEL_SUFFIXES
from sunfish_jax.ops.orthogonalize import orthogonalize

ALL_KERNELS, OTHERS = "all kernels", "tables, vectors"


class GradientSums:
    """Gradients of the same batches in two number formats, one of them taken for exact.

    Attributes:
      exact: by leaf, [2, ...] sums of the exact gradients over every other batch, and over those between.
      given: the same of the other gradients.
      squared_errors: by leaf, the sum over batches of |given - exact|^2.
      squares: by leaf, that of |exact|^2.
    """

    def __init__(self):
        self.exact, self.given = {}, {}
        self.squared_errors, self.squares = collections.Counter(), collections.Counter()
        self._number = 0

    def add(self, exact: Mapping[str, Any], given: Mapping[str, Any]) -> None:
        """Adds the gradients of one more batch, trees of arrays."""
        half = self._number % 2
        given = flatten_dict(given)
        for path, true in flatten_dict(exact).items():
            for sums, gradient in ((self.exact, true), (self.given, given[path])):
                sums.setdefault(path, np.zeros((2, *true.shape), np.float32))[half] += gradient
            self.squared_errors[path] += _squared(given[path] - true)
            self.squares[path] += _squared(true)
        self._number += 1

    def comparisons(self) -> dict[str, "Comparison"]:
        """By kind of kernel, then of all of them, then of all other parameters."""
        groups = collections.defaultdict(list)
        for path, sums in self.exact.items():
            if sums.ndim == 3 and path[-1].endswith(KERNEL_SUFFIXES):
                groups[path[-1]].append(path)
                groups[ALL_KERNELS].append(path)
            else:
                groups[OTHERS].append(path)
        last = {name: groups.pop(name) for name in (ALL_KERNELS, OTHERS) if name in groups}
        return {name: self._comparison(paths) for name, paths in {**groups, **last}.items()}

    def _comparison(self, paths: list[tuple[str, ...]]) -> "Comparison":
        exact = [self.exact[path] for path in paths]
        given = [self.given[path] for path in paths]
        square = sum(_squared(sums.sum(0)) for sums in exact)
        of_mean = sum(_squared(g.sum(0) - e.sum(0)) for g, e in zip(given, exact, strict=True))
        chance = sum(_squared(sums[0] - sums[1]) for sums in exact)
        kernels = all(sums.ndim == 3 for sums in exact)
        return Comparison(
            one_batch=_root(
                sum(self.squared_errors[path] for path in paths) / sum(self.squares[path] for path in paths)
            ),
            mean=_root(of_mean / square),
            chance=_root(chance / square),
            direction=_cosine(_directions(given, slice(2)), _directions(exact, slice(2))) if kernels else None,
            direction_chance=_cosine(_directions(exact, 0), _directions(exact, 1)) if kernels else None,
        )


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Errors of some gradients, in units of the exact ones' norm.

    Attributes:
      one_batch: of a batch's gradient (root of the mean square over batches).
      mean: of the mean gradient over the batches; errors that are alike in all batches stay in it.
      chance: what the exact mean gradient is off by itself, for it is of few batches: half the difference of its
        halves, which varies as it does.
      direction: the cosine between Muon's directions for the two mean gradients; None where Muon is not used.
      direction_chance: the same for the exact mean gradients of the two halves.
    """

    one_batch: float
    mean: float
    chance: float
    direction: float | None
    direction_chance: float | None


def _directions(sums: list[np.ndarray], halves: slice | int) -> Iterator[np.ndarray]:
    for both in sums:
        summed = both[halves] if isinstance(halves, int) else both[halves].sum(0)
        yield np.asarray(_orthogonalize(summed), np.float64)


@jax.jit
def _orthogonalize(matrix: jax.Array) -> jax.Array:
    return orthogonalize(matrix, jnp.float32)


def _cosine(some: Iterator[np.ndarray], others: Iterator[np.ndarray]) -> float:
    """Of two lists of matrices, each as one long vector."""
    products = np.sum([[np.vdot(a, b), np.vdot(a, a), np.vdot(b, b)] for a, b in zip(some, others, strict=True)], 0)
    return float(products[0] / np.sqrt(products[1] * products[2]))


def _squared(values: np.ndarray) -> float:
    """The square of an array's norm."""
    return float(np.square(values, dtype=np.float64).sum())


def _root(value: float) -> float:
    return float(np.sqrt(value))
