"""The names that a configuration or a flag may choose from, without an import of JAX."""

SCHEDULES = ("gumbel", "linear", "cosine", "sqrt")
SCHEDULERS = ("ddim", "ddpm", "dpmpp")
