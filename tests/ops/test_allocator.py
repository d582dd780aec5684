import platform
import subprocess
import sys

import pytest

PAGE_FAULTS = """
import resource, sys
from sunfish_jax.ops.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
import ctypes
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
def touch():
    block = libc.malloc(64 * 2**20)
    ctypes.memset(block, 1, 64 * 2**20)
    libc.free(ctypes.c_void_p(block))
touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
def test_memory_used_again_costs_no_page_faults():
    def faults(mode):
        command = [sys.executable, "-c", PAGE_FAULTS, mode]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert faults("keep") < 100
    assert faults("default") > 1000
