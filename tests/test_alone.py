import subprocess
import sys

import pytest

from sunfish_jax.alone import LOCK_FILE, alone_in

pytest.importorskip("fcntl")

HOLDING = """
import sys
from pathlib import Path
from sunfish_jax.alone import alone_in
with alone_in(Path(sys.argv[1]), None) as alone:
    print(alone, flush=True)
    sys.stdin.readline()
    print("out", flush=True)
"""


@pytest.fixture
def other(tmp_path):
    command = [sys.executable, "-c", HOLDING, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "True\n"
        yield other
        other.kill()


def refuse():
    raise PermissionError("another is there")


def test_one_process_at_a_time_and_its_end_is_enough(other, tmp_path):
    with pytest.raises(PermissionError, match="another is there"), alone_in(tmp_path, refuse):
        pass
    other.kill()
    other.communicate()
    for _ in range(2):
        with alone_in(tmp_path, refuse) as alone:
            assert alone
            assert list(tmp_path.iterdir()) == [tmp_path / LOCK_FILE]


def test_a_process_that_is_not_refused_is_let_in_when_the_other_is_out(other, tmp_path):
    with alone_in(tmp_path, lambda: print("go", file=other.stdin, flush=True)) as alone:
        assert alone
        assert other.stdout.readline() == "out\n"
