"""Counting steps, tokens and time, over several sittings."""

import pytest

from sunfish_jax.errors import UserError
from sunfish_jax.workdir.progress import Progress, format_seconds, load_totals, save_totals


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def test_time_left_counts_evaluation_but_not_compiling():
    clock = Clock()
    progress = Progress(num_steps=100, step=40, clock=clock)  # resumed at 40
    clock.now += 30.0
    progress.add_compiling(30.0)
    for _ in range(10):
        clock.now += 2.0
        progress.add_step(seconds=2.0, real_tokens=500)
    assert progress.seconds_left() == pytest.approx(50 * 2.0)
    clock.now += 10.0  # an evaluation: half as much again as the steps took
    assert progress.seconds_left() == pytest.approx(50 * 3.0)


def test_tokens_per_second_are_those_since_the_last_line():
    progress = Progress(num_steps=10, clock=Clock())
    progress.add_step(seconds=1.0, real_tokens=100)
    assert progress.tokens_per_second() == pytest.approx(100)
    progress.add_step(seconds=1.0, real_tokens=300)
    progress.add_step(seconds=3.0, real_tokens=300)
    assert progress.tokens_per_second() == pytest.approx(150)


def test_line_says_step_loss_speed_and_time_left():
    clock = Clock()
    progress = Progress(num_steps=2000, clock=clock)
    clock.now += 4.0
    progress.add_step(seconds=4.0, real_tokens=8000)
    line = progress.line(loss=6.53219, tokens_per_second=progress.tokens_per_second())
    assert line == "step    1/2000  loss 6.5322  2,000 tokens/s  2h 13m left"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.4, "59s"), (59.6, "1m 0s"), (3599, "59m 59s"), (3600, "1h 0m"), (360_000, "4d 4h")],
)
def test_format_seconds(seconds, text):
    assert format_seconds(seconds) == text


def test_totals_go_on_from_the_checkpoint_they_were_saved_with(tmp_path):
    progress = Progress(num_steps=10)
    for step in (1, 2, 3):
        progress.add_step(seconds=1.5, real_tokens=10)
        if step != 2:
            save_totals(tmp_path, progress)
    resumed = load_totals(tmp_path, step=1, num_steps=10)
    assert (resumed.step, resumed.seconds, resumed.real_tokens) == (1, 1.5, 10)
    resumed.add_step(seconds=2.0, real_tokens=20)
    save_totals(tmp_path, resumed)  # what was counted for step 3 belongs to a run that is no more
    assert load_totals(tmp_path, step=3, num_steps=10).seconds == 0
    assert load_totals(tmp_path, step=2, num_steps=10).real_tokens == 30
    assert load_totals(tmp_path / "new", step=0, num_steps=10).seconds == 0


@pytest.mark.parametrize("text", ["{", "[]", "null", '{"1": 2}', '{"1": {"seconds": 2}}'])
def test_damaged_totals_are_one_line(tmp_path, text):
    (tmp_path / "progress.json").write_text(text)
    with pytest.raises(UserError, match=r"progress.json is damaged"):
        load_totals(tmp_path, step=1, num_steps=10)
