"""How fast this machine multiplies matrices, through the same XLA as everything else here."""

import time

import jax
import jax.numpy as jnp

# [m, k] @ [k, n]: the products of a transformer of width 512, and larger ones.
_SHAPES = ((1024, 512, 2048), (2048, 512, 2048), (4096, 512, 2048), (2048, 2048, 2048), (1024, 4096, 4096))
_SECONDS_A_SHAPE = 0.3


class MatrixRate:
    """The best bfloat16 rate seen so far.

    Other work on the machine slows single products down, so it is worth measuring again now and then.

    Attributes:
      flops_per_second: the best.
      shape: (m, k, n) of the product that reached it.
    """

    def __init__(self):
        self.flops_per_second, self.shape = 0.0, _SHAPES[0]
        self._product = jax.jit(jnp.dot)

    def measure(self) -> None:
        """Times every shape for a moment and keeps the best."""
        key = jax.random.key(0)
        for m, k, n in _SHAPES:
            # Random numbers: constant ones take less power, and let some processors run faster.
            left, right = (jax.random.normal(key, shape, jnp.bfloat16) for shape in ((m, k), (k, n)))
            self._product(left, right).block_until_ready()
            end = time.perf_counter() + _SECONDS_A_SHAPE
            while (start := time.perf_counter()) < end:
                self._product(left, right).block_until_ready()
                rate = 2 * m * k * n / (time.perf_counter() - start)
                if rate > self.flops_per_second:
                    self.flops_per_second, self.shape = rate, (m, k, n)
