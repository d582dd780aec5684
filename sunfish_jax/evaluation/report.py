"""What an evaluation finds: printed part by part, kept in a JSON file as it grows, and logged to TensorBoard."""

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sunfish_jax.workdir.event_writer import SummaryWriter
from sunfish_jax.workdir.json_file import write_json


class Report:
    """The figures of one checkpoint.

    Attributes:
        result: What is written to `eval_SPLIT.json`: nested figures by name.
    """

    def __init__(self, workdir: Path, split: str, step: int):
        self._workdir, self._split, self._step = workdir, split, step
        self.result: dict[str, Any] = {"workdir": str(workdir), "checkpoint_step": step, "split": split}

    @contextlib.contextmanager
    def section(self, title: str) -> Iterator[dict[str, Any]]:
        """Says what is being measured, which may take minutes, and how long it took; then saves what there is.

        Yields:
            `result`.
        """
        began = time.monotonic()
        print(f"\n{title} ...", flush=True)
        yield self.result
        write_json(self._workdir / f"eval_{self._split}.json", self.result)
        print(f"({time.monotonic() - began:.0f}s)", flush=True)

    def log(self) -> None:
        """Writes the figures to TensorBoard, at the checkpoint's step."""
        # A folder of its own, which TensorBoard shows beside the curves: an older checkpoint may be measured.
        writer = SummaryWriter(str(self._workdir / f"eval_{self._split}"))
        groups = {name: figures for name, figures in self.result.items() if isinstance(figures, Mapping)}
        writer.write_scalars(self._step, dict(_scalars(groups)))
        writer.close()


def _scalars(figures: Mapping[str, Any], *path: str) -> Iterator[tuple[str, float]]:
    """The numbers of nested figures by tag. A name with a slash is a training curve's tag, and stays as it is."""
    for name, value in figures.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, *path, name)
        elif isinstance(value, int | float) and not math.isnan(value):
            yield name if "/" in name else "/".join((*path, name)), value
