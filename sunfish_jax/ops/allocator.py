"""Keeping freed memory, so that a large array does not cost its page faults at every step."""

import ctypes

# Parameters of glibc's mallopt(3).
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_MAX = -4
_M_ARENA_MAX = -8

_INT_MAX = 2**31 - 1


def keep_freed_memory() -> bool:
    """Tells glibc's allocator to keep freed memory for the next allocation.

    XLA:CPU allocates its temporaries anew at every execution. By default glibc takes each large one from the
    kernel and gives it back, and faulting the pages in again costs several times the arithmetic done on them.
    One heap that never shrinks removes that. Call it before JAX starts its threads.

    Returns:
      Whether the allocator took the settings; False where the C library is not glibc, and nothing changes.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    settings = (
        (_M_ARENA_MAX, 1),
        (_M_MMAP_MAX, 0),
        (_M_TRIM_THRESHOLD, _INT_MAX),
        (_M_TOP_PAD, 64 * 2**20),
    )
    return all([mallopt(parameter, value) == 1 for parameter, value in settings])
