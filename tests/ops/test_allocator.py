import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

# Counts the page faults of filling a large block, and of filling it again.
SCRIPT = """
import ctypes, os, resource, sys
from sunfish_jax.ops.allocator import restart_with_kept_huge_pages
restart_with_kept_huge_pages()
print(sys.argv[1:], os.environ["GLIBC_TUNABLES"])
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
size = 256 * 2**20
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    libc.free(block)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
@pytest.mark.skipif(
    not HUGE_PAGES.exists() or "[never]" in HUGE_PAGES.read_text(), reason="this kernel gives no huge pages"
)
@pytest.mark.parametrize("tunables", ["", "glibc.malloc.check=0", "glibc.malloc.hugetlb=1"])
def test_the_restarted_process_uses_huge_pages_and_keeps_them(tunables):
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    if tunables:
        environment["GLIBC_TUNABLES"] = tunables
    command = [sys.executable, "-c", SCRIPT, "first", "--second=2"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    seen, first, again = done.stdout.splitlines()
    arguments, _, setting = seen.partition("] ")
    assert arguments == "['first', '--second=2'"
    assert setting.startswith(tunables) and setting.count("glibc.malloc.hugetlb=1") == 1
    # 65,536 small pages; huge ones are 512 times as large.
    assert int(first) < 6000
    assert int(again) < 20


PREPARED = """
import ctypes
from sunfish_jax.ops.allocator import RESERVE, give_back_freed_memory, restart_with_kept_huge_pages
restart_with_kept_huge_pages()

def resident_megabytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
"""

# Frees many small blocks below one that stays, which keeps glibc from giving them back by itself.
FREEING = """
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
    done = subprocess.run([sys.executable, "-c", PREPARED + FREEING], check=True, capture_output=True, text=True)
    assert float(done.stdout) > 80


# A program runs twice, and small blocks that stay are made between; then memory is given back.
RESERVING = """
size = 200 * 2**20

def run():
    with RESERVE.lent():
        block = libc.malloc(size)
        ctypes.memset(block, 1, size)
        libc.free(block)
    return block

RESERVE.enlarge(size)
place = run()
inside = [place <= libc.malloc(2**20) < place + size for _ in range(50)]
again = run()
held = resident_megabytes()
give_back_freed_memory()
print(sum(inside), again - place, held - resident_megabytes())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only there something is reserved")
def test_small_blocks_do_not_take_the_place_of_temporaries():
    done = subprocess.run([sys.executable, "-c", PREPARED + RESERVING], check=True, capture_output=True, text=True)
    inside, moved, given_back = map(float, done.stdout.split())
    assert inside == 0 and moved == 0
    assert given_back > 190
