import subprocess
import sys

import pytest

from sunfish_jax.errors import UserError
from sunfish_jax.workdir.alone import alone_in

pytest.importorskip("fcntl")

HOLDING = """
import sys
from pathlib import Path
from sunfish_jax.workdir.alone import alone_in
with alone_in(Path(sys.argv[1])):
    print("in", flush=True)
    sys.stdin.read()
"""


def test_one_process_at_a_time_and_its_end_is_enough(tmp_path):
    command = [sys.executable, "-c", HOLDING, str(tmp_path)]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "in\n"
    with pytest.raises(UserError, match=r"another training is running in --workdir="), alone_in(tmp_path):
        pass
    other.kill()
    other.communicate()
    for _ in range(2):
        with alone_in(tmp_path):
            assert list(tmp_path.iterdir()) == []
