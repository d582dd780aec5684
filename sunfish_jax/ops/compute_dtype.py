"""Which number format this machine multiplies matrices in."""

import time

import jax
import jax.numpy as jnp

# bfloat16 is taken when it is at least this many times as fast: less would not repay its rounding.
_WORTHWHILE = 1.2
_REPEATS = 20


def fastest_compute_dtype() -> str:
    """Measures a transformer-sized product in both formats on this machine.

    By processor time, which other processes do not lengthen: by the clock, three of them took the ratio of the two
    formats to anything from 0.6 to 1.1 of what it is, and a run keeps the format that it began with.

    Returns:
      "bfloat16" or "float32". Accelerators are taken to have fast bfloat16.
    """
    if jax.default_backend() != "cpu":
        return "bfloat16"
    products = {dtype: _Product(dtype) for dtype in ("float32", "bfloat16")}
    seconds = dict.fromkeys(products, 0.0)
    # In turn, so that a change of the processor's speed meets both. Of all repeats, since what a thread does may be
    # counted only in the next one.
    for _ in range(_REPEATS):
        for dtype, product in products.items():
            seconds[dtype] += product.processor_seconds()
    return "bfloat16" if seconds["float32"] > _WORTHWHILE * seconds["bfloat16"] else "float32"


class _Product:
    """[512, 512] @ [512, 2048] in one number format."""

    def __init__(self, dtype: str):
        self._operands = jnp.ones((512, 512), dtype), jnp.ones((512, 2048), dtype)
        self._multiply = jax.jit(jnp.dot)
        self.processor_seconds()

    def processor_seconds(self) -> float:
        """What all threads of this process spend on one product."""
        start = time.process_time()
        self._multiply(*self._operands).block_until_ready()
        return time.process_time() - start
