import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import input_rates
import numpy as np
import pytest

from configs import nano

ROOT = Path(__file__).parents[2]


def test_the_rate_of_batches_counts_real_tokens_in_the_time_they_take(monkeypatch):
    def batches(source, first, end):
        for _ in range(first, end):
            yield SimpleNamespace(padding_mask=np.arange(8) < 5)

    monkeypatch.setattr(input_rates, "batch_iterator", batches)
    clock = iter((10.0, 12.5))
    monkeypatch.setattr(input_rates.time, "perf_counter", lambda: next(clock))
    assert input_rates.batch_rate(None, 10) == pytest.approx(50 / 2.5)


def test_ratios_are_of_batches_with_new_and_with_known_prompts(tmp_path, monkeypatch, capsys):
    lines = [json.dumps({"text": f"word {number} " * 12, "prompt": f"number {number}"}) for number in range(400)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    config = nano.get_config()
    config.data.source = str(tmp_path / "corpus.jsonl")
    config.tokenizer.vocab_size = 300
    seen = []

    def batch_rate(source, batches):
        # The first source warms up; of the second prompts are new, and then known.
        again = source in seen
        seen.append(source)
        return 5000.0 if again else {1: 10.0, 2: 400.0}[len(seen)]

    monkeypatch.setattr(input_rates, "batch_rate", batch_rate)
    monkeypatch.setattr(input_rates, "training_rate", lambda *_: 20.0)
    input_rates.run("nano", config, tmp_path / "run", 1, 3)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert min(result.pop("tokenizer_seconds"), result.pop("tokenizing_seconds")) > 0
    assert result == {"config": "nano", "tokens_per_s": 20.0, "new_prompts_ratio": 20.0, "ratio": 250.0}


@pytest.mark.slow
def test_input_pipeline_runs_from_its_command_line(tmp_path):
    lines = [json.dumps({"text": f"word {number} " * 12, "prompt": f"number {number}"}) for number in range(400)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    command = [sys.executable, str(ROOT / "benchmarks/input_pipeline.py"), f"--config={ROOT}/configs/nano.py"]
    command += ["--config.data.source=corpus.jsonl", "--config.tokenizer.vocab_size=300", "--batches=3"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert min(value for key, value in result.items() if key != "config") > 0


def test_a_wrong_command_line_is_one_line():
    command = [sys.executable, str(ROOT / "benchmarks/input_pipeline.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --config is missing") and done.stderr.count("\n") == 1
