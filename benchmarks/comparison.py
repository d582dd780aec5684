"""The measurement behind train_step.py."""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from agreement import both_logits
from epoch_mix import Typical, typical_batches
from flops import useful_flops
from jax.sharding import Mesh
from matrix_rate import MatrixRate
from ml_collections import ConfigDict
from plain_flax import PlainState, make_plain, make_plain_state, make_plain_step, plain_params

from sunfish_jax.data.batches import Batch
from sunfish_jax.diffusion.schedules import Schedule
from sunfish_jax.errors import UserError
from sunfish_jax.models.denoiser import TextDenoiser
from sunfish_jax.training.preparation import prepare_run
from sunfish_jax.training.sharding import make_mesh, state_shardings
from sunfish_jax.training.state import create_state
from sunfish_jax.training.step import make_train_step

# The plain network's logits differ from ours by less than this share of the largest, in float32.
_TOLERANCE = 1e-4


class Contender:
    """A training step, compiled once for each shape of batch.

    Attributes:
      state: what the next step starts from.
    """

    def __init__(self, step: Callable[[Any, Batch], tuple[Any, Any]], state: Any):
        self.state = state
        self._step = step
        self._compiled: dict[tuple[int, ...], Callable] = {}

    def seconds(self, batch: Batch) -> float:
        """Takes one optimiser step, from a batch in the host's memory to the new state computed."""
        shape = batch.tokens.shape
        if shape not in self._compiled:
            self._compiled[shape] = self._step.lower(self.state, batch).compile()
            self.seconds(batch)
        start = time.perf_counter()
        self.state, _ = jax.block_until_ready(self._compiled[shape](self.state, batch))
        return time.perf_counter() - start


@dataclasses.dataclass(frozen=True)
class Course:
    """Optimiser steps in the mix of an epoch, taken by one contender.

    Attributes:
      contender: whose steps they are.
      mix: one batch of each row length.
      times: for each of them, the seconds of each repeat.
    """

    contender: Contender
    mix: list[Typical]
    times: list[list[float]]

    @classmethod
    def of(cls, contender: Contender, mix: list[Typical]) -> "Course":
        return cls(contender, mix, [[] for _ in mix])

    def repeat(self, index: int) -> None:
        """Times another step at one of the row lengths."""
        self.times[index].append(self.contender.seconds(self.mix[index].batch))

    def per_second(self, amount: Callable[[Batch], float]) -> float:
        """What is done of something in a second, with the lengths in proportion to an epoch's steps."""
        done = sum(typical.share * amount(typical.batch) for typical in self.mix)
        medians = map(statistics.median, self.times)
        return done / sum(typical.share * seconds for typical, seconds in zip(self.mix, medians, strict=True))


def run(name: str, config: ConfigDict, workdir: Path, repeats: int, plain_accumulate_steps: int) -> None:
    """Measures and prints; the arguments are those of train_step.py.

    Raises:
      UserError: the configuration cannot be prepared, or has no plain network.
    """
    if config.prompt_encoder.name == "transformer":
        raise UserError(
            "config.prompt_encoder.name='transformer' has no plain network to compare with: "
            "choose minilm or gpt2, whose weights are not trained"
        )
    prepared = prepare_run(config, workdir, None)
    model, mesh = prepared.model, make_mesh(config.train.num_devices)

    def create():
        return create_state(config, model, prepared.token_counts())

    state = jax.jit(create, out_shardings=state_shardings(jax.eval_shape(create), mesh))()
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    print(f"{name}: {parameters:,} parameters, products in {model.dtype.name}, {mesh.size} device(s)")
    check_same_function(model, state.params)
    rate = MatrixRate()
    rate.measure()

    mix = typical_batches(config, prepared)
    fewer = min(plain_accumulate_steps, config.train.accumulate_steps)
    short_mix = [
        dataclasses.replace(typical, batch=jax.tree.map(lambda leaf: leaf[:fewer], typical.batch))
        for typical in mix
    ]
    # Copied before our first step gives up the buffers.
    plain_state = make_plain_state(config, plain_params(state.params), mesh)
    schedule = jax.tree.map(jnp.copy, state.schedule)
    plain = faster_plain(config, model, mesh, schedule, plain_state, short_mix, repeats)
    ours = Contender(make_train_step(config, model, mesh), state)

    real = Course.of(ours, mix)
    compared = real if fewer == config.train.accumulate_steps else Course.of(ours, short_mix)
    against = Course.of(plain, short_mix)
    courses = [real, against] if compared is real else [real, compared, against]
    for repeat in range(repeats):
        print(f"repeat {repeat + 1} of {repeats}, rows of", end="")
        for index, typical in enumerate(mix):
            print(f" {typical.length}", end="", flush=True)
            for course in courses:
                course.repeat(index)
        print()
        rate.measure()
    report(name, config, model, rate, real, compared, against)


def check_same_function(model: TextDenoiser, params: Mapping[str, Any]) -> None:
    """Raises an AssertionError unless the plain network returns our logits in float32."""
    ours, plain = both_logits(model, params)
    difference = np.abs(ours - plain).max() / np.abs(ours).max()
    if not difference < _TOLERANCE:
        raise AssertionError(f"the plain network's logits differ from ours by {difference:.1e} of the largest")
    print(f"plain Flax, given our weights, returns our logits to {difference:.0e} of the largest (float32)")


def faster_plain(
    config: ConfigDict,
    model: TextDenoiser,
    mesh: Mesh,
    schedule: Schedule,
    state: PlainState,
    mix: list[Typical],
    repeats: int,
) -> Contender:
    """The plain step in float32 or bfloat16, whichever is faster at the row length of most steps."""
    batch = max(mix, key=lambda typical: typical.share).batch
    key = jax.random.key(config.train.seed)
    contenders, seconds = {}, {}
    for dtype in ("float32", "bfloat16"):
        step = make_plain_step(config, make_plain(model, jnp.dtype(dtype)), mesh, schedule, key)
        contenders[dtype] = Contender(step, state)
        seconds[dtype] = statistics.median(contenders[dtype].seconds(batch) for _ in range(repeats))
        # One state for both: each gives it up to its next step.
        state = contenders[dtype].state
    best = min(seconds, key=seconds.get)
    contenders[best].state = state
    both = ", ".join(f"{dtype} {value:.3g}" for dtype, value in seconds.items())
    print(f"plain Flax, seconds a step of rows of {batch.tokens.shape[-1]}: {both}; {best} is taken", flush=True)
    return contenders[best]


def real_tokens(batch: Batch) -> int:
    """Tokens that are no padding."""
    return int(batch.padding_mask.sum())


def report(
    name: str,
    config: ConfigDict,
    model: TextDenoiser,
    rate: MatrixRate,
    real: Course,
    compared: Course,
    against: Course,
) -> None:
    """Prints a line for each row length, the sums, and the JSON object."""

    def needed(batch: Batch) -> float:
        return useful_flops(model, batch, config.diffusion)

    peak = rate.flops_per_second
    shape = "[{}, {}] @ [{}, {}]".format(*rate.shape[:2], *rate.shape[1:])
    print(f"the machine's best bfloat16 product, {shape}: {peak / 1e9:.0f} GFLOP/s")
    print(f"a step is {config.train.accumulate_steps} forward passes", end="")
    print(
        "" if compared is real else f"; in the comparison it is {len(compared.mix[0].batch.tokens)} on both sides"
    )
    print(f"{'row length':>10} {'rows':>5} {'of steps':>8} {'real':>6} {'tokens/s':>9} {'of peak':>8} {'ratio':>6}")
    for index, typical in enumerate(real.mix):
        tokens = real_tokens(typical.batch)
        seconds, ours, plain = (statistics.median(course.times[index]) for course in (real, compared, against))
        print(
            f"{typical.length:>10} {typical.batch.tokens.shape[1]:>5} {typical.share:>8.1%} "
            f"{tokens / typical.batch.tokens.size:>6.1%} {tokens / seconds:>9.0f} "
            f"{needed(typical.batch) / seconds / peak:>8.1%} {plain / ours:>6.2f}"
        )
    result = {
        "config": name,
        "tokens_per_s": round(real.per_second(real_tokens), 1),
        "matmul_share": round(real.per_second(needed) / peak, 4),
        "ratio_plain_flax": round(compared.per_second(real_tokens) / against.per_second(real_tokens), 3),
    }
    print(f"real tokens/s: ours {result['tokens_per_s']:.0f}", end="")
    if compared is not real:
        print(f" ({compared.per_second(real_tokens):.0f} in the comparison)", end="")
    print(f", plain Flax {against.per_second(real_tokens):.0f}")
    print(json.dumps(result), flush=True)
