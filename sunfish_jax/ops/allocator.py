"""Large arrays in huge pages of memory that the process keeps."""

import ctypes
import os
import platform
import sys

_VARIABLE = "GLIBC_TUNABLES"
_NEVER = 2**62  # a size that nothing has
_TUNABLES = {
    # 1: pages of 2 MB wherever the kernel has them.
    "glibc.malloc.hugetlb": 1,
    # Blocks from this size on have a mapping of their own, which ends with them; all others lie in the heap.
    "glibc.malloc.mmap_threshold": _NEVER,
    # With so much free at its end the heap shrinks.
    "glibc.malloc.trim_threshold": _NEVER,
}


def restart_with_kept_huge_pages() -> None:
    """Starts the process anew, unless that was done: glibc's allocator then keeps what is freed, in huge pages.

    XLA:CPU allocates its temporaries anew at every execution: half a gigabyte for a training step. To fault them in
    by pages of 4 kB took a seventh of a step. In huge pages it takes little by itself, but of a virtual machine the
    host takes back what its guest has left free for two seconds, and gives it again at less than 1 GB/s.

    Only the heap of the main thread grows beyond 64 MB, so programs have to run there (`startup.py`). What the
    environment sets already stays. Call it before anything is done that must not be done twice. Off glibc nothing
    happens.
    """
    tunables = os.environ.get(_VARIABLE, "")
    missing = [f"{name}={value}" for name, value in _TUNABLES.items() if name not in tunables]
    if not _is_glibc() or not missing:
        return
    os.environ[_VARIABLE] = ":".join([tunables, *missing]).removeprefix(":")
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def give_back_freed_memory() -> None:
    """Returns to the system what glibc keeps of the memory that was freed. Off glibc nothing happens.

    The compiler frees half a gigabyte in small pieces for a large step, which otherwise stays with the process.
    """
    if _is_glibc():
        ctypes.CDLL(None).malloc_trim(0)


def _is_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"
