import subprocess
import sys

# After what a run of training imports, Python's full collections, and what becomes of a cycle that nobody holds.
IMPORTING = """
import gc, weakref
from sunfish_jax.startup import prepare_process
prepare_process()
before = gc.get_stats()[2]["collections"]
import sunfish_jax.training.loop, transformers
print(gc.get_stats()[2]["collections"] - before)

class Node:
    pass

node = Node()
node.itself = node
alive = weakref.ref(node)
del node
kept = [[] for _ in range(20_000)]
print(alive() is None)
"""


def test_imports_are_not_searched_for_cycles_and_new_cycles_are_found():
    done = subprocess.run([sys.executable, "-c", IMPORTING], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["0", "True"]
