"""The measurement behind growth.py."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from ml_collections import ConfigDict

# Forward passes in a step: more would only take longer to measure.
_ACCUMULATE = 2
_POSITIONS = 1024


def training_points(config: ConfigDict) -> dict[str, dict[int, dict]]:
    """By what is varied and its value, the point to measure."""
    cores = len(os.sched_getaffinity(0))
    powers = [2**i for i in range(cores.bit_length())]
    base = {
        "task": "train",
        "rows": _POSITIONS // 128,
        "length": 128,
        "devices": 1,
        "overrides": {"train.accumulate_steps": _ACCUMULATE},
    }

    def override(**changes):
        return {**base, "overrides": base["overrides"] | changes}

    lengths = [length for length in (32, 64, 128, 256, 512) if length <= config.model.block_size]
    return {
        "rows": {rows: {**base, "rows": rows} for rows in (1, 2, 4, 8, 16, 32)},
        "row length": {length: {**base, "length": length, "rows": _POSITIONS // length} for length in lengths},
        "width": {
            width: override(**{"model.width": width})
            for width in (128, 256, 512, 1024)
            if width % config.model.num_heads == 0
        },
        "host devices": {devices: {**base, "devices": devices} for devices in powers},
        "cores": {count: {**base, "cores": count} for count in powers},
        "rematerialised": {int(remat): override(**{"model.remat": remat}) for remat in (False, True)},
    }


def sampling_points(config: ConfigDict) -> dict[str, dict[int, dict]]:
    """As `training_points`."""
    base = {"task": "sample", "rows": 1, "length": 128, "num_steps": 20, "devices": 1, "overrides": {}}
    lengths = [length for length in (32, 64, 128, 256, 512) if length <= config.model.block_size]
    return {
        "steps": {steps: {**base, "num_steps": steps} for steps in (10, 20, 40, 80)},
        "length": {length: {**base, "length": length} for length in lengths},
        "texts": {texts: {**base, "rows": texts} for texts in (1, 2, 4, 8, 16, 32)},
    }


def measure(point: dict, config: Path, repeats: int) -> dict[str, float] | None:
    """Runs growth_point.py; None, with a line that says why, where it did not end well."""
    asked = {**point, "config": str(config.absolute()), "repeats": repeats}
    process = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("growth_point.py")), json.dumps(asked)],
        capture_output=True,
        text=True,
    )
    if process.returncode:
        last = (process.stderr.strip().splitlines() or ["no message"])[-1]
        print(f"  not measured: exit code {process.returncode}, {last}", flush=True)
        return None
    return json.loads(process.stdout.strip().splitlines()[-1])


def run_all(groups: Mapping[str, Mapping[int, dict]], config: Path, repeats: int) -> list[dict]:
    """Measures every point of a configuration file, a line each; one that stands in several groups only once."""
    measured: dict[str, dict | None] = {}
    results = []
    for name, points in groups.items():
        for value, point in points.items():
            key = json.dumps(point, sort_keys=True)
            if key not in measured:
                measured[key] = measure(point, config, repeats)
            if (figures := measured[key]) is None:
                continue
            tokens = point["rows"] * point["length"]
            if point["task"] == "train":
                rate = tokens * _ACCUMULATE / figures["seconds"]
                shown = f"{rate:9.0f} tokens/s   {figures['memory'] / 1e9:5.2f} GB"
            else:
                rate = tokens / figures["seconds"]
                shown = f"{figures['seconds']:9.3f} s   {rate:7.0f} tokens/s   {figures['memory'] / 1e9:5.2f} GB"
            print(f"{point['task']:>6}  {name:>15} {value:5d}  {shown}", flush=True)
            results.append({"task": point["task"], "varied": name, "value": value, "tokens_per_s": rate, **figures})
    return results


def draw(results: list[dict], path: Path) -> None:
    """A panel for each thing varied: tokens per second and memory, or seconds a sample."""
    import matplotlib.pyplot as plt

    groups = dict.fromkeys((result["task"], result["varied"]) for result in results)
    groups = [(task, varied) for task, varied in groups if varied != "rematerialised"]
    columns = 4
    figure, panels = plt.subplots(-(-len(groups) // columns), columns, figsize=(3.6 * columns, 6.4), squeeze=False)
    for panel in panels.flat[len(groups) :]:
        panel.axis("off")
    for panel, (task, varied) in zip(panels.flat, groups, strict=False):
        of = [result for result in results if (result["task"], result["varied"]) == (task, varied)]
        values = [result["value"] for result in of]
        y = "tokens_per_s" if task == "train" else "seconds"
        panel.plot(values, [result[y] for result in of], marker="o", color="tab:blue")
        panel.set(xscale="log", xlabel=varied, ylim=(0, None), title="training" if task == "train" else "a sample")
        panel.set_ylabel("tokens a second" if task == "train" else "seconds", color="tab:blue")
        panel.set_xticks(values, [str(value) for value in values])
        panel.minorticks_off()
        if task == "train":
            memory = panel.twinx()
            memory.plot(values, [result["memory"] / 1e9 for result in of], marker=".", color="tab:red", alpha=0.7)
            memory.set_ylim(0, None)
            memory.set_ylabel("GB", color="tab:red")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
