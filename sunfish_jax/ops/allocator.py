"""Large arrays in huge pages, and freed memory given back."""

import ctypes
import os
import platform
import sys

_VARIABLE = "GLIBC_TUNABLES"
_TUNABLE = "glibc.malloc.hugetlb"


def restart_with_huge_pages() -> None:
    """Starts the process anew with glibc's allocator asking for huge pages, unless it runs with them already.

    XLA:CPU allocates its temporaries anew at every execution, and faulting them in by pages of 4 kB took a seventh
    of a training step. glibc reads the setting only at the start of a process. Call it before anything is done that
    must not be done twice. Off glibc nothing happens.
    """
    tunables = os.environ.get(_VARIABLE, "")
    if not _is_glibc() or _TUNABLE in tunables:
        return
    os.environ[_VARIABLE] = f"{tunables}:{_TUNABLE}=1".removeprefix(":")
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
