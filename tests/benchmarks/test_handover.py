"""How near cores are said to be."""

import os

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


def test_the_median_is_said_with_its_range():
    handover = Handover()
    handover.bytes_per_second = [30e9, 2.4e9, 33e9]
    assert str(handover) == "30.0 GB/s (from 2.4 to 33.0, 3 times)"
