"""What is set before anything starts JAX's backend: caches of compiled code for all tests, and two host devices."""

import os
import tempfile

# Many tests compile the same programs, and so do the processes that some of them start. Those inherit it.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix="sunfish_jax_tests_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(_cache.name, "programs")
    # Set in many containers: every process would then compile the sources of JAX and transformers, for seconds.
    if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):
        os.environ["PYTHONPYCACHEPREFIX"] = os.path.join(_cache.name, "bytecode")

import jax

jax.config.update("jax_num_cpu_devices", 2)
