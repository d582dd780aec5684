"""How fast this machine multiplies matrices, through the same XLA as everything else here."""

import functools
import math
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from sunfish_jax.ops.eigen import compiler_options, in_eigen

# [m, k] @ [k, n]: the products of a transformer of width 512, and larger ones.
_SHAPES = ((1024, 512, 2048), (2048, 512, 2048), (4096, 512, 2048), (2048, 2048, 2048), (1024, 4096, 4096))
_SECONDS_A_SHAPE = 0.3


class MatrixRate:
    """The rate of the best of several products, of each by the median of its times.

    In each library of XLA:CPU that training may use. They are asked for in float32, as everywhere here: XLA:CPU
    takes longer to make a bfloat16 result. The machine's speed drifts, so it is worth measuring again now and then.

    Attributes:
      dtype: of the operands.
      shape: (m, k, n) of the best product so far.
      flops_per_second: its rate.
    """

    def __init__(self, dtype: jnp.dtype):
        self.dtype = dtype
        product = functools.partial(jnp.dot, preferred_element_type=jnp.float32)
        options = [{}, compiler_options(dtype)] if in_eigen(dtype) else [{}]
        libraries = [jax.jit(product, compiler_options=library) for library in options]
        self._seconds: dict[tuple[Callable, tuple[int, int, int]], list[float]] = {
            (multiply, shape): [] for multiply in libraries for shape in _SHAPES
        }

    @property
    def _best(self) -> tuple[Callable, tuple[int, int, int]]:
        return max(self._seconds, key=self._rate)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self._best[1]

    @property
    def flops_per_second(self) -> float:
        return self._rate(self._best)

    def measure(self) -> None:
        """Times every shape for a moment."""
        for product in self._seconds:
            self._measure(product)

    def _measure(self, product: tuple[Callable, tuple[int, int, int]]) -> None:
        multiply, (m, k, n) = product
        key = jax.random.key(0)
        # Random numbers: constant ones take less power, and let some processors run faster.
        left, right = (jax.random.normal(key, shape, self.dtype) for shape in ((m, k), (k, n)))
        multiply(left, right).block_until_ready()
        end = time.perf_counter() + _SECONDS_A_SHAPE
        while (start := time.perf_counter()) < end:
            multiply(left, right).block_until_ready()
            self._seconds[product].append(time.perf_counter() - start)

    def _rate(self, product: tuple[Callable, tuple[int, int, int]]) -> float:
        return 2 * math.prod(product[1]) / statistics.median(self._seconds[product])
