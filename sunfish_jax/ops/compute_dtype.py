"""Which number format this machine multiplies matrices in."""

import time

import jax
import jax.numpy as jnp

# bfloat16 is taken when it is at least this many times as fast: less would not repay its rounding.
_WORTHWHILE = 1.2
_REPEATS = 20


def fastest_compute_dtype() -> str:
    """Measures a transformer-sized product in both formats on this machine.

    Returns:
      "bfloat16" or "float32". Accelerators are taken to have fast bfloat16.
    """
    if jax.default_backend() != "cpu":
        return "bfloat16"
    # In turn, so that another process slows both alike.
    products = {dtype: _Product(dtype) for dtype in ("float32", "bfloat16")}
    seconds = {dtype: [] for dtype in products}
    for _ in range(_REPEATS):
        for dtype, product in products.items():
            seconds[dtype].append(product.seconds())
    fastest = {dtype: min(times) for dtype, times in seconds.items()}
    return "bfloat16" if fastest["float32"] > _WORTHWHILE * fastest["bfloat16"] else "float32"


class _Product:
    """[512, 512] @ [512, 2048] in one number format."""

    def __init__(self, dtype: str):
        self._operands = jnp.ones((512, 512), dtype), jnp.ones((512, 2048), dtype)
        self._multiply = jax.jit(jnp.dot)
        self.seconds()

    def seconds(self) -> float:
        start = time.perf_counter()
        self._multiply(*self._operands).block_until_ready()
        return time.perf_counter() - start
