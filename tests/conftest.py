"""Two host devices for every test, set before anything starts JAX's backend."""

import jax

jax.config.update("jax_num_cpu_devices", 2)
