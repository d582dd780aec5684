"""What train_step.py reports of measured times."""

import json

import numpy as np
import pytest
from comparison import Course, FirstCourse, JaxSteps, Measured, PlainCourses, TwinCourses, measure, report
from encoders import FrozenEncoder
from epoch_mix import Typical
from flops import useful_flops
from ml_collections import ConfigDict

from configs import nano
from sunfish_jax.data.batches import PackedBatch
from sunfish_jax.data.padded_rows import PaddedBatch
from sunfish_jax.models.denoiser import make_model
from sunfish_jax.models.prompt import Prompt

ENCODER = FrozenEncoder(output_dim=24)


class Fixed:
    """A contender whose steps take a time for each position and one for each step."""

    def __init__(self, each=0.0, step=0.0):
        self.each, self.step, self.asked = each, step, []
        self.taken = {}

    def seconds(self, batch):
        # The first after another shape's takes longer.
        waited = not self.asked or self.asked[-1] != batch.tokens.shape or len(self.asked) % 2 == 0
        self.asked.append(batch.tokens.shape)
        self.taken[batch.tokens.shape[-1]] = "float32, eager"
        return self.each * batch.tokens.size + self.step + 9.0 * waited


class FixedFirst:
    positions = 8192

    def __init__(self, seconds):
        self.times = iter(seconds)

    def seconds(self):
        return next(self.times)


class FixedHandover:
    def __init__(self):
        self.times = 0

    def measure(self):
        self.times += 1

    def __str__(self):
        return f"{self.times} GB/s"


class FixedRate:
    flops_per_second, shape, dtype = 1e9, (1024, 512, 2048), np.dtype("float32")

    def measure(self):
        pass


@pytest.fixture(scope="module")
def config() -> ConfigDict:
    config = nano.get_config()
    config.tokenizer.vocab_size = 300
    config.train.accumulate_steps = 2
    return config


def make_mix(passes=2) -> list[Typical]:
    """Three quarters of the steps are half full, with rows of up to 16; one quarter full, with rows of up to 32."""

    def batch(packs, size, longest, real):
        positions = np.broadcast_to(np.arange(size), (passes, packs, size))
        prompt = Prompt(np.zeros((passes, packs, 2, 16, 24), np.float16), np.ones((passes, packs, 2, 16), bool))
        lengths = np.full((passes, packs, 2), real // 2, np.int32)
        tokens = np.zeros(positions.shape, np.int32)
        return PackedBatch(tokens, positions < real, positions < 0, lengths, prompt, longest)

    return [Typical(batch(4, 32, 16, 16), 16, 0.75), Typical(batch(2, 64, 32, 64), 32, 0.25)]


def make_padded(passes=2) -> list[Typical]:
    """The same text in rows of 16, half of them padding, and in full ones of 32."""

    def batch(rows, length, real):
        positions = np.broadcast_to(np.arange(length), (passes, rows, length))
        prompt = Prompt(np.zeros((passes, rows, 16, 24), np.float16), np.ones((passes, rows, 16), bool))
        return PaddedBatch(np.zeros(positions.shape, np.int32), positions < real, positions < 0, prompt)

    return [Typical(batch(8, 16, 8), 16, 0.75), Typical(batch(4, 32, 32), 32, 0.25)]


def make_measured(torch: bool) -> Measured:
    mix, short_mix, padded, short_padded = make_mix(), make_mix(passes=1), make_padded(), make_padded(passes=1)
    ours = Fixed(each=0.01)
    twin = first = None
    if torch:
        # Every second one counts.
        steps = FixedFirst(each for counted in (16.0, 90.0, 17.0, 16.5, 17.0, 60.0) for each in (99.0, counted))
        first = FirstCourse(steps, times=[], filled=0.4)
        twin = TwinCourses(Course.of(Fixed(each=0.008), mix), Course.of(Fixed(each=0.02), padded))
    plain = PlainCourses(Course.of(ours, short_mix), Course.of(Fixed(each=0.03), short_padded))
    return Measured(Course.of(ours, mix), plain, twin, first)


def measured_report(config, torch: bool, capsys) -> tuple[dict, str]:
    return reported(config, make_measured(torch), capsys)


def reported(config, measured: Measured, capsys) -> tuple[dict, str]:
    handover, model = FixedHandover(), make_model(config, 300, ENCODER)
    measure(measured, 3, 1, FixedRate(), handover)
    report("nano", config, model, FixedRate(), handover, measured)
    printed = capsys.readouterr().out
    return json.loads(printed.rstrip().split("\n")[-1]), printed


def test_without_pytorch(config, capsys):
    result, printed = measured_report(config, False, capsys)
    mix = make_mix()
    # 256 positions a step at 0.01 s; three quarters of the steps have half of them real.
    needed = sum(t.share * useful_flops(make_model(config, 300, ENCODER), t.batch, config.diffusion) for t in mix)
    assert result == {
        "config": "nano",
        "tokens_per_s": pytest.approx(0.625 * 100, abs=0.1),
        "matmul_share": pytest.approx(needed / 2.56 / 1e9, abs=1e-4),
        "ratio_plain_flax": 3.0,
    }
    assert "PyTorch" not in printed
    # Beside each of three courses' steps, of two shapes, three times.
    assert "another reads at 18 GB/s" in printed


def test_with_pytorch(config, capsys):
    result, printed = measured_report(config, True, capsys)
    # The median of the first SunFish's steps.
    positions = 8192 / 17.0
    assert {name: value for name, value in result.items() if name.startswith("ratio")} == {
        "ratio_plain_flax": 3.0,
        "ratio_torch_twin": 2.5,
        "ratio_torch_twin_as_configured": 2.0,
        "ratio_first_sunfish": pytest.approx(62.5 / positions, abs=1e-3),
        "ratio_first_sunfish_real_tokens": pytest.approx(62.5 / (0.4 * positions), abs=1e-3),
    }
    assert f"{62.5 / (0.4 * positions):.2f} times its real tokens" in printed
    assert "ours with muon" in printed and "ours with AdamW" in printed
    assert "PyTorch twin, rows of 16, 32: float32, eager" in printed


def test_with_the_first_sunfish_alone(config, capsys):
    measured = make_measured(True)
    result, printed = reported(config, Measured(measured.ours, first=measured.first), capsys)
    assert {name for name in result if name.startswith("ratio")} == {
        "ratio_first_sunfish",
        "ratio_first_sunfish_real_tokens",
    }
    assert result["ratio_first_sunfish"] == pytest.approx(62.5 / (8192 / 17.0), abs=1e-3)
    assert "plain Flax" not in printed and "twin" not in printed
    assert measured.twin.twin.times == [[], []]


def test_everything_is_timed_in_turn():
    measured = make_measured(True)
    measure(measured, 3, 1, FixedRate(), FixedHandover())
    # Beside each of our two shapes.
    assert measured.first.times == [16.0, 90.0, 17.0, 16.5, 17.0, 60.0]
    assert len(measured.courses()) == 5
    for course in measured.courses():
        assert [len(times) for times in course.times] == [3, 3]
    # Ours, in whole and in shortened steps, alternate rather than coming in blocks, one shape after the other;
    # of two in a row the second is timed.
    shapes = measured.ours.contender.asked
    assert shapes == 3 * [*2 * [(2, 4, 32)], *2 * [(1, 4, 32)]] + 3 * [*2 * [(2, 2, 64)], *2 * [(1, 2, 64)]]


def test_a_turn_may_be_of_several_steps():
    # The first of a turn, which does not count, and two that do.
    steps = FixedFirst(each for counted in range(4) for each in (99.0, counted, counted + 0.5))
    measured = Measured(Course.of(Fixed(each=0.01), make_mix()), first=FirstCourse(steps, times=[], filled=0.4))
    measure(measured, 2, 2, FixedRate(), FixedHandover())
    assert measured.first.times == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5]
    assert [len(times) for times in measured.ours.times] == [4, 4]
    assert measured.ours.contender.asked == 6 * [(2, 4, 32)] + 6 * [(2, 2, 64)]


def test_theirs_may_have_more_shapes_than_ours():
    theirs = Course.of(Fixed(each=0.03), [*make_padded(), *make_padded()])
    ours = Course.of(Fixed(each=0.01), make_mix())
    measure(Measured(ours, PlainCourses(ours, theirs)), 2, 1, FixedRate(), FixedHandover())
    assert [len(times) for times in theirs.times] == [2, 2, 2, 2]
    # In each of the rounds.
    assert [len(times) for times in ours.times] == [4, 4]


def test_a_course_that_is_two_things_is_timed_once():
    ours = Course.of(Fixed(each=0.01), make_mix())
    measured = Measured(ours, PlainCourses(ours, Course.of(Fixed(each=0.03), make_padded())))
    measure(measured, 3, 1, FixedRate(), FixedHandover())
    assert [len(times) for times in ours.times] == [3, 3]


def test_a_step_is_compiled_for_each_kind_of_batch_and_number_of_passes():
    compiled = []

    def compile_step(state, batch):
        compiled.append((len(batch.tokens), batch.longest))
        return lambda state, batch: (state + 1, 0.0)

    steps = JaxSteps(compile_step, 0)
    short, longer = make_mix()
    # Packs of another kind may be of the same size.
    longer = longer.batch.replace(tokens=short.batch.tokens)
    for batch in (short.batch, short.batch, make_mix(passes=1)[0].batch, short.batch, longer, longer):
        steps.seconds(batch)
    assert compiled == [(2, 16), (1, 16), (2, 32)]
    # Each first one is warm-up.
    assert steps.state == 6 + 3
