import json
import runpy
import subprocess
import sys
from pathlib import Path

import growth_curves
import pytest

ROOT = Path(__file__).parents[2]
CONFIG = runpy.run_path(str(ROOT / "configs/nano.py"))["get_config"]()


def test_one_thing_is_varied_at_a_time():
    points = growth_curves.training_points(CONFIG)
    of = {name: list(group.values()) for name, group in points.items()}
    # A point whose value is the ordinary one is the same in every group, and so measured once.
    base = points["rows"][growth_curves._POSITIONS // 128]
    assert base in [{**point, "length": 128, "rows": base["rows"]} for point in of["row length"]]
    for name, key in (("rows", "rows"), ("host devices", "devices"), ("cores", "cores")):
        assert [{**point, key: None} for point in of[name]] == [{**base, key: None}] * len(of[name])
    assert all(point["rows"] * point["length"] == growth_curves._POSITIONS for point in of["row length"])
    assert [point["overrides"]["model.width"] for point in of["width"]] == list(points["width"])


def test_equal_points_are_measured_once_and_failures_left_out(monkeypatch):
    asked = []

    def measure(point, config, repeats):
        asked.append(point)
        return None if point["rows"] == 4 else {"seconds": 0.5, "memory": 10**9}

    monkeypatch.setattr(growth_curves, "measure", measure)
    point = {"task": "sample", "length": 8, "rows": 2}
    results = growth_curves.run_all(
        {"texts": {2: point, 4: {**point, "rows": 4}}, "length": {8: point}}, Path("nano.py"), 1
    )
    assert len(asked) == 2
    assert [(result["varied"], result["value"]) for result in results] == [("texts", 2), ("length", 8)]
    assert results[0]["tokens_per_s"] == 2 * 8 / 0.5


def test_the_chart_is_drawn(tmp_path):
    result = {"varied": "rows", "value": 1, "seconds": 0.5, "memory": 10**9, "tokens_per_s": 100.0}
    growth_curves.draw([{"task": "train", **result}, {"task": "sample", **result}], tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("task", ["train", "sample"])
def test_a_point_is_measured_in_a_process_of_its_own(task):
    point = {
        "task": task,
        "config": str(ROOT / "configs/nano.py"),
        "overrides": {"train.accumulate_steps": 1},
        "rows": 2,
        "length": 32,
        "devices": 1,
        "cores": 1,
        "num_steps": 2,
        "repeats": 2,
    }
    command = [sys.executable, str(ROOT / "benchmarks/growth_point.py"), json.dumps(point)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["seconds"] > 0
    assert 10**8 < figures["memory"] < 10**10
