"""Which number format this machine multiplies matrices in."""

import time

import jax
import jax.numpy as jnp

# bfloat16 is taken when it is at least this many times as fast: less would not repay its rounding.
_WORTHWHILE = 1.2


def fastest_compute_dtype() -> str:
    """Measures a transformer-sized product in both formats on this machine.

    Returns:
      "bfloat16" or "float32". Accelerators are taken to have fast bfloat16.
    """
    if jax.default_backend() != "cpu":
        return "bfloat16"
    return "bfloat16" if _seconds(jnp.float32) > _WORTHWHILE * _seconds(jnp.bfloat16) else "float32"


def _seconds(dtype) -> float:
    """Seconds of the fastest of several products [512, 512] @ [512, 2048]."""
    x, kernel = jnp.ones((512, 512), dtype), jnp.ones((512, 2048), dtype)
    product = jax.jit(jnp.dot)
    product(x, kernel).block_until_ready()
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        product(x, kernel).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
