"""How fast this machine multiplies matrices, through the same XLA as everything else here."""

import functools
import statistics
import time

import jax
import jax.numpy as jnp

from sunfish_jax.ops.awake import awake_cores

# [m, k] @ [k, n]: the products of a transformer of width 512, and larger ones.
_SHAPES = ((1024, 512, 2048), (2048, 512, 2048), (4096, 512, 2048), (2048, 2048, 2048), (1024, 4096, 4096))
_SECONDS_A_SHAPE = 0.3


class MatrixRate:
    """The rate of the best of several products, of each by the median of its times.

    They are asked for in float32, as everywhere here: XLA:CPU takes longer to make a bfloat16 result. The machine's
    speed drifts, so it is worth measuring again now and then.

    Attributes:
      dtype: of the operands.
      shape: (m, k, n) of the best product so far.
      flops_per_second: its rate.
    """

    def __init__(self, dtype: jnp.dtype):
        self.dtype = dtype
        self._product = jax.jit(functools.partial(jnp.dot, preferred_element_type=jnp.float32))
        self._seconds: dict[tuple[int, int, int], list[float]] = {shape: [] for shape in _SHAPES}

    @property
    def shape(self) -> tuple[int, int, int]:
        return max(_SHAPES, key=self._rate)

    @property
    def flops_per_second(self) -> float:
        return self._rate(self.shape)

    def measure(self) -> None:
        """Times every shape for a moment, on cores as awake as in training."""
        with awake_cores():
            for shape in _SHAPES:
                self._measure(*shape)

    def _measure(self, m: int, k: int, n: int) -> None:
        key = jax.random.key(0)
        # Random numbers: constant ones take less power, and let some processors run faster.
        left, right = (jax.random.normal(key, shape, self.dtype) for shape in ((m, k), (k, n)))
        self._product(left, right).block_until_ready()
        end = time.perf_counter() + _SECONDS_A_SHAPE
        while (start := time.perf_counter()) < end:
            self._product(left, right).block_until_ready()
            self._seconds[m, k, n].append(time.perf_counter() - start)

    def _rate(self, shape: tuple[int, int, int]) -> float:
        m, k, n = shape
        return 2 * m * k * n / statistics.median(self._seconds[shape])
