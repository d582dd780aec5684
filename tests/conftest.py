"""What is set before anything starts JAX's backend: where tests compile and prepare text, and two host devices."""

import os
import tempfile

# Many tests compile the same programs, and so do the processes that some of them start. Those inherit it.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix="sunfish_jax_tests_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(_cache.name, "programs")
    os.environ["XDG_CACHE_HOME"] = _cache.name
    # Set in many containers: every process would then compile the sources of JAX and transformers, for seconds.
    if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):
        os.environ["PYTHONPYCACHEPREFIX"] = os.path.join(_cache.name, "bytecode")

import jax
import pytest

# Begun first, so that no process is left alone with one of them at the end.
_LONGEST_FILES = (
    "test_end_to_end.py",
    "test_ar_twin.py",
    "test_text_metrics_table.py",
    "test_compiled_step.py",
    "test_compiled_sampling.py",
    "test_step.py",
)

jax.config.update("jax_num_cpu_devices", 2)
# Most of the time of these tests is compiling, of programs that run for moments. The processes that some of them
# start, `main.py` among these, compile as a person's do.
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="module")
def compiled_as_shipped():
    """Compiles as a person's process does, for tests of what comes of it."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


def pytest_collection_modifyitems(items):
    """Puts the longest files first; `--no-loadscope-reorder` keeps them there."""
    items.sort(key=lambda item: item.path.name not in _LONGEST_FILES)
