"""Cores of a virtual machine kept from being handed back to its host."""

import contextlib
import ctypes
import os
import platform
import threading
from collections.abc import Iterator
from pathlib import Path

_CPU_INFO = Path("/proc/cpuinfo")
# What processor time a container may use, in the second and the first version of cgroups; the word for "all of it".
_QUOTAS = ((Path("/sys/fs/cgroup/cpu.max"), "max"), (Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"), "-1"))


@contextlib.contextmanager
def awake_cores() -> Iterator[None]:
    """Within its `with` block no core of this process rests, if it is a virtual machine's.

    XLA's threads wait for each other some hundred times in a forward pass. In a virtual machine a core with
    nothing to do goes back to the host, which takes a tenth of a millisecond to return it. So on each core a thread
    spins that the scheduler runs only where no other thread wants to (SCHED_IDLE).

    Nothing happens on a machine of one's own, where waking is quick and resting cores let the others run faster,
    and in a container with a quota of processor time, which spinning would use up.
    """
    if not is_worthwhile():
        yield
        return
    libc = ctypes.CDLL(None)
    lock = ctypes.c_int()
    libc.pthread_spin_init(ctypes.byref(lock), 0)
    libc.pthread_spin_lock(ctypes.byref(lock))

    def spin(core: int) -> None:
        try:
            os.sched_setaffinity(0, {core})
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        except OSError:
            return  # At any other priority it would be in the way.
        # Waiting for a lock is a loop in C, without Python's own lock; the main thread holds it to the end.
        libc.pthread_spin_lock(ctypes.byref(lock))
        libc.pthread_spin_unlock(ctypes.byref(lock))

    threads = [
        threading.Thread(target=spin, args=(core,), name=f"awake-core-{core}", daemon=True)
        for core in os.sched_getaffinity(0)
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        libc.pthread_spin_unlock(ctypes.byref(lock))
        for thread in threads:
            thread.join()


def is_worthwhile(cpu_info: Path = _CPU_INFO, quotas: tuple[tuple[Path, str], ...] = _QUOTAS) -> bool:
    """Whether this is Linux in a virtual machine, free to use all of its cores' time.

    Args:
      cpu_info: the kernel's account of the processor.
      quotas: files with a limit of processor time, and how they say that there is none.
    """
    if platform.system() != "Linux" or "hypervisor" not in _words(cpu_info):
        return False
    return all(_words(path)[:1] in ([], [unlimited]) for path, unlimited in quotas)


def _words(path: Path) -> list[str]:
    """Those of a file; none of one that is not there."""
    try:
        return path.read_text().split()
    except OSError:
        return []
