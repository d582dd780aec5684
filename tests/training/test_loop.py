"""The loop around the step: when things happen, what is reported, and how it ends."""

import errno
import types

import numpy as np
import pytest
from ml_collections import ConfigDict

from sunfish_jax.alone import alone_in
from sunfish_jax.errors import UserError
from sunfish_jax.training import loop
from sunfish_jax.training.loop import CompiledStep, Loop
from sunfish_jax.training.watching import HELD_OUT_MEAN, Stopped
from sunfish_jax.workdir.progress import Progress, load_totals


@pytest.fixture(autouse=True)
def programs_kept(monkeypatch):
    """No program is dropped: other tests of this process would compile theirs again."""
    monkeypatch.setattr(loop, "_drop_unowned_programs", lambda: None)


def batch(length=8, real=5):
    mask = np.arange(length) < real
    return types.SimpleNamespace(longest=length, padding_mask=mask[None, None])


class FakeStep:
    """Counts steps as a state; `losses[i]` is the loss of step i + 1."""

    def __init__(self, losses=None, after=None):
        self.losses, self.after = losses or {}, after or {}

    def compile(self, state, batch):
        return 0.0

    def __call__(self, state, batch):
        state += 1
        self.after.get(state, lambda: None)()
        return state, {"loss": self.losses.get(state, 2.0), "grad_norm": 1.0, "schedule/mu": 0.5}


class Recorder:
    """Checkpoints, writer and stop request in one, which remember what happened."""

    def __init__(self, on_evaluate=None, on_sample=None):
        self.saved, self.scalars, self.texts, self.flushed, self.told = {}, {}, {}, 0, []
        self.asked, self.on_evaluate, self.on_sample = False, on_evaluate, on_sample

    def __bool__(self):
        return self.asked

    def ask(self):
        self.asked = True

    def ask_without_output(self, *streams):
        assert streams == (1,)
        self.asked = True

    def tell(self, message):
        self.told.append(message)

    def save(self, step, state, metrics):
        assert step == state
        self.saved.setdefault(step, metrics)  # as the real one: a step that is there stays as it is

    def latest_step(self):
        return max(self.saved, default=None)

    def write_scalars(self, step, scalars):
        assert self.scalars.setdefault(step, {}).keys().isdisjoint(scalars), "written twice"
        self.scalars[step] |= scalars

    def write_texts(self, step, texts):
        self.texts[step] = texts

    def flush(self):
        self.flushed += 1

    def evaluate(self, state):
        if self.on_evaluate:
            self.on_evaluate(self)
        return {HELD_OUT_MEAN: 3.0 + state, "context/gain": 0.25}

    def sample(self, state):
        if self.on_sample:
            self.on_sample(self)
        return {"a dog": f"text of\nstep {state}"}


def make_loop(tmp_path, recorder, num_steps=10, first_step=0):
    config = ConfigDict(
        {
            "eval": {"every_steps": 4},
            "checkpoint": {"every_steps": 4},
            "logging": {"every_steps": 5, "sample_every_steps": 3},
        }
    )
    return Loop(
        config=config,
        workdir=tmp_path,
        checkpoints=recorder,
        writer=recorder,
        stop=recorder,
        evaluate=recorder.evaluate,
        sample=recorder.sample,
        progress=Progress(num_steps, first_step),
        steps_per_epoch=4,
    )


def endless(**kinds):
    while True:
        yield batch(**kinds)


def test_a_second_training_in_the_same_workdir_is_refused(tmp_path):
    pytest.importorskip("fcntl")
    refused = pytest.raises(UserError, match=f"another training is running in --workdir={tmp_path}: stop it first")
    with alone_in(tmp_path, lambda: None), refused:
        loop.train(ConfigDict(), tmp_path)


def test_everything_happens_at_its_steps_and_at_the_last(tmp_path, capsys):
    recorder = Recorder()
    losses = {step: float(step) for step in range(1, 11)}
    state = make_loop(tmp_path, recorder).run(0, FakeStep(losses), endless())
    assert state == 10
    # The checkpoints have the held-out loss of their step: "best" is chosen by it.
    assert recorder.saved == {4: {"held_out": 7.0}, 8: {"held_out": 11.0}, 10: {"held_out": 13.0}}
    assert list(recorder.texts) == [3, 6, 9, 10]
    assert recorder.texts[3] == {"samples/a dog": "text of\nstep 3"}
    assert [step for step, figures in recorder.scalars.items() if "context/gain" in figures] == [4, 8, 10]
    curve = {s: f["train/loss"] for s, f in recorder.scalars.items() if "train/loss" in f}
    # Each point is the mean of the steps since the one before. The first step is shown at once.
    assert curve == {1: 1.0, 5: np.mean([2, 3, 4, 5]), 10: np.mean([6, 7, 8, 9, 10])}
    last = recorder.scalars[10]
    assert last["schedule/mu"] == 0.5 and last["train/grad_norm"] == 1.0
    assert last["train/real_tokens"] == 50 and last["train/epoch"] == 2.5  # 5 real tokens in each batch of 8
    out = capsys.readouterr().out
    assert "step  5/10  loss 3.5000" in out and "held-out cross-entropy at step 4: mean 7.000" in out
    assert "[a dog] text of step 3" in out and "trained to step 10" in out
    assert recorder.flushed == 3


def test_the_state_of_each_evaluation_is_saved(tmp_path):
    recorder = Recorder()
    loop = make_loop(tmp_path, recorder)
    loop.config.checkpoint.every_steps = 6
    loop.run(0, FakeStep(), endless())
    assert recorder.saved == {4: {"held_out": 7.0}, 6: None, 8: {"held_out": 11.0}, 10: {"held_out": 13.0}}


def test_freed_memory_goes_back_every_few_seconds(tmp_path, monkeypatch):
    clock, gave_back = [0.0], []
    monkeypatch.setattr(loop, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(loop, "give_back_freed_memory", lambda: gave_back.append(clock[0]))
    monkeypatch.setattr(loop, "_SECONDS_BETWEEN_GIVING_BACK", 5.0)

    def two_seconds():
        clock[0] += 2.0

    make_loop(tmp_path, Recorder()).run(0, FakeStep(after=dict.fromkeys(range(1, 11), two_seconds)), endless())
    assert gave_back == [2.0, 8.0, 14.0, 20.0]


def test_stop_finishes_the_step_saves_it_and_says_how_to_resume(tmp_path):
    recorder = Recorder()
    state = make_loop(tmp_path, recorder).run(0, FakeStep(after={6: recorder.ask}), endless())
    assert state == 6 and list(recorder.saved) == [4, 6]
    assert list(recorder.texts) == [3]  # not at step 6: whoever stops a run waits for it to end
    assert len(recorder.told) == 1 and recorder.told[0].startswith(f"stopped at step 6 of 10, saved in {tmp_path}")
    assert load_totals(tmp_path, 6, 10).real_tokens == 30


def test_output_that_nobody_reads_any_more_stops_it_saved(tmp_path, monkeypatch):
    def line(progress, *_):
        if progress.step == 5:
            raise BrokenPipeError
        return ""

    monkeypatch.setattr(Progress, "line", line)
    recorder = Recorder()
    assert make_loop(tmp_path, recorder).run(0, FakeStep({}), endless()) == 5
    assert recorder.asked and max(recorder.saved) == 5


def test_figures_that_cannot_be_written_end_it_saved(tmp_path):
    def fail():
        raise OSError(errno.ENOSPC, "No space left on device")

    recorder = Recorder()
    recorder.flush = fail
    with pytest.raises(OSError, match="No space"):
        make_loop(tmp_path, recorder, first_step=4).run(4, FakeStep(), endless())
    assert recorder.saved == {5: None}


def test_there_are_totals_for_every_checkpoint(tmp_path):
    recorder, missing = Recorder(), []

    def save(step, state, metrics):
        missing.extend([step] * (load_totals(tmp_path, step, 10).real_tokens == 0))

    recorder.save = save
    make_loop(tmp_path, recorder).run(0, FakeStep(), endless())
    assert missing == []


def test_stop_in_the_last_step_says_what_is_missing(tmp_path, capsys):
    recorder = Recorder()
    make_loop(tmp_path, recorder).run(0, FakeStep(after={10: recorder.ask}), endless())
    assert recorder.saved[10] is None and 10 not in recorder.texts
    assert "--mode=eval and --mode=sample make what is missing" in capsys.readouterr().out


def test_stop_during_an_evaluation_gives_it_up_and_saves(tmp_path):
    def stop_now(recorder):
        recorder.ask()
        raise Stopped

    recorder = Recorder(on_evaluate=stop_now)
    assert make_loop(tmp_path, recorder).run(0, FakeStep(), endless()) == 4
    assert recorder.saved == {4: None}
    assert HELD_OUT_MEAN not in recorder.scalars.get(4, {})


def test_stop_while_sampling_saves_the_step(tmp_path):
    recorder = Recorder(on_sample=Recorder.ask)
    assert make_loop(tmp_path, recorder).run(0, FakeStep(), endless()) == 3
    assert list(recorder.saved) == [3]


def test_stop_before_the_first_step_saves_nothing(tmp_path):
    recorder = Recorder()
    recorder.ask()
    assert make_loop(tmp_path, recorder, first_step=4).run(4, FakeStep(), endless()) == 4
    assert not recorder.saved and "stopped at step 4 of 10, saved in" in recorder.told.pop()
    make_loop(tmp_path, recorder).run(0, FakeStep(), endless())
    assert not recorder.saved and recorder.told == ["stopped before the first step: there was nothing to save"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_loss_names_the_step_and_saves_nothing_more(tmp_path, value):
    recorder = Recorder()
    with pytest.raises(UserError, match=r"not finite at step 8 \(loss=(nan|inf)\); the checkpoint of step 4"):
        # 8 is a step at which a checkpoint is due.
        make_loop(tmp_path, recorder).run(0, FakeStep({8: value}), endless())
    assert list(recorder.saved) == [4]


def test_step_is_compiled_once_for_each_row_length(capsys):
    compiled = []

    class Step:
        def compile(self, state, batch):
            length = batch.longest
            compiled.append(length)
            return lambda state, batch: (state + length, {"loss": np.float32(1.5)})

    step, state = CompiledStep(Step()), 0
    for length in (8, 16, 8, 16, 8):
        seconds = step.compile(state, batch(length))
        assert (seconds > 0) == (state < 24)
        state, metrics = step(state, batch(length))
    assert compiled == [8, 16] and state == 56 and metrics == {"loss": 1.5}
    assert capsys.readouterr().out.count("compiled the step") == 2


def test_auto_may_choose_eight_bits_and_a_run_goes_on_as_it_began(monkeypatch, capsys):
    monkeypatch.setattr(loop, "fastest_compute_dtype", lambda width: {512: "int8"}[width])
    auto = ConfigDict({"model": {"compute_dtype": "auto", "width": 512}})
    assert loop._with_compute_dtype(auto, None).model.compute_dtype == "int8"
    assert "computing in int8, the fastest here" in capsys.readouterr().out
    for saved in ("int8", "bfloat16"):
        resumed = loop._with_compute_dtype(auto, ConfigDict({"model": {"compute_dtype": saved}}))
        assert resumed.model.compute_dtype == saved
