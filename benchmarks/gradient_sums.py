"""How far gradients in one number format lie from those in another, beside what other batches would change."""

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
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
        for path in self.exact:
            if self._is_kernel(path):
                groups[path[-1]].append(path)
                groups[ALL_KERNELS].append(path)
            else:
                groups[OTHERS].append(path)
        last = {name: groups.pop(name) for name in (ALL_KERNELS, OTHERS) if name in groups}
        return {name: self._comparison(paths) for name, paths in {**groups, **last}.items()}

    def _is_kernel(self, path: tuple[str, ...]) -> bool:
        """Whether it is a matrix that features are multiplied with, which Muon orthogonalises."""
        return self.exact[path].ndim == 3 and path[-1].endswith(KERNEL_SUFFIXES)

    def _comparison(self, paths: list[tuple[str, ...]]) -> "Comparison":
        some, others = zip(*(self.exact[path] for path in paths), strict=True)
        exact = [self.exact[path].sum(0) for path in paths]
        given = [self.given[path].sum(0) for path in paths]
        square = sum(map(_squared, exact))
        squared_errors = sum(self.squared_errors[path] for path in paths)
        kernels = all(map(self._is_kernel, paths))
        return Comparison(
            one_batch=math.sqrt(squared_errors / sum(self.squares[path] for path in paths)),
            mean=math.sqrt(sum(map(_squared, map(np.subtract, given, exact))) / square),
            chance=math.sqrt(sum(map(_squared, map(np.subtract, some, others))) / square),
            direction=_cosine_of_directions(given, exact) if kernels else None,
            direction_chance=_cosine_of_directions(some, others) if kernels else None,
        )


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Errors of some gradients, in units of the exact ones' norm.

    Attributes:
      one_batch: of a batch's gradient (root of the mean square over batches).
      mean: of the mean gradient over the batches; errors that are alike in all batches stay in it.
      chance: what the exact mean gradient is off by itself, for it is of few batches: half the difference of its
        halves, which varies as it does.
      direction: the cosine between the two mean gradients, each kernel orthogonalised by itself as by a Muon that
        takes none together; None where Muon is not used.
      direction_chance: the same for the exact mean gradients of the two halves.
    """

    one_batch: float
    mean: float
    chance: float
    direction: float | None
    direction_chance: float | None


@jax.jit
def _direction(matrix: jax.Array) -> jax.Array:
    return orthogonalize(matrix, jnp.float32)


def _cosine_of_directions(some: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> float:
    """Of two lists of matrices, orthogonalised, each list as one long vector."""
    products = np.zeros(3)
    for pair in zip(some, others, strict=True):
        a, b = (np.asarray(_direction(matrix), np.float64) for matrix in pair)
        products += np.vdot(a, b), np.vdot(a, a), np.vdot(b, b)
    return float(products[0] / math.sqrt(products[1] * products[2]))


def _squared(values: np.ndarray) -> float:
    """The square of an array's norm."""
    return float(np.square(values, dtype=np.float64).sum())
