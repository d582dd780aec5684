"""How near cores are said to be."""

import contextlib
import os

import handover as module
import pytest
from handover import Handover


def test_without_other_cores_nothing_is_said(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    handover = Handover()
    handover.measure()
    assert handover.bytes_per_second == [] and str(handover) == "not measured"


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="needs two cores to choose from",
)
def test_what_cores_hand_over_is_read_at_a_rate_that_memory_has():
    before = os.sched_getaffinity(0)
    handover = Handover()
    handover.measure()
    # No core reads slower than a disk, nor faster than its first-level cache.
    assert 1e8 < handover.bytes_per_second[0] < 1e12
    assert os.sched_getaffinity(0) == before


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="needs two cores to choose from",
)
def test_each_core_reads_what_the_other_wrote_last(monkeypatch):
    first, other = sorted(os.sched_getaffinity(0))[:2]
    worked = []

    def negative(source, out):
        # Of this thread alone.
        worked.append((os.sched_getaffinity(0), source.ctypes.data, out.ctypes.data))
        out[:] = -source

    monkeypatch.setattr(module.np, "negative", negative)
    monkeypatch.setattr(module, "_NUMBERS", 64)
    with module._on_core(first) as on_first:
        module._handover(on_first, other)
    assert len(worked) == 2 * module._ROUNDS
    written_by = {}
    for number in range(0, len(worked), 2):
        for cores, source, _ in worked[number : number + 2]:
            assert written_by.get(source) in (None, {first, other} - cores)
        written_by |= {target: cores for cores, _, target in worked[number : number + 2]}
    assert len(written_by) == 4


def test_the_slowest_pair_counts(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {4, 5, 6}, raising=False)
    monkeypatch.setattr(module, "_on_core", contextlib.nullcontext)
    monkeypatch.setattr(module, "_handover", lambda first, core: {(4, 5): 30e9, (4, 6): 2e9}[first, core])
    handover = Handover()
    handover.measure()
    assert handover.bytes_per_second == [2e9]


def test_the_median_is_said_with_its_range():
    handover = Handover()
    handover.bytes_per_second = [30e9, 2.4e9, 33e9]
    assert str(handover) == "30.0 GB/s (from 2.4 to 33.0, 3 times)"
