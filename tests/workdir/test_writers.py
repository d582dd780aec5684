"""Metric writers, read back with TensorBoard's own reader and W&B's own file."""

import inspect
import struct
import subprocess
import sys

import pytest
from ml_collections import ConfigDict
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sunfish_jax.errors import UserError
from sunfish_jax.workdir import event_writer, writers


def logging_config(wandb=False):
    return ConfigDict({"logging": {"name": "try", "wandb": wandb}})


def read(folder):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return events


def curve(events, tag):
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_scalars_and_texts_can_be_read_back(tmp_path):
    writer = writers.make_writer(logging_config(), tmp_path)
    writer.write_scalars(step=1, scalars={"train/loss": 6.5, "held_out/mean": 3})
    writer.write_scalars(step=2, scalars={"train/loss": 6.25})
    writer.write_texts(step=2, texts={"samples/0": "# not a heading\n\n*not* bold: ñ 😀"})
    writer.write_hparams(hparams={"model.width": 64, "data.source": "a.txt"})
    writer.close()
    events = read(tmp_path)
    assert curve(events, "train/loss") == [(1, 6.5), (2, 6.25)]
    assert curve(events, "held_out/mean") == [(1, 3.0)]
    (text,) = events.Tensors("samples/0")
    assert text.step == 2
    assert text.tensor_proto.string_val[0].decode() == "    # not a heading\n    \n    *not* bold: ñ 😀"
    assert b"model.width = 64" in events.Tensors("config")[0].tensor_proto.string_val[0]
    # The plugin name is what makes TensorBoard show it as a text.
    assert events.summary_metadata["samples/0"].plugin_data.plugin_name == "text"


def test_flush_makes_the_points_visible_while_training_goes_on(tmp_path):
    writer = writers.make_writer(logging_config(), tmp_path)
    writer.write_scalars(step=1, scalars={"train/loss": 6.5})
    writer.flush()
    assert curve(read(tmp_path), "train/loss") == [(1, 6.5)]
    writer.write_scalars(step=2, scalars={"train/loss": 6.0})
    writer.close()
    assert len(curve(read(tmp_path), "train/loss")) == 2


def test_resumed_run_replaces_the_points_it_does_again(tmp_path):
    killed = event_writer.SummaryWriter(str(tmp_path))
    for step in range(1, 7):
        killed.write_scalars(step=step, scalars={"train/loss": float(step)})
    killed.close()
    resumed = event_writer.SummaryWriter(str(tmp_path), first_step=4)  # from the checkpoint of step 4
    for step in range(5, 9):
        resumed.write_scalars(step=step, scalars={"train/loss": 10.0 * step})
    resumed.close()
    expected = [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 50.0), (6, 60.0), (7, 70.0), (8, 80.0)]
    assert curve(read(tmp_path), "train/loss") == expected


FULL = """
import resource, sys
from pathlib import Path
from ml_collections import ConfigDict
from sunfish_jax.workdir.writers import make_writer
writer = make_writer(ConfigDict({"logging": {"name": "try", "wandb": False}}), Path(sys.argv[1]))
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (500, most))  # what a full disk does, to files of this process alone
step = 0
try:
    while True:
        step += 1
        writer.write_scalars(step=step, scalars={"train/loss": float(step)})
        writer.flush()
except OSError as error:
    print(step, error.strerror)
resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))  # and then there is room
writer.write_scalars(step=step + 1, scalars={"train/loss": step + 1.0})
writer.close()
"""


def test_a_full_disk_is_an_error_where_it_is_written_and_no_point_is_lost(tmp_path):
    pytest.importorskip("resource")
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    step, reason = done.stdout.split(maxsplit=1)
    assert int(step) > 3 and reason == "File too large\n"
    points = curve(read(tmp_path), "train/loss")
    assert points == [(number, float(number)) for number in range(1, int(step) + 2)]


@pytest.mark.parametrize("writer_class", [event_writer.SummaryWriter, writers.WandbWriter])
def test_writers_have_every_method_of_clus_interface(writer_class):
    for name in writers.metric_writers.MetricWriter.__abstractmethods__:
        expected = inspect.signature(getattr(writers.metric_writers.MetricWriter, name)).parameters
        found = inspect.signature(getattr(writer_class, name)).parameters
        assert [(p.name, p.kind, p.default) for p in found.values()] == [
            (p.name, p.kind, p.default) for p in expected.values()
        ], name


def test_clu_works_without_tensorflow_or_torch():
    code = (
        "import sys; import sunfish_jax.workdir.writers; "
        "from clu import metric_writers, periodic_actions, parameter_overview; "
        "print(metric_writers.SummaryWriter.__module__, "
        "[m for m in ('tensorflow', 'torch', 'wandb') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "sunfish_jax.workdir.event_writer []", run.stderr


def test_wandb_missing_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"wandb is not installed.*--extra wandb"):
        writers.make_writer(logging_config(wandb=True), tmp_path)


def test_wandb_that_cannot_begin_is_one_clear_line(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")

    def init(**_):
        raise wandb.Error("No API key configured")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(UserError, match=r"No API key configured.*wandb login"):
        writers.make_writer(logging_config(wandb=True), tmp_path)


@pytest.mark.slow
def test_wandb_offline_keeps_scalars_texts_and_the_run_id(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for steps in [(1, 2), (2, 3)]:  # killed after step 2 and resumed from step 1
        writer = writers.make_writer(logging_config(wandb=True), tmp_path)
        writer.write_hparams(hparams={"model.width": 64})
        for step in steps:
            writer.write_scalars(step=step, scalars={"train/loss": 6.5 / step})
        writer.write_texts(step=steps[-1], texts={"samples/0": "<b> a dog"})
        writer.close()
    runs = sorted((tmp_path / "wandb").glob("offline-run-*"))
    run_id = (tmp_path / "wandb_run_id.txt").read_text()
    assert len(runs) == 2 and all(f"-{run_id}" in run.name for run in runs)
    assert [steps for run in runs for steps in history_steps(run)] == [1, 2, 2, 3]
    page = next(runs[0].glob("files/media/html/samples/*.html")).read_text()
    assert "&lt;b&gt; a dog" in page


def history_steps(run_folder):
    """The steps at which an offline W&B run file has a training loss.

    The file is a LevelDB log: 7 bytes of file header, then records of (checksum, length, type) and data.
    """
    from wandb.proto import wandb_internal_pb2

    data = next(run_folder.glob("run-*.wandb")).read_bytes()
    assert len(data) < 32768  # a single LevelDB block: no record is split
    position = 7
    while position < len(data):
        (length,) = struct.unpack_from("<H", data, position + 4)
        record = wandb_internal_pb2.Record.FromString(data[position + 7 : position + 7 + length])
        position += 7 + length
        values = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
        if "train/loss" in values:
            yield int(values["step"])
