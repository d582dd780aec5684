import json
import math

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sunfish_jax.evaluation.report import Report


def test_each_part_is_saved_when_it_is_done_and_all_is_logged(tmp_path, capsys):
    report = Report(tmp_path, "validation", 30)
    with report.section("one") as result:
        result["held_out"] = {"held_out/mean": 2.0}
    # A stop in the second part loses nothing of the first.
    with pytest.raises(KeyboardInterrupt), report.section("two") as result:
        result["samples"] = {}
        raise KeyboardInterrupt
    saved = json.loads((tmp_path / "eval_validation.json").read_text())
    assert saved == {
        "workdir": str(tmp_path),
        "checkpoint_step": 30,
        "split": "validation",
        "held_out": {"held_out/mean": 2.0},
    }
    with report.section("two") as result:
        result["samples"] = {"real text": {"overlap_8": math.nan, "entropy": 9.5}}
    assert json.loads((tmp_path / "eval_validation.json").read_text())["samples"]["real text"]["overlap_8"] is None
    report.log()
    log = EventAccumulator(str(tmp_path / "eval_validation"))
    log.Reload()
    scalars = {tag: [(event.step, event.value) for event in log.Scalars(tag)] for tag in log.Tags()["scalars"]}
    assert scalars == {"held_out/mean": [(30, 2.0)], "samples/real text/entropy": [(30, 9.5)]}
    assert [line for line in capsys.readouterr().out.splitlines() if line.endswith("...")] == ["one ..."] + 2 * [
        "two ..."
    ]
