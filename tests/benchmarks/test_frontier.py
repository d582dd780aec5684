import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import frontier_points
import pytest
from ml_collections import ConfigDict

from sunfish_jax.errors import UserError

ROOT = Path(__file__).parents[2]


def run(program, *arguments, folder):
    return subprocess.run(
        [sys.executable, str(ROOT / program), *arguments], capture_output=True, text=True, cwd=folder, check=False
    )


def test_the_chart_is_drawn(tmp_path):
    import matplotlib.pyplot as plt

    real = {"perplexity": 20.0, "entropy_within_text": 5.0}
    points = [
        {"kind": kind, "label": "1", "perplexity": 20.0 * ratio, "entropy_within_text": 5.0 + more, "real": real}
        for kind, ratio, more in (
            ("temperature", 4.0, -0.5),
            ("temperature", 8.0, 0.25),
            ("twin, 30 min", 2.0, 0.0),
        )
    ]
    frontier_points.draw(points, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
    (axes,) = plt.gcf().axes
    drawn = {line.get_label(): (line.get_xdata().tolist(), line.get_ydata().tolist()) for line in axes.lines}
    plt.close()
    assert drawn["temperature"] == ([-0.5, 0.25], [4.0, 8.0])
    assert drawn["twin, 30 min"] == ([0.0], [2.0])
    assert drawn["real text"] == ([0], [1])


@pytest.mark.slow
def test_settings_and_another_run_are_measured_for_the_same_prompts(tmp_path, animals):
    nano = f"--config={ROOT}/configs/nano.py"
    for program, *arguments in (
        ("main.py", "--workdir=run", "--config.train.num_steps=3"),
        ("benchmarks/ar_twin.py", "--workdir=twin", "--minutes=0.02", "--eval_samples=0"),
    ):
        trained = run(program, nano, *animals, *arguments, folder=tmp_path)
        assert trained.returncode == 0, trained.stderr
    arguments = (
        "--workdir=run",
        "--num_samples=3",
        "--scheduler=ddim",
        "--num_steps=2,3",
        "--temperature=0.1,1.0",
        "--guidance_scale=1",
        "--output=chart.png",
    )
    done = run("benchmarks/frontier.py", *arguments, "--beside=twin=twin", "--beside=again=run", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    points = json.loads((tmp_path / "chart.json").read_text())
    assert [(point["kind"], point["label"]) for point in points] == [
        ("scheduler", "ddim"),
        ("num_steps", "2"),
        ("num_steps", "3"),
        ("temperature", "0.1"),
        ("temperature", "1.0"),
        ("guidance_scale", "1.0"),
        ("twin", "0.1"),
        ("twin", "1.0"),
        ("again", "0.1"),
        ("again", "1.0"),
    ]
    by_point = {(point.pop("kind"), point.pop("label")): point for point in points}
    assert all(point["real"]["mean_words"] == point["mean_words"] for point in points)
    assert all(point["real"]["mean_words"] <= point["real"]["mean_words_whole"] for point in points)
    assert all({"perplexity", "entropy_within_text"} <= point["real"].keys() & point.keys() for point in points)
    # The same run beside itself writes the same texts, and a twin at another temperature others.
    assert by_point["again", "0.1"] == by_point["temperature", "0.1"]
    assert by_point["twin", "0.1"]["entropy"] < by_point["twin", "1.0"]["entropy"]


@pytest.mark.parametrize(
    ("corpus", "block_size", "message"),
    [("another", 64, "was trained on another corpus"), ("this", 63, r"model\.block_size=63, and texts of 64")],
)
def test_a_run_that_cannot_be_compared_is_refused(tmp_path, monkeypatch, corpus, block_size, message):
    run = SimpleNamespace(config=ConfigDict({"model": {"block_size": block_size}}), data_identity=corpus)
    monkeypatch.setattr(frontier_points, "load_run", lambda workdir: run)
    with pytest.raises(UserError, match=message):
        frontier_points.open_beside(tmp_path, "this", 64)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--beside=twin", "--beside=twin: give NAME=WORKDIR"),
        ("--beside=temperature=twin", "give NAME=WORKDIR, and to each a name of its own"),
        ("--beside=twin=nowhere", "--beside=twin=nowhere: --workdir=nowhere holds no run"),
        ("--temperature=0.5,0", "--temperature=0.0"),
        ("--num_steps=0", "--num_steps=0"),
        ("--num_steps=few", "--num_steps=few"),
        ("--scheduler=ddim,euler", "--scheduler=euler"),
        ("--guidance_scale=-1", "--guidance_scale=-1.0"),
        ("--checkpoint=newest", "--checkpoint=newest"),
        ("--output=nowhere/chart.png", "there is no folder nowhere"),
        ("--output=chart.json", "--output=chart.json: give a name that ends in .png"),
        ("--workdir=elsewhere", "--workdir=elsewhere holds no run"),
    ],
)
def test_a_wrong_argument_is_one_line_and_code_2_before_anything_is_measured(tmp_path, argument, message):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text("{}")
    done = run("benchmarks/frontier.py", "--workdir=run", argument, folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
