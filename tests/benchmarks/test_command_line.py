"""The command lines of the benchmarks."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NANO = f"--config={ROOT}/configs/nano.py"


def benchmark(name: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / f"benchmarks/{name}.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("train_step", ["--config:", "--compare", "--torch_python:", "--repeats:", "ratio_first_sunfish"]),
        ("sampling", ["--config:", "--workdir:", "--compare", "--torch_python:", "--repeats:"]),
        ("memory", ["--config:", "--devices:"]),
        ("held_out_curve", ["--workdir:", "--output:"]),
        ("growth", ["--config:", "--output:", "--repeats:"]),
        ("frontier", ["--workdir:", "--temperature:", "--scheduler:", "--beside:"]),
        ("samples_page", ["JSONL"]),
    ],
)
def test_help_is_quick(tmp_path, name, words):
    command = [sys.executable, "-X", "importtime", str(ROOT / f"benchmarks/{name}.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for word in words:
        assert word in done.stdout
    assert all(line.startswith("import time:") for line in done.stderr.splitlines())
    imported = re.findall(r"\| +([\w.]+)$", done.stderr, re.MULTILINE)
    assert "pathlib" in imported
    heavy = ("jax", "flax", "orbax", "transformers", "tensorflow", "torch", "numpy", "matplotlib")
    assert not [name for name in imported if name.split(".")[0] in heavy]


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("train_step", [], ["--config is missing"]),
        ("train_step", [NANO, "fast"], ["'fast' is not a flag"]),
        ("train_step", [NANO, "--repeets=3"], ["repeets", "repeats"]),
        ("train_step", [NANO, "--repeats=0"], ["repeats"]),
        ("train_step", [NANO, "--config.model.widht=3"], ["widht"]),
        ("train_step", ["--config=nowhere.py"], ["--config=nowhere.py", "no such file"]),
        ("train_step", [NANO, "--torch_python=python"], ["--torch_python", "without --compare"]),
        ("train_step", [NANO, "--compare", "--torch_python=nowhere"], ["--torch_python=nowhere is no program"]),
        ("train_step", [NANO, "--peers=flax"], ["--peers=flax is none of plain_flax, torch_twin, first_sunfish"]),
        ("train_step", [NANO, "--peers=torch_twin"], ["--peers=torch_twin is PyTorch, which needs --compare"]),
        ("sampling", [], ["--config is missing"]),
        ("sampling", [NANO, "--workdir=runs"], ["both"]),
        ("sampling", ["--workdir=nowhere"], ["--workdir=nowhere", "no run"]),
        ("sampling", [NANO, "--config.model.num_heads=7"], ["num_heads=7"]),
        ("memory", [], ["--config is missing"]),
        ("held_out_curve", ["--workdir=nowhere"], ["--workdir=nowhere", "no TensorBoard log"]),
        ("growth", [], ["--config is missing"]),
        ("growth", [NANO, "--config.model.width=32"], ["--config.KEY=VALUE means nothing here"]),
        ("frontier", ["--workdir=nowhere"], ["--workdir=nowhere", "no run"]),
        ("samples_page", [], ["no file is named"]),
        ("samples_page", ["nowhere.jsonl"], ["nowhere.jsonl cannot be read"]),
        ("samples_page", ["/dev/null"], ["/dev/null is empty"]),
        ("samples_page", [str(ROOT / "LICENSE")], ["no line of JSON", "MIT"]),
    ],
)
def test_wrong_arguments_are_one_line_and_code_2(tmp_path, name, arguments, words):
    done = benchmark(name, *arguments, folder=tmp_path)
    assert done.returncode == 2, done
    assert done.stdout == "" and re.fullmatch(r"error: .+\n", done.stderr), done
    for word in words:
        assert word in done.stderr, done
    assert not list(tmp_path.iterdir())


def test_a_python_without_pytorch_is_one_line_and_code_2(tmp_path):
    # This is no Python at all, which the parser cannot tell.
    done = benchmark("sampling", NANO, "--compare", "--torch_python=true", folder=tmp_path)
    assert done.returncode == 2, done
    assert done.stderr.startswith("error: true ended while it was asked to start")


def test_the_worker_imports_nothing_of_jax():
    code = (
        "import sys; sys.argv = ['']; import torch_worker; heavy = ('jax', 'sunfish', 'torch.', 'numpy'); "
        "print([name for name in sys.modules if name.startswith(heavy)], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT / "benchmarks", check=True
    )
    assert done.stderr.strip().endswith("[]")
