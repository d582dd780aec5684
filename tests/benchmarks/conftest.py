import importlib.util
import itertools
import json
import os
import sys
from pathlib import Path

import pytest

# Benchmarks are scripts and import their neighbours by name.
sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))


@pytest.fixture(scope="module")
def torch_python() -> str:
    """A Python that has PyTorch: what TORCH_PYTHON names, or this one."""
    python = os.environ.get("TORCH_PYTHON") or sys.executable
    if python == sys.executable and importlib.util.find_spec("torch") is None:
        pytest.skip("no PyTorch: install the extra `bench`, or set TORCH_PYTHON to a Python that has it")
    return python


@pytest.fixture(scope="module")
def torch(torch_python):
    """A PyTorch process."""
    from torch_process import TorchProcess

    with TorchProcess(torch_python) as process:
        process.call("start", threads=1)
        yield process


@pytest.fixture
def animals(tmp_path) -> list[str]:
    """Arguments for a run of seconds on a small corpus with prompts, corpus.jsonl in `tmp_path`."""
    sizes = ("very small", "rather large", "surprisingly old", "young", "quick", "quiet")
    with (tmp_path / "corpus.jsonl").open("w") as file:
        for size, animal, deed in itertools.product(sizes, ("whale", "camel", "owl"), ("sleeps", "eats", "hides")):
            for time in ("at night", "in spring", "by day", "at dawn"):
                text = f"The {size} {animal} {deed} {time}."
                print(json.dumps({"text": text, "prompt": f"Write about a {animal}"}), file=file)
    return [
        "--config.data.source=corpus.jsonl",
        "--config.tokenizer.vocab_size=320",
        "--config.prompt_encoder.name=transformer",
        "--config.train.batch_size=4",
    ]


@pytest.fixture
def fake_torch(tmp_path):
    """Makes a process that answers each call with what is given here for it, or for its case, not PyTorch."""
    from torch_process import TorchProcess

    processes = []

    def make(**answers):
        worker = tmp_path / "worker.py"
        worker.write_text(FAKE_WORKER.format(answers=answers))
        processes.append(TorchProcess(sys.executable, worker))
        return processes[-1]

    yield make
    for process in processes:
        process.close()


FAKE_WORKER = """
import json, sys
answers = {answers}
for line in sys.stdin:
    request = json.loads(line)
    result = answers[request["call"]]
    result = result.get(request["arguments"].get("case"), result)
    print(json.dumps({{"result": result, "arrays": None}}), flush=True)
"""
