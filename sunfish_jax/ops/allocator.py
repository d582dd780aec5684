"""Large arrays in huge pages of memory that the process keeps."""

import contextlib
import ctypes
import os
import platform
import sys
from collections.abc import Iterator

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
# What small results of programs may take of the reserve before it has to lie elsewhere.
_ROOM_FOR_RESULTS = 64 * 2**20


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


def _is_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"


class Reserve:
    """A place in the heap for the temporaries of programs, kept from everything else while none of them runs.

    One small block in the middle of it, and the next execution would take as much memory again beside it. Off
    glibc nothing is reserved.
    """

    def __init__(self):
        self._size, self._block = 0, None
        self._libc = ctypes.CDLL(None) if _is_glibc() else None
        if self._libc:
            self._libc.malloc.restype, self._libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
            self._libc.free.restype, self._libc.free.argtypes = None, [ctypes.c_void_p]

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """What the programs run within: there the place is free for them to take."""
        self._free()
        try:
            yield
        finally:
            self._allocate(self._size)

    def enlarge(self, size: int) -> None:
        """Makes it at least `size` bytes large; they become resident when a program first writes to them."""
        if size > self._size:
            self._free()
            self._size = size
            self._allocate(size + _ROOM_FOR_RESULTS)

    def _free(self) -> None:
        if self._libc:
            self._libc.free(self._block)
        self._block = None

    def _allocate(self, size: int) -> None:
        if self._libc and size:
            self._block = self._libc.malloc(size)


# One for the process, as its heap is.
RESERVE = Reserve()


def give_back_freed_memory() -> None:
    """Returns to the system what glibc keeps of the memory that was freed, and what lies in the reserve.

    The compiler frees half a gigabyte in small pieces for a large step, which otherwise stays with the process. Off
    glibc nothing happens.
    """
    with RESERVE.lent():
        if _is_glibc():
            ctypes.CDLL(None).malloc_trim(0)
