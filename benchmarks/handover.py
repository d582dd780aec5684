"""How fast a core works on what another has just written."""

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

# As many as the residual stream of a pass of `micro` has.
_NUMBERS = 2**19
_ROUNDS = 20


class Handover:
    """The rate at which two cores read each other's results: of the slowest of the first core's pairs.

    Cores that share a cache hand over at tens of gigabytes a second, others at a few. XLA divides a loop between
    all cores, and which part a core takes is chance, so that half of what a loop reads was written by another core.
    In a virtual machine the host may move a core to where it shares no cache with the others, and back.

    Attributes:
      bytes_per_second: of each time; none where there is one core, or threads cannot be kept on one.
    """

    def __init__(self):
        self.bytes_per_second: list[float] = []

    def measure(self) -> None:
        """Measures it once more, which takes some milliseconds a core."""
        if hasattr(os, "sched_setaffinity") and len(os.sched_getaffinity(0)) > 1:
            first, *others = sorted(os.sched_getaffinity(0))
            with _on_core(first) as on_first:
                self.bytes_per_second.append(min(_handover(on_first, core) for core in others))

    def __str__(self) -> str:
        """The median, and what it was taken of."""
        if not self.bytes_per_second:
            return "not measured"
        rates = [rate / 1e9 for rate in self.bytes_per_second]
        return (
            f"{statistics.median(rates):.1f} GB/s (from {min(rates):.1f} to {max(rates):.1f}, {len(rates)} times)"
        )


def _handover(on_first: Callable[..., Future], core: int) -> float:
    """Bytes per second that a core reads of what the other wrote, by the median time."""
    arrays = np.ones((2, 2, _NUMBERS // 2), np.float32)

    def timed(source: np.ndarray, target: np.ndarray) -> float:
        start = time.perf_counter()
        np.negative(source, out=target)
        return time.perf_counter() - start

    seconds = []
    with _on_core(core) as on_other:
        for number in range(_ROUNDS):
            source, target = arrays[number % 2], arrays[(number + 1) % 2]
            # The halves change hands in every round.
            halves = (number % 2, (number + 1) % 2)
            working = [
                on_core(timed, source[half], target[half])
                for on_core, half in zip((on_first, on_other), halves, strict=True)
            ]
            seconds += [work.result() for work in working]
    return arrays[0, 0].nbytes / statistics.median(seconds)


@contextlib.contextmanager
def _on_core(core: int) -> Iterator[Callable[..., Future]]:
    """What calls a function in a thread that stays on one core."""
    with ThreadPoolExecutor(1, initializer=lambda: os.sched_setaffinity(0, {core})) as thread:
        yield thread.submit
