"""The protocol between the two processes."""

import sys

import numpy as np
import pytest
from torch_process import TorchProcess, torch_to_compare_with

from sunfish_jax.errors import UserError

# Doubles an array, says what it was asked, fails in one way and another.
WORKER = """
import json, os, sys
import numpy as np
for line in sys.stdin:
    request = json.loads(line)
    if request["call"] == "double":
        with np.load(request["arrays"]) as file:
            np.savez(request["answer"], x=2 * file["x"])
        answer = {"result": {"was": request["arguments"]}, "arrays": request["answer"]}
    elif request["call"] == "fail":
        answer = {"error": "no such thing"}
    else:
        print("first words", "last words", "", sep="\\n", file=sys.stderr, flush=True)
        os._exit(3)
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def process(tmp_path):
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    with TorchProcess(sys.executable, worker) as process:
        yield process


def test_arguments_and_arrays_go_there_and_back(process):
    for scale in (1, 3):
        x = scale * np.arange(6, dtype=np.float16).reshape(2, 3)
        result = process.call("double", {"x": x}, name="a", sizes={"width": 8})
        assert result["was"] == {"name": "a", "sizes": {"width": 8}}
        assert result["x"].dtype == np.float16
        np.testing.assert_array_equal(result["x"], 2 * x)


def test_its_error_is_a_users_and_does_not_end_it(process):
    with pytest.raises(UserError, match="PyTorch cannot fail: no such thing"):
        process.call("fail")
    assert process.call("double", {"x": np.ones(1)})["x"] == 2


def test_its_end_is_told_with_its_last_words(process):
    with pytest.raises(UserError, match="ended while it was asked to die: last words"):
        process.call("die")
    with pytest.raises(UserError, match="ended while"):
        process.call("double", {"x": np.ones(1)})


def test_a_python_that_is_none(tmp_path):
    with pytest.raises(UserError, match=r"nowhere.* cannot be run: No such file"):
        TorchProcess(str(tmp_path / "nowhere"))


def test_none_is_started_unless_wanted():
    with torch_to_compare_with(False, "nowhere") as torch:
        assert torch is None


def test_the_worker_answers_with_one_line_whatever_goes_wrong():
    with TorchProcess(sys.executable) as process:
        for _ in range(2):
            with pytest.raises(UserError, match=r"PyTorch cannot first_step: AttributeError: .*_warm") as caught:
                process.call("first_step")
            assert "\n" not in str(caught.value)
