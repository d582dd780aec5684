"""Which number format this machine multiplies matrices in."""

import time

import jax
import jax.numpy as jnp

# From the most precise to the least. In int8, layers multiply with their kernels in eight bits, and the rest is
# bfloat16.
FORMATS = ("float32", "bfloat16", "int8")
# One is taken when it is at least this many times as fast as the one before: less would not repay its rounding, and
# in int8 the finding of its steps.
_WORTHWHILE = {"bfloat16": 1.2, "int8": 1.4}
# Of narrower layers, what finding the steps takes is more than eight bits save (docs/performance.md).
_NARROWEST_IN_INT8 = 256
_REPEATS = 20


def fastest_compute_dtype(width: int = 0) -> str:
    """Measures a transformer-sized product in each format on this machine.

    By processor time, which other processes do not lengthen: by the clock, three of them took the ratio of two
    formats to anything from 0.6 to 1.1 of what it is, and a run keeps the format that it began with.

    Args:
      width: of layers that can multiply in int8; 0 for a model that has none.

    Returns:
      One of `FORMATS`. Accelerators are taken to have fast bfloat16.
    """
    if jax.default_backend() != "cpu":
        return "bfloat16"
    formats = FORMATS if width >= _NARROWEST_IN_INT8 else FORMATS[:2]
    products = {dtype: _Product(dtype) for dtype in formats}
    seconds = dict.fromkeys(products, 0.0)
    # In turn, so that a change of the processor's speed meets all. Of all repeats, since what a thread does may be
    # counted only in the next one.
    for _ in range(_REPEATS):
        for dtype, product in products.items():
            seconds[dtype] += product.processor_seconds()
    chosen = formats[0]
    for faster in formats[1:]:
        if seconds[chosen] <= _WORTHWHILE[faster] * seconds[faster]:
            break
        chosen = faster
    return chosen


class _Product:
    """[512, 512] @ [512, 2048] in one number format."""

    def __init__(self, dtype: str):
        self._operands = jnp.ones((512, 512), dtype), jnp.ones((512, 2048), dtype)
        # As layers ask for it: of a bfloat16 result the product may take half as long again.
        sums = jnp.int32 if dtype == "int8" else jnp.float32
        self._multiply = jax.jit(lambda left, right: jnp.dot(left, right, preferred_element_type=sums))
        self.processor_seconds()

    def processor_seconds(self) -> float:
        """What all threads of this process spend on one product."""
        start = time.process_time()
        self._multiply(*self._operands).block_until_ready()
        return time.process_time() - start
