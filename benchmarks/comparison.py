"""The measurement behind train_step.py."""

import contextlib
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from agreement import Inputs, check_same, moved, our_logits, plain_logits, twin_logits
from epoch_mix import Typical, typical_batches
from flops import useful_flops
from jax.sharding import Mesh
from matrix_rate import MatrixRate
from ml_collections import ConfigDict
from padded_mix import padded_batches
from plain_flax import PlainState, make_plain, make_plain_state, make_plain_step, plain_params
from torch_peers import FirstSunFishSteps, TwinSteps, make_twin, number_formats
from torch_process import TorchProcess

from sunfish_jax.data.batches import PackedBatch
from sunfish_jax.data.padded_rows import PaddedBatch
from sunfish_jax.diffusion.schedules import Schedule
from sunfish_jax.errors import UserError
from sunfish_jax.models.denoiser import TextDenoiser
from sunfish_jax.ops.awake import awake_cores
from sunfish_jax.training.preparation import Prepared, prepare_run
from sunfish_jax.training.sharding import make_mesh, state_shardings
from sunfish_jax.training.state import TrainState, create_state
from sunfish_jax.training.step import make_train_step

AnyBatch = PackedBatch | PaddedBatch


class Contender(Protocol):
    """What takes optimiser steps."""

    def seconds(self, batch: AnyBatch) -> float:
        """Takes one, from a batch in the host's memory to the new state computed; the first ones are warm-up."""


class JaxSteps:
    """A training step, compiled for the shape of batch at hand, in any number of passes.

    A process has a limited number of memory maps (65,530 on Linux, as it comes), and XLA:CPU makes three for each
    kernel of a program: the steps of all contenders for all shapes do not fit into it together.

    Attributes:
      state: what the next step starts from.
    """

    def __init__(
        self,
        compile_step: Callable[[Any, AnyBatch], Callable[[Any, AnyBatch], tuple[Any, Any]]],
        state: Any,
        surroundings: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ):
        """Steps from `state`; `surroundings` is what training takes them in."""
        self.state = state
        self._surroundings = surroundings
        self._compile = compile_step
        # Of one kind of batch, by the number of passes.
        self._kind: tuple[Any, ...] = ()
        self._compiled: dict[int, Callable] = {}

    def seconds(self, batch: AnyBatch) -> float:
        passes, *shape = batch.tokens.shape
        # Packs of two kinds may be of one size, and differ in how long their rows are.
        kind = (*shape, getattr(batch, "longest", None))
        if kind != self._kind:
            self._kind, self._compiled = kind, {}
            # JAX keeps a program of its own accord too.
            jax.clear_caches()
        if passes not in self._compiled:
            self._compiled[passes] = self._compile(self.state, batch)
            self.seconds(batch)
        with self._surroundings():
            start = time.perf_counter()
            self.state, figures = jax.block_until_ready(self._compiled[passes](self.state, batch))
            seconds = time.perf_counter() - start
        if not all(np.isfinite(figure).all() for figure in jax.tree.leaves(figures)):
            raise AssertionError("the loss is not finite: what these steps do is no training")
        return seconds


@dataclasses.dataclass(frozen=True)
class Course:
    """Optimiser steps in the mix of an epoch, taken by one contender.

    Attributes:
      contender: whose steps they are.
      mix: one batch of each shape.
      times: for each of them, the seconds of each repeat.
    """

    contender: Contender
    mix: list[Typical]
    times: list[list[float]]

    @classmethod
    def of(cls, contender: Contender, mix: list[Typical]) -> "Course":
        return cls(contender, mix, [[] for _ in mix])

    def repeat(self, index: int) -> None:
        """Times another step of one of the shapes, as in training after one of the same contender's.

        The first after the others' turns is slower: memory that was freed went back to the system meanwhile.
        """
        batch = self.mix[index].batch
        self.contender.seconds(batch)
        self.times[index].append(self.contender.seconds(batch))

    def seconds(self, index: int) -> float:
        """The median of one of the shapes."""
        return statistics.median(self.times[index])

    def per_second(self, amount: Callable[[AnyBatch], float]) -> float:
        """What is done of something in a second, with the shapes in proportion to an epoch's steps."""
        done = sum(typical.share * amount(typical.batch) for typical in self.mix)
        return done / sum(typical.share * self.seconds(index) for index, typical in enumerate(self.mix))


@dataclasses.dataclass(frozen=True)
class TorchCourses:
    """What is timed only beside PyTorch.

    Attributes:
      ours: our steps with AdamW; the configuration's own where that is AdamW.
      twin: the twin's, of padded rows.
      first: the first SunFish.
      first_times: the seconds of its steps.
      filled: the share of its positions that this corpus would fill, one text in each block.
    """

    ours: Course
    twin: Course
    first: FirstSunFishSteps
    first_times: list[float]
    filled: float


@dataclasses.dataclass(frozen=True)
class Measured:
    """All that was timed.

    Attributes:
      ours: our steps, as configured.
      ours_short: in as many forward passes as the plain network's.
      plain: those of the plain network, of padded rows.
      torch: what is timed beside PyTorch.
    """

    ours: Course
    ours_short: Course
    plain: Course
    torch: TorchCourses | None


def run(
    name: str,
    config: ConfigDict,
    repeats: int,
    plain_accumulate_steps: int,
    num_lengths: int,
    torch: TorchProcess | None,
) -> None:
    """Measures and prints; the arguments are those of train_step.py, `torch` a process to compare with or None.

    Raises:
      UserError: the configuration cannot be prepared, or has no plain network.
    """
    if config.prompt_encoder.name == "transformer":
        raise UserError(
            "config.prompt_encoder.name='transformer' has no plain network to compare with: "
            "choose minilm or gpt2, whose weights are not trained"
        )
    prepared = prepare_run(config)
    model, mesh = prepared.model, make_mesh(config.train.num_devices)
    state = make_state(config, prepared, mesh)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    print(f"{name}: {parameters:,} parameters, products in {model.number_format}, {mesh.size} device(s)")
    check_same_function(model, state.params, torch)
    rate = MatrixRate(model.dtype)
    rate.measure()

    mix, padded = typical_batches(config, prepared), padded_batches(config, prepared, num_lengths)
    fewer = min(plain_accumulate_steps, config.train.accumulate_steps)
    short_mix, short_padded = shortened(mix, fewer), shortened(padded, fewer)
    # Copied before our first step gives up the buffers.
    schedule = jax.tree.map(jnp.copy, state.schedule)
    plain_state = make_plain_state(config, plain_params(state.params), mesh)
    plain = faster_plain(config, model, mesh, schedule, plain_state, short_padded, repeats)
    ours = Course.of(our_steps(config, model, mesh, state), mix)
    short = ours if fewer == config.train.accumulate_steps else Course.of(ours.contender, short_mix)
    in_torch = None
    if torch is not None:
        in_torch = prepare_torch(torch, config, prepared, mesh, schedule, ours, padded, repeats)
    measured = Measured(ours, short, Course.of(plain, short_padded), in_torch)
    measure(measured, repeats, rate)
    report(name, config, model, rate, measured)


def make_state(config: ConfigDict, prepared: Prepared, mesh: Mesh) -> TrainState:
    """The state before the first step, laid out as in training."""

    def create():
        return create_state(config, prepared.model, prepared.token_counts())

    return jax.jit(create, out_shardings=state_shardings(jax.eval_shape(create), mesh))()


def our_steps(config: ConfigDict, model: TextDenoiser, mesh: Mesh, state: TrainState) -> JaxSteps:
    """Our training steps from a state, on cores as awake as in training."""
    return JaxSteps(make_train_step(config, model, mesh).compile, state, awake_cores)


def check_same_function(model: TextDenoiser, params: Mapping[str, Any], torch: TorchProcess | None) -> None:
    """Raises an AssertionError unless the networks compared with return our logits in float32."""
    params, inputs = moved(params), Inputs.random(model)
    ours = our_logits(model, params, inputs)
    check_same("plain Flax", ours, plain_logits(model, params, inputs))
    if torch is not None:
        make_twin(torch, model, params)
        for fused_attention in (True, False):
            check_same("the PyTorch twin", ours, twin_logits(torch, inputs, "float32", fused_attention))


def shortened(mix: list[Typical], passes: int) -> list[Typical]:
    """The batches with their first forward passes only."""
    return [
        dataclasses.replace(typical, batch=jax.tree.map(lambda leaf: leaf[:passes], typical.batch))
        for typical in mix
    ]


def most_frequent(mix: list[Typical]) -> AnyBatch:
    """The batch of the shape that most steps have."""
    return max(mix, key=lambda typical: typical.share).batch


def compiled_for(jitted: Callable) -> Callable:
    """Compiles a jitted step for the shapes of its arguments."""
    return lambda state, batch: jitted.lower(state, batch).compile()


def faster_plain(
    config: ConfigDict,
    model: TextDenoiser,
    mesh: Mesh,
    schedule: Schedule,
    state: PlainState,
    mix: list[Typical],
    repeats: int,
) -> JaxSteps:
    """The plain step in float32 or bfloat16, whichever is faster at the row length of most steps."""
    batch = most_frequent(mix)
    key = jax.random.key(config.train.seed)
    contenders, seconds = {}, {}
    for dtype in ("float32", "bfloat16"):
        step = make_plain_step(config, make_plain(model, jnp.dtype(dtype)), mesh, schedule, key)
        contenders[dtype] = JaxSteps(compiled_for(step), state)
        seconds[dtype] = statistics.median(contenders[dtype].seconds(batch) for _ in range(repeats))
        # One state for both: each gives it up to its next step.
        state = contenders[dtype].state
    best = min(seconds, key=seconds.get)
    contenders[best].state = state
    both = ", ".join(f"{dtype} {value:.3g}" for dtype, value in seconds.items())
    print(f"plain Flax, seconds a step of rows of {batch.tokens.shape[-1]}: {both}; {best} is taken", flush=True)
    return contenders[best]


def prepare_torch(
    torch: TorchProcess,
    config: ConfigDict,
    prepared: Prepared,
    mesh: Mesh,
    schedule: Schedule,
    ours: Course,
    padded: list[Typical],
    repeats: int,
) -> TorchCourses:
    """The PyTorch peers, ready to be timed, and our steps with the twin's optimiser; `ours` are as configured."""
    make_twin(torch, prepared.model, ours.contender.state.params)
    twin = TwinSteps(torch, config, schedule)
    twin.choose(most_frequent(padded), number_formats(prepared.model), repeats)
    first = FirstSunFishSteps(torch)
    print(f"the first SunFish: {first.parameters:,} parameters, {first.positions:,} positions a step", flush=True)
    ours_adamw = ours
    if config.optimizer.name != "adamw":
        adamw = config.copy_and_resolve_references()
        adamw.optimizer.name = "adamw"
        steps = our_steps(adamw, prepared.model, mesh, make_state(adamw, prepared, mesh))
        ours_adamw = Course.of(steps, ours.mix)
    lengths = np.minimum(prepared.splits["train"].lengths, first.block_size)
    return TorchCourses(
        ours=ours_adamw,
        twin=Course.of(twin, padded),
        first=first,
        first_times=[],
        filled=float(lengths.mean()) / first.block_size,
    )


def measure(measured: Measured, repeats: int, rate: MatrixRate) -> None:
    """Times everything in turn, the machine's products in between.

    Ours and theirs have shapes of their own: the shortest rows of each are timed in turn, then longer ones, and so
    on. Who has fewer shapes is timed at each of them more often: a machine may be faster while one shape is timed
    than at the next.
    """
    courses = [measured.ours, measured.ours_short, measured.plain]
    if measured.torch is not None:
        courses += [measured.torch.ours, measured.torch.twin]
    # Some may be the same one.
    courses = list({id(course): course for course in courses}.values())
    print("timing rows of", end="", flush=True)
    rounds = max(len(course.mix) for course in courses)
    for number in range(rounds):
        at_hand = [(course, number * len(course.mix) // rounds) for course in courses]
        lengths = sorted({course.mix[index].length for course, index in at_hand})
        print(f" {'/'.join(map(str, lengths))}", end="", flush=True)
        for _ in range(repeats):
            for course, index in at_hand:
                course.repeat(index)
            if measured.torch is not None:
                measured.torch.first.seconds()
                measured.torch.first_times.append(measured.torch.first.seconds())
        rate.measure()
    print()


def real_tokens(batch: AnyBatch) -> int:
    """Tokens that are no padding."""
    return int(batch.padding_mask.sum())


def report(name: str, config: ConfigDict, model: TextDenoiser, rate: MatrixRate, measured: Measured) -> None:
    """Prints a line for each shape of batch, the sums, and the JSON object."""

    def needed(batch: PackedBatch) -> float:
        return useful_flops(model, batch, config.diffusion)

    ours, short, plain, torch = (getattr(measured, field.name) for field in dataclasses.fields(Measured))
    peak = rate.flops_per_second
    shape = "[{}, {}] @ [{}, {}]".format(*rate.shape[:2], *rate.shape[1:])
    print(f"the machine's best {rate.dtype.name} product, {shape}: {peak / 1e9:.0f} GFLOP/s")
    print(f"a step is {config.train.accumulate_steps} forward passes", end="")
    print("" if short is ours else f"; beside plain Flax it is {len(short.mix[0].batch.tokens)} on both sides")
    titles = f"{'a pass':>6} {'of steps':>8} {'real':>6} {'tokens/s':>9}"
    print(f"{'rows up to':>10} {titles} {'of peak':>8}  ours, packed")
    for index, typical in enumerate(ours.mix):
        of_peak = needed(typical.batch) / ours.seconds(index) / peak
        print(f"{line_of(ours, index, typical.batch.lengths[0].size)} {of_peak:>8.1%}")
    rivals = {"plain Flax": plain} | ({"the twin": torch.twin} if torch else {})
    for rival, course in rivals.items():
        print(f"{'rows of':>10} {titles}  {rival}, padded")
        for index, typical in enumerate(course.mix):
            print(line_of(course, index, typical.batch.tokens.shape[1]))
    tokens_per_s, plain_tokens = ours.per_second(real_tokens), plain.per_second(real_tokens)
    result = {
        "config": name,
        "tokens_per_s": round(tokens_per_s, 1),
        "matmul_share": round(ours.per_second(needed) / peak, 4),
        "ratio_plain_flax": round(short.per_second(real_tokens) / plain_tokens, 3),
    }
    optimizer = config.optimizer.name
    print(f"real tokens/s: ours {tokens_per_s:.0f} with {optimizer}", end="")
    if short is not ours:
        print(f" ({short.per_second(real_tokens):.0f} beside plain Flax)", end="")
    print(f", plain Flax {plain_tokens:.0f} with {optimizer} (optax's)")
    if torch is not None:
        result |= torch_ratios(tokens_per_s, optimizer, torch)
    print(json.dumps(result), flush=True)


def line_of(course: Course, index: int, rows: int) -> str:
    """One shape of batch: its length, `rows` in a pass, share of steps, real share and real tokens per second."""
    typical = course.mix[index]
    tokens = real_tokens(typical.batch)
    return (
        f"{typical.length:>10} {rows:>6} {typical.share:>8.1%} {tokens / typical.batch.tokens.size:>6.1%} "
        f"{tokens / course.seconds(index):>9.0f}"
    )


def torch_ratios(tokens_per_s: float, optimizer: str, torch: TorchCourses) -> dict[str, float]:
    """Prints the comparison with PyTorch; returns its part of the JSON object."""
    if "torch" in sys.modules:
        raise AssertionError("PyTorch was imported beside JAX: the two did not have a process each")
    ours_adamw, twin = torch.ours.per_second(real_tokens), torch.twin.per_second(real_tokens)
    taken = torch.twin.contender.taken
    for variant in sorted(set(taken.values())):
        lengths = ", ".join(str(length) for length in sorted(taken) if taken[length] == variant)
        print(f"PyTorch twin, rows of {lengths}: {variant}")
    positions = torch.first.positions / statistics.median(torch.first_times)
    first = positions * torch.filled
    print(
        f"PyTorch twin {twin:.0f} with AdamW, ours with AdamW {ours_adamw:.0f}: {ours_adamw / twin:.2f} times it; "
        f"with {optimizer} {tokens_per_s / twin:.2f}"
    )
    print(
        f"the first SunFish {first:.0f} with AdamW, {torch.filled:.0%} of its {positions:.0f} positions/s: ours "
        f"with {optimizer} {tokens_per_s / first:.2f} times its real tokens, "
        f"{tokens_per_s / positions:.2f} times its positions"
    )
    return {
        "ratio_torch_twin": round(ours_adamw / twin, 3),
        "ratio_torch_twin_as_configured": round(tokens_per_s / twin, 3),
        "ratio_first_sunfish": round(tokens_per_s / positions, 3),
        "ratio_first_sunfish_real_tokens": round(tokens_per_s / first, 3),
    }
