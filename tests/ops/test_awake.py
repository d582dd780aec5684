import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sunfish_jax.ops import awake
from sunfish_jax.ops.awake import awake_cores, is_worthwhile

linux = pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="Linux has this scheduling policy")


def spinning_threads() -> list[int]:
    """The system's numbers of those there are."""
    return [thread.native_id for thread in threading.enumerate() if thread.name.startswith("awake-core")]


def wait_until(happened: Callable[[], bool]) -> None:
    """Fails if it does not happen in a minute."""
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def processor_seconds(thread: int) -> float:
    fields = Path(f"/proc/self/task/{thread}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) / os.sysconf("SC_CLK_TCK")


@pytest.fixture
def virtual_machine(monkeypatch):
    monkeypatch.setattr(awake, "is_worthwhile", lambda: True)


@linux
def test_a_thread_spins_on_each_core_where_no_other_wants_to(virtual_machine):
    cores = os.sched_getaffinity(0)
    with awake_cores():
        threads = spinning_threads()
        wait_until(lambda: all(os.sched_getscheduler(thread) == os.SCHED_IDLE for thread in threads))
        assert sorted(map(sorted, map(os.sched_getaffinity, threads))) == [[core] for core in sorted(cores)]
        wait_until(lambda: min(map(processor_seconds, threads)) > 0)
    assert not spinning_threads()


@linux
def test_an_error_ends_the_threads(virtual_machine):
    with pytest.raises(KeyError), awake_cores():
        raise KeyError
    assert not spinning_threads()


@linux
def test_where_the_priority_cannot_be_lowered_nothing_spins(virtual_machine, monkeypatch):
    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    with awake_cores():
        wait_until(lambda: not spinning_threads())


@linux
@pytest.mark.parametrize(
    ("cpu_info", "quotas", "expected"),
    [
        ("flags : fpu hypervisor lahf_lm", {}, True),
        ("flags : fpu hypervisor lahf_lm", {"cpu.max": "max 100000", "quota": "-1"}, True),
        ("flags : fpu hypervisor lahf_lm", {"cpu.max": "200000 100000"}, False),
        ("flags : fpu hypervisor lahf_lm", {"quota": "200000"}, False),
        ("flags : fpu lahf_lm", {}, False),
        (None, {}, False),
    ],
)
def test_only_a_virtual_machine_without_a_quota_is_kept_awake(tmp_path, cpu_info, quotas, expected):
    if cpu_info is not None:
        (tmp_path / "cpuinfo").write_text(cpu_info)
    for name, content in quotas.items():
        (tmp_path / name).write_text(content + "\n")
    places = ((tmp_path / "cpu.max", "max"), (tmp_path / "quota", "-1"))
    assert is_worthwhile(tmp_path / "cpuinfo", places) == expected


@linux
def test_elsewhere_nothing_happens(monkeypatch):
    monkeypatch.setattr(awake, "is_worthwhile", lambda: False)
    with awake_cores():
        assert not spinning_threads()
