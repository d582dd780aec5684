"""What a process sets up before JAX and other libraries start."""

import contextlib
import gc
import os
import signal
import threading

from sunfish_jax.cache import cache_folder
from sunfish_jax.ops.allocator import restart_with_huge_pages
from sunfish_jax.unfinished import remove_unfinished


def prepare_process(num_cpu_devices: int = 1) -> None:
    """Prepares memory, libraries and devices. Call it once, before anything computes: the process may start anew.

    Args:
        num_cpu_devices: host devices that a CPU is presented as.
    """
    restart_with_huge_pages()
    # Imports and tracing make objects that stay. To look through all of them for cycles each time they had grown
    # by a quarter was a tenth of the processor time of a start.
    gc.set_threshold(10_000, 10, 100)
    # Nothing here needs PyTorch, so its absence is no news.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import jax

    # Compiled steps are kept from run to run: a later start is shorter by half a minute a program.
    if jax.config.jax_compilation_cache_dir is None:
        # What is compiled is divided among the cores there are, and JAX's keys do not tell their number.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / f"jax-{cores}-cores"))
    jax.config.update("jax_num_cpu_devices", num_cpu_devices)


def end_on_interrupt() -> None:
    """Makes Ctrl-C and SIGTERM end the process at once with one line and code 130 or 143, nothing unfinished left.

    So does a closed terminal, with code 129, unless it is to be ignored (`nohup`).

    The main thread may be inside compiled code for minutes, where Python runs no signal handler, or inside an
    import, which would turn an exception into another. So a thread of its own reads the signals, from the pipe
    into which Python's C handler writes their numbers. Training replaces it while it has work to save.
    """
    numbers = [signal.SIGINT, signal.SIGTERM]
    # Windows has none.
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)

    def watch() -> None:
        while number := os.read(read_end, 1):
            if number[0] in numbers:
                remove_unfinished()
                with contextlib.suppress(OSError):  # Of a terminal that is no more.
                    os.write(2, b"interrupted\n")
                os._exit(128 + number[0])

    threading.Thread(target=watch, daemon=True).start()
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    for number in numbers:
        signal.signal(number, lambda *_: None)
