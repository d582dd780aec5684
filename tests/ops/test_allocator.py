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
