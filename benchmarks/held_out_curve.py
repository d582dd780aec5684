"""Draws a run's held-out curve and its use of context from its TensorBoard log.

uv run benchmarks/held_out_curve.py --workdir=workdir_mini --output=docs/mini_held_out.png
"""

from pathlib import Path
from typing import TYPE_CHECKING

from absl import app, flags
from command_line import parser

from sunfish_jax.errors import UserError

if TYPE_CHECKING:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

_WORKDIR = flags.DEFINE_string("workdir", "workdir", "The run's folder")
_OUTPUT = flags.DEFINE_string("output", "held_out.png", "The picture to write")


def check() -> None:
    if not list(Path(_WORKDIR.value).glob("events.*")):
        raise UserError(f"--workdir={_WORKDIR.value} holds no TensorBoard log: name a run's folder")


def main(argv: list[str]) -> None:
    del argv
    # Here, so that --help does not wait for them.
    import matplotlib.pyplot as plt
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from sunfish_jax.diffusion.process import HELD_OUT_SNRS

    log = EventAccumulator(_WORKDIR.value)
    log.Reload()
    figure, (levels, context) = plt.subplots(1, 2, figsize=(11, 4.2), sharex=True)
    for snr in HELD_OUT_SNRS:
        _draw(levels, log, f"held_out/rho_{snr:g}", f"SNR {snr:g}")
    _draw(levels, log, "held_out/mean", "mean", color="black", linewidth=2)
    levels.set(xlabel="step", ylabel="nats a token", title="held-out cross-entropy")
    for snr in HELD_OUT_SNRS[1:]:
        steps, true = _series(log, f"context/true_{snr:g}")
        _, shuffled = _series(log, f"context/shuffled_{snr:g}")
        gains = [s - t for s, t in zip(shuffled, true, strict=True)]
        context.plot(steps, gains, marker=".", label=f"SNR {snr:g}")
    context.set(xlabel="step", ylabel="nats a token", title="lost when the text around is shuffled")
    for axes in (levels, context):
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(_OUTPUT.value, dpi=110)
    print(f"wrote {_OUTPUT.value}")


def _series(log: "EventAccumulator", tag: str) -> tuple[list[int], list[float]]:
    events = log.Scalars(tag)
    return [event.step for event in events], [event.value for event in events]


def _draw(axes, log: "EventAccumulator", tag: str, label: str, **style) -> None:
    axes.plot(*_series(log, tag), marker=".", label=label, **style)


if __name__ == "__main__":
    app.run(main, flags_parser=parser(__doc__, check))
