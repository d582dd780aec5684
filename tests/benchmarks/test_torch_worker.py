"""What the worker does without PyTorch: choosing the fastest variant, and warming up."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch_worker
from torch_worker import Choice, Worker


@dataclasses.dataclass(frozen=True)
class Variant:
    name: str
    seconds: float
    compiled: bool = False


@pytest.fixture
def run(monkeypatch):
    """Takes as long as a variant says, by a clock of its own."""
    now = [0.0]
    monkeypatch.setattr(torch_worker.time, "perf_counter", lambda: now[0])

    def run(variant: Variant) -> None:
        if variant.seconds < 0:
            raise OSError("no compiler\nwas found")
        now[0] += variant.seconds

    return run


def test_the_fastest_of_all_rounds_is_taken(run):
    choice = Choice(run, repeats=3)
    choice.among([Variant("slow", 0.03), Variant("fast", 0.01)])
    choice.among(Variant(f"slower {n}", 0.02) for n in range(2))
    assert choice.best.name == "fast"
    account = choice.account()
    assert list(account["seconds"]) == ["slow", "fast", "slower 0", "slower 1"]
    assert account["seconds"]["slow"] == pytest.approx(0.03)
    assert account["best"] == "fast"
    assert choice.fastest(choice.tried[2:]) == [Variant("slower 0", 0.02)]
    assert choice.fastest([]) == []


def test_compiling_may_fail(run):
    choice = Choice(run, repeats=1)
    choice.among([Variant("eager", 0.001), Variant("compiled", -1, compiled=True)])
    assert choice.best.name == "eager" and [variant.name for variant in choice.tried] == ["eager"]
    assert choice.account()["failed"] == {"compiled": "OSError: no compiler was found"}


def test_nothing_else_may(run):
    with pytest.raises(OSError, match="no compiler"):
        Choice(run, repeats=1).among([Variant("eager", -1)])


def test_the_first_sunfish_samples_once_more_to_warm_up():
    asked = []

    class First:
        def sample(self, *task):
            asked.append(task)
            return SimpleNamespace(numpy=lambda: np.zeros(task[:2]))

    worker = Worker()
    worker._first, worker._warm = First(), set()
    for rows in (1, 1, 2):
        worker.first_sample({}, rows=rows, length=4, num_steps=2)
    assert asked == 3 * [(1, 4, 2)] + 2 * [(2, 4, 2)]
