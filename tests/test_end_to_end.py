"""The real `main.py`, from a person's own file to text: train, stop, resume, sample, infill, eval."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sunfish_jax.training.state import create_state
from sunfish_jax.workdir.checkpoints import Checkpoints
from sunfish_jax.workdir.run import load_run

ROOT = Path(__file__).parent.parent
NUM_STEPS = 24
PROMPT = "Write about a whale"
TEXT = "The [MASK:2] of the [MASK:1] lives alone."


def make_corpus(path):
    """Short texts with prompts."""
    animals = ("dog", "cat", "owl", "bear", "whale", "ant", "horse", "goat")
    places = ("forest", "sea", "desert", "garden", "mountains")
    deeds = ("eats fish", "sleeps all day and hunts at night", "lives alone", "is seen near water in spring")
    with path.open("w") as file:
        for i in range(320):
            animal, place, deed = animals[i % 8], places[i % 5], deeds[i // 8 % 4]
            text = f"The {animal} of the {place} {deed}." + f" Number {i} was found by people." * (i % 3)
            print(json.dumps({"text": text, "prompt": f"Write about a {animal}"}), file=file)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("end_to_end")
    make_corpus(folder / "corpus.jsonl")
    return folder


def main(folder, *arguments):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "main.py"), *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def train(folder, workdir, *overrides):
    """Nano, a little smaller, with everything on that has a state or draws random numbers."""
    return main(
        folder,
        f"--config={ROOT}/configs/nano.py",
        f"--workdir={workdir}",
        "--config.data.source=corpus.jsonl",
        # What is compiled is most of the time here: one row length, and figures and samples of one step.
        "--config.data.num_buckets=1",
        "--config.tokenizer.vocab_size=320",
        "--config.model.num_layers=2",
        "--config.model.conv_width=3",
        "--config.model.dropout=0.1",
        "--config.model.compute_dtype=int8",
        "--config.train.batch_size=4",
        "--config.train.accumulate_steps=2",
        f"--config.train.num_steps={NUM_STEPS}",
        f"--config.eval.every_steps={NUM_STEPS}",
        "--config.eval.num_rows=8",
        "--config.eval.bound_rows=4",
        # One, so that a rough figure and a fine one are the same program.
        "--config.eval.bound_draws=1",
        "--config.sampling.num_steps=4",
        "--config.logging.every_steps=1",
        f"--config.logging.sample_every_steps={NUM_STEPS}",
        "--config.logging.sample_prompts=('Write about a dog',)",
        "--config.checkpoint.every_steps=10",
        *overrides,
    )


def words(text):
    """Samples of an untrained model are full of control characters, which a terminal's line ends get mixed with."""
    return " ".join(text.split())


def finish(process, code=0):
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, out + err
    return out, err


@pytest.fixture(scope="module")
def unstopped(folder):
    return finish(train(folder, "unstopped"))[0]


@pytest.fixture(scope="module")
def resumed(folder, unstopped):
    """Stopped by SIGTERM in the middle of a step, where no checkpoint was due, and run again."""
    process = train(folder, "stopped")
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("step  5/"):
            process.send_signal(signal.SIGTERM)
            break
    _, err = finish(process)
    stopped_at = int(err.split("stopped at step ")[1].split()[0])
    assert 5 <= stopped_at < NUM_STEPS and "run the same command again to go on" in err
    assert (folder / "stopped/checkpoints" / str(stopped_at)).is_dir()
    out, _ = finish(train(folder, "stopped"))
    assert f"from step {stopped_at}" in out


def state_of(workdir, step):
    run = load_run(workdir)
    abstract = jax.eval_shape(lambda: create_state(run.config, run.model))
    with Checkpoints(workdir) as checkpoints:
        state = checkpoints.restore(abstract, step)
    state = state.replace(key=jax.random.key_data(state.key))
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(state)}


def differing(one, other):
    return [name for name in one if one[name].tobytes() != other[name].tobytes()]


def test_run_shows_its_parameters_progress_figures_and_samples(unstopped):
    assert "Total: " in unstopped and "embedding" in unstopped  # the parameter table
    assert f"step {NUM_STEPS}/{NUM_STEPS}  loss " in unstopped and " tokens/s  0s left" in unstopped
    assert f"held-out cross-entropy at step {NUM_STEPS}: mean " in unstopped
    assert "  [Write about a dog] " in unstopped and "  [no prompt] " in unstopped


def test_stopped_and_resumed_run_ends_in_the_same_bits(folder, resumed):
    expected, found = (state_of(folder / name, NUM_STEPS) for name in ("unstopped", "stopped"))
    assert expected.keys() == found.keys()
    # Every kind of state is among them, and training changes it.
    changed = differing(state_of(folder / "unstopped", 10), expected)
    for kind in (".params", ".ema_params", ".opt_state", ".schedule.", ".schedule_opt_state", ".step"):
        assert any(name.startswith(kind) for name in changed), kind
    assert ".key" in expected and expected[".step"] == NUM_STEPS
    assert differing(expected, found) == []


def test_tensorboard_has_every_figure_once_over_both_sittings(folder, resumed):
    curves = []
    for workdir in ("unstopped", "stopped"):
        events = EventAccumulator(str(folder / workdir), size_guidance={"scalars": 0, "tensors": 0}).Reload()
        tags = events.Tags()
        assert {"train/loss", "train/grad_norm", "train/learning_rate", "train/tokens_per_second"} <= set(
            tags["scalars"]
        )
        assert {"held_out/mean", "held_out/rho_1", "held_out/self_conditioning_gain", "context/shuffled_5"} <= set(
            tags["scalars"]
        )
        assert {"schedule/mu", "embeddings/nearest_neighbour_distance"} <= set(tags["scalars"])
        assert {"config", "samples/Write about a dog", "samples/no prompt"} <= set(tags["tensors"])
        curves.append([(event.step, event.value) for event in events.Scalars("train/loss")])
    assert [step for step, _ in curves[0]] == list(range(1, NUM_STEPS + 1))
    assert curves[0] == curves[1]


def test_changed_architecture_is_refused_and_finished_run_is_left_alone(folder, unstopped):
    before = sorted((folder / "unstopped/checkpoints").iterdir())
    _, err = finish(train(folder, "unstopped", "--config.model.width=32"), code=2)
    assert err.startswith("error: ") and err.count("\n") == 1 and "model.width" in err
    out, _ = finish(train(folder, "unstopped", "--config.sampling.max_gap=7"))
    assert f"at step {NUM_STEPS} of {NUM_STEPS} already" in out
    assert sorted((folder / "unstopped/checkpoints").iterdir()) == before
    # How to sample may still be changed.
    assert "sampling.max_gap was 8 and is 7" in out
    assert json.loads((folder / "unstopped/config.json").read_text())["sampling"]["max_gap"] == 7


@pytest.fixture(scope="module")
def started(folder, resumed):
    """What can be done with a trained run, all of it started at once."""
    workdir = "--workdir=stopped"
    prompt, text = f"--prompt={PROMPT}", f"--text={TEXT}"
    sampling = ("--num_samples=2", "--seed=3", "--output=samples.jsonl")
    tuning = ("--config.train.num_steps=2", "--config.optimizer.learning_rate=1e-9", "--config.eval.num_rows=4")
    processes = {
        "sample": main(folder, "--mode=sample", workdir, prompt, *sampling),
        "infill": main(folder, "--mode=infill", workdir, text, "--output=filled.jsonl"),
        "eval": main(folder, "--mode=eval", workdir, "--num_samples=4"),
        "init_from": train(folder, "tuned", "--config.train.init_from=stopped@10", *tuning),
    }
    yield processes
    for process in processes.values():
        process.kill()
        process.communicate()


def test_sample(folder, started):
    out, _ = finish(started["sample"])
    records = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [record["prompt"] for record in records] == [PROMPT] * 2
    assert records[0]["text"] != records[1]["text"]
    assert all(words(record["text"]) in words(out) and record["seed"] == 3 for record in records)


def test_infill(folder, started):
    finish(started["infill"])
    (line,) = (folder / "filled.jsonl").read_text().splitlines()
    filled = json.loads(line)["text"]
    assert filled.startswith("The ") and " of the " in filled and filled.endswith(" lives alone.")
    assert "[MASK" not in filled


def test_eval(folder, started):
    out, _ = finish(started["eval"])
    assert "bits per byte" in out
    result = json.loads((folder / "stopped/eval_validation.json").read_text())
    assert result["checkpoint_step"] == NUM_STEPS
    assert 0 < result["held_out"]["held_out/mean"] < 10
    assert result["bits_per_byte"]["with_prompt"]["standard_error"] > 0
    samples = (folder / "stopped/eval_validation_samples.jsonl").read_text().split("\n")[:-1]
    assert len(samples) == result["judged"]["texts"] == 4
    assert {"samples", "real text", "shuffled words"} <= result["samples"].keys()
    assert result["samples"]["samples"]["perplexity"] > 1
    assert result["sampling"]["scheduler"] == "ddpm"
    assert result["bits_per_byte"].keys() == {
        "with_prompt",
        "without_prompt",
        "shuffled",
        "training_text",
        "frequencies",
    }
    (log,) = (folder / "stopped/eval_validation").glob("events.*")
    events = EventAccumulator(str(log))
    events.Reload()
    assert {
        "held_out/mean",
        "bits_per_byte/with_prompt/value",
        "infill_accuracy/1/true",
        "samples/samples/perplexity",
        "samples/real text/perplexity",
    } <= set(events.Tags()["scalars"])


def test_init_from_starts_a_new_run_from_the_weights(folder, started):
    out, _ = finish(started["init_from"])
    assert "starting from the weights of stopped, step 10" in out
    tuned, origin = load_run(folder / "tuned"), load_run(folder / "stopped", 10)
    assert tuned.step == 2
    # Its learning rate is next to nothing: the weights stay where they were.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), tuned.params, origin.params)
