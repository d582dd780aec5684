"""How far a run is: real tokens per second, time spent, time left, and the line that says so."""

import dataclasses
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path

from sunfish_jax.errors import UserError
from sunfish_jax.workdir.json_file import write_json

TOTALS_FILE = "progress.json"


@dataclasses.dataclass
class Progress:
    """Counts the steps of a run, also over several sittings.

    Attributes:
        num_steps: the step at which training ends.
        step: the step reached.
        seconds: time spent in training steps since the run began, compiling and everything else left out.
        real_tokens: tokens trained on since the run began, padding not counted.
        clock: seconds from any fixed moment.
    """

    num_steps: int
    step: int = 0
    seconds: float = 0.0
    real_tokens: int = 0
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self):
        self._first_step = self.step
        self._began = self.clock()
        self._compiling = 0.0
        self._last = (self.seconds, self.real_tokens)

    def add_step(self, seconds: float, real_tokens: int):
        """Counts one step that took this long and saw so many real tokens."""
        self.step += 1
        self.seconds += seconds
        self.real_tokens += real_tokens

    def add_compiling(self, seconds: float):
        """Leaves out time that is spent once in a sitting: the steps to come will not need it again."""
        self._compiling += seconds

    def tokens_per_second(self) -> float:
        """Real tokens per second of training since the last call."""
        seconds, tokens = self._last
        self._last = (self.seconds, self.real_tokens)
        return (self.real_tokens - tokens) / (self.seconds - seconds)

    def seconds_left(self) -> float:
        """Until the last step, at the pace of this sitting: evaluation and saving counted, compiling not."""
        elapsed = self.clock() - self._began - self._compiling
        return (self.num_steps - self.step) * elapsed / (self.step - self._first_step)

    def line(self, loss: float, tokens_per_second: float) -> str:
        """The line shown in the terminal."""
        width = len(str(self.num_steps))
        return (
            f"step {self.step:{width}d}/{self.num_steps}  loss {loss:.4f}  "
            f"{tokens_per_second:,.0f} tokens/s  {format_seconds(self.seconds_left())} left"
        )


def format_seconds(seconds: float) -> str:
    """Two units at most: `45s`, `3m 20s`, `2h 5m`, `1d 4h`."""
    seconds = round(seconds)
    units = (("d", 86400), ("h", 3600), ("m", 60), ("s", 1))
    for (unit, size), (smaller, smaller_size) in itertools.pairwise(units):
        if seconds >= size:
            return f"{seconds // size}{unit} {seconds % size // smaller_size}{smaller}"
    return f"{seconds}s"


def save_totals(workdir: Path, progress: Progress):
    """Keeps the totals at this step, beside its checkpoint."""
    totals = {step: value for step, value in _read_totals(workdir).items() if int(step) < progress.step}
    totals[str(progress.step)] = {"seconds": round(progress.seconds, 3), "real_tokens": progress.real_tokens}
    write_json(workdir / TOTALS_FILE, totals)


def load_totals(workdir: Path, step: int, num_steps: int) -> Progress:
    """Goes on counting from the checkpoint of `step`; from zero where nothing was kept for it."""
    return Progress(num_steps, step, **_read_totals(workdir).get(str(step), {}))


def _read_totals(workdir: Path) -> dict:
    file = workdir / TOTALS_FILE
    try:
        totals = json.loads(file.read_text()) if file.exists() else {}
        return {step: {name: value[name] for name in ("seconds", "real_tokens")} for step, value in totals.items()}
    except (ValueError, AttributeError, TypeError, KeyError):
        raise UserError(f"{file} is damaged: put back the one that training wrote, or remove it") from None
