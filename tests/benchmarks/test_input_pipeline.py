import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import input_rates
import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


def test_the_rate_of_batches_counts_real_tokens_in_the_time_they_take(monkeypatch):
    def batches(source, first, end):
        for _ in range(first, end):
            yield SimpleNamespace(padding_mask=np.arange(8) < 5)

    monkeypatch.setattr(input_rates, "batch_iterator", batches)
    clock = iter((10.0, 12.5))
    monkeypatch.setattr(input_rates.time, "perf_counter", lambda: next(clock))
    assert input_rates.batch_rate(None, 10) == pytest.approx(50 / 2.5)


def test_input_pipeline_prints_ratios(tmp_path):
    lines = [json.dumps({"text": f"word {number} " * 12, "prompt": f"number {number}"}) for number in range(400)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    command = [sys.executable, str(ROOT / "benchmarks/input_pipeline.py"), f"--config={ROOT}/configs/nano.py"]
    command += ["--config.data.source=corpus.jsonl", "--config.tokenizer.vocab_size=300", "--batches=3"]
    # What is quick to compile.
    command += ["--config.data.num_buckets=1", "--config.optimizer.name=adamw"]
    command += ["--config.model.num_layers=1", "--config.model.conv_width=0"]
    command += ["--config.diffusion.self_conditioning_every=0"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["config"] == "nano"
    assert min(value for key, value in result.items() if key != "config") > 0


def test_a_wrong_command_line_is_one_line():
    command = [sys.executable, str(ROOT / "benchmarks/input_pipeline.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --config is missing") and done.stderr.count("\n") == 1
