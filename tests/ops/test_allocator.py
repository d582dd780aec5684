import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

# Counts the page faults of filling a large block.
SCRIPT = """
import ctypes, os, resource, sys
from sunfish_jax.ops.allocator import restart_with_huge_pages
restart_with_huge_pages()
print(sys.argv[1:], os.environ["GLIBC_TUNABLES"])
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
size = 256 * 2**20
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
ctypes.memset(libc.malloc(size), 1, size)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
@pytest.mark.skipif(
    not HUGE_PAGES.exists() or "[never]" in HUGE_PAGES.read_text(), reason="this kernel gives no huge pages"
)
@pytest.mark.parametrize("tunables", ["", "glibc.malloc.check=0"])
def test_the_restarted_process_uses_huge_pages(tunables):
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    if tunables:
        environment["GLIBC_TUNABLES"] = tunables
    command = [sys.executable, "-c", SCRIPT, "first", "--second=2"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    seen, faults = done.stdout.splitlines()
    assert seen == f"['first', '--second=2'] {tunables}{':' if tunables else ''}glibc.malloc.hugetlb=1"
    # 65,536 small pages; huge ones are 512 times as large.
    assert int(faults) < 6000


# Frees many small blocks below one that stays, which keeps glibc from giving them back by itself.
FREEING = """
import ctypes
from sunfish_jax.ops.allocator import give_back_freed_memory

def resident_megabytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
blocks = [libc.malloc(10_000) for _ in range(10_000)]
for block in blocks:
    ctypes.memset(block, 1, 10_000)
for block in blocks[:-1]:
    libc.free(block)
before = resident_megabytes()
give_back_freed_memory()
print(before - resident_megabytes())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the function is glibc's")
def test_freed_memory_goes_back_to_the_system():
    done = subprocess.run([sys.executable, "-c", FREEING], check=True, capture_output=True, text=True)
    assert float(done.stdout) > 80
