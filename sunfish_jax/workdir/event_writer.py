"""CLU's `SummaryWriter` without TensorFlow: scalars and texts into a TensorBoard event file.

`clu.metric_writers` imports TensorFlow for its `SummaryWriter` alone. `writers.py` puts this module in that
one's place, so it cannot import `clu.metric_writers` (nor derive from its `MetricWriter`) itself.
"""

import os
import socket
import time
from collections.abc import Mapping
from typing import Any

from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.record_writer import RecordWriter


class SummaryWriter:
    """A CLU `MetricWriter` that appends to an event file which TensorBoard reads."""

    def __init__(self, logdir: str, first_step: int | None = None):
        """Opens a new event file.

        Args:
            logdir: folder of the event file; made if missing.
            first_step: what earlier files in `logdir` say about later steps than this is void: a run that was
                killed and resumes from its last checkpoint does those steps again. None: all of it stays.
        """
        os.makedirs(logdir, exist_ok=True)
        # TensorBoard knows event files by this beginning, and reads them in the order of their names.
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        # Not TensorBoard's `EventFileWriter`: its thread prints a traceback when the disk is full.
        self._file = RecordWriter(open(os.path.join(logdir, name), "xb"))
        self._add(file_version="brain.Event:2")
        if first_step is not None:
            # TensorBoard drops points at and after the step of a START.
            restart = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._add(step=first_step + 1, session_log=restart)

    def _add(self, **fields):
        self._file.write(event_pb2.Event(wall_time=time.time(), **fields).SerializeToString())

    def write_scalars(self, step: int, scalars: Mapping[str, Any]):
        """Writes one point of each named curve."""
        # One-number summaries rather than tensors: every reader of event files understands these.
        points = [summary_pb2.Summary.Value(tag=n, simple_value=float(v)) for n, v in scalars.items()]
        self._add(step=int(step), summary=summary_pb2.Summary(value=points))

    def write_texts(self, step: int, texts: Mapping[str, str]):
        """Writes texts as they are: indented, which TensorBoard's markdown shows verbatim."""
        for name, text in texts.items():
            verbatim = "\n".join("    " + line for line in text.splitlines())
            self._add(step=int(step), summary=text_pb(name, verbatim))

    def write_hparams(self, hparams: Mapping[str, Any]):
        """Writes the configuration as one text."""
        lines = (f"{name} = {value!r}" for name, value in sorted(hparams.items()))
        self.write_texts(step=0, texts={"config": "\n".join(lines)})

    def write_summaries(self, step: int, values: Mapping[str, Any], metadata: Mapping[str, Any] | None = None):
        """Not written by this project."""
        raise NotImplementedError("the event file takes scalars and texts only, not raw summaries")

    def write_images(self, step: int, images: Mapping[str, Any]):
        """Not written by this project."""
        raise NotImplementedError("the event file takes scalars and texts only, not images")

    def write_videos(self, step: int, videos: Mapping[str, Any]):
        """Not written by this project."""
        raise NotImplementedError("the event file takes scalars and texts only, not videos")

    def write_audios(self, step: int, audios: Mapping[str, Any], *, sample_rate: int):
        """Not written by this project."""
        raise NotImplementedError("the event file takes scalars and texts only, not sound")

    def write_histograms(self, step: int, arrays: Mapping[str, Any], num_buckets: Mapping[str, int] | None = None):
        """Not written by this project."""
        raise NotImplementedError("the event file takes scalars and texts only, not histograms")

    def flush(self):
        """Returns when everything written so far is in the file."""
        self._file.flush()

    def close(self):
        """Flushes and closes the file."""
        self._file.close()
