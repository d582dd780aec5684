import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gradient_sums import ALL_KERNELS, OTHERS, GradientSums

ROOT = Path(__file__).parents[2]


def test_errors_are_those_of_a_float64_loop():
    rng = np.random.default_rng(0)
    exact = (0.5 * rng.standard_normal((6, 2, 5, 4)) + np.eye(5, 4)).astype(np.float32)
    given = exact + 0.1 * rng.standard_normal(exact.shape).astype(np.float32)
    sums = GradientSums()
    for true, other in zip(exact, given, strict=True):
        sums.add(_layers(true), _layers(other))
    of = sums.comparisons()["query_kernel"]

    e, g = exact.astype(np.float64).reshape(6, -1), given.astype(np.float64).reshape(6, -1)
    assert of.one_batch == pytest.approx(np.sqrt(np.square(g - e).sum() / np.square(e).sum()), rel=1e-5)
    size = np.linalg.norm(e.mean(0))
    assert of.mean == pytest.approx(np.linalg.norm(g.mean(0) - e.mean(0)) / size, rel=1e-5)
    assert of.chance == pytest.approx(np.linalg.norm(e[::2].mean(0) - e[1::2].mean(0)) / 2 / size, rel=1e-5)
    directions = [[_orthogonal(mean) for mean in of_all] for of_all in (exact.mean(0), given.mean(0))]
    assert of.direction == pytest.approx(_cosine(*directions), abs=0.05)
    halves = [[_orthogonal(mean) for mean in exact[half::2].mean(0)] for half in range(2)]
    assert of.direction_chance == pytest.approx(_cosine(*halves), abs=0.05)


def test_an_error_alike_in_all_batches_stays_in_the_mean_and_turns_the_direction():
    rng = np.random.default_rng(0)
    angle = 0.3
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    sums = GradientSums()
    for exact in rng.standard_normal((4, 2, 2)) * 0.1 + np.eye(2):
        sums.add({"head": {"kernel": exact}}, {"head": {"kernel": turn @ exact}})
    of = sums.comparisons()[ALL_KERNELS]
    # |R X - X| = 2 sin(angle / 2) |X| for a turn R, whatever X is.
    assert of.one_batch == pytest.approx(2 * np.sin(angle / 2), rel=1e-5)
    assert of.mean == pytest.approx(2 * np.sin(angle / 2), rel=1e-5)
    assert of.direction == pytest.approx(np.cos(angle), rel=1e-4)


def test_only_matrices_that_features_are_multiplied_with_have_a_direction():
    sums = GradientSums()
    gradient = {"mlp": {"kernel_in": np.eye(3), "bias_in": np.ones(3)}, "embedding": np.ones((4, 3))}
    for _ in range(2):
        sums.add(gradient, gradient)
    comparisons = sums.comparisons()
    assert list(comparisons) == ["kernel_in", ALL_KERNELS, OTHERS]
    assert comparisons[ALL_KERNELS].direction == pytest.approx(1.0)
    assert comparisons[OTHERS].direction is None and comparisons[OTHERS].one_batch == 0


@pytest.mark.slow
def test_int8_is_further_off_than_bfloat16_and_both_are_near(tmp_path, animals):
    command = [sys.executable, str(ROOT / "main.py"), f"--config={ROOT}/configs/nano.py", "--workdir=run", *animals]
    subprocess.run([*command, "--config.train.num_steps=4"], cwd=tmp_path, check=True)
    done = _run("--workdir=run", "--batches=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    bfloat16, int8 = (
        float(line.removeprefix(f"{ALL_KERNELS:>18}").split()[0])
        for line in done.stdout.splitlines()
        if line.startswith(f"{ALL_KERNELS:>18}")
    )
    assert 1e-4 < bfloat16 < int8 < 0.2


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--batches=3", "error: --batches=3 has no halves to compare: give an even number"),
        ("--checkpoint=newest", "error: --checkpoint=newest: give latest, best or the number of a step"),
        ("--workdir=nowhere", "error: --workdir=nowhere"),
    ],
)
def test_a_wrong_command_line_is_one_line(tmp_path, flag, message):
    done = _run(flag, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(message) and done.stderr.count("\n") == 1


def _run(*flags: str, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "benchmarks/gradient_error.py"), *flags]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def _layers(matrices: np.ndarray) -> dict:
    return {f"layers_{i}": {"query_kernel": matrix} for i, matrix in enumerate(matrices)}


def _orthogonal(matrix: np.ndarray) -> np.ndarray:
    u, _, v = np.linalg.svd(matrix, full_matrices=False)
    return u @ v


def _cosine(some: list[np.ndarray], others: list[np.ndarray]) -> float:
    a, b = np.concatenate([np.ravel(m) for m in some]), np.concatenate([np.ravel(m) for m in others])
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)
