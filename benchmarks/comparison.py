"""The measurement behind train_step.py."""

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from agreement import Inputs, check_same, moved, our_logits, plain_logits, twin_logits
from epoch_mix import Typical, typical_batches
from flops import useful_flops
from handover import Handover
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
from sunfish_jax.training.preparation import Prepared, prepare_run
from sunfish_jax.training.sharding import make_mesh, state_shardings
from sunfish_jax.training.state import TrainState, create_state
from sunfish_jax.training.step import make_train_step

AnyBatch = PackedBatch | PaddedBatch
# What ours may be compared with.
PLAIN_FLAX, TORCH_TWIN, FIRST_SUNFISH = "plain_flax", "torch_twin", "first_sunfish"


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
    ):
        self.state = state
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

    def take_turn(self, index: int, steps: int) -> None:
        """Times further steps of one of the shapes, as in training after one of the same contender's.

        The first after the others' turns is slower: memory that was freed went back to the system meanwhile.
        """
        batch = self.mix[index].batch
        self.contender.seconds(batch)
        self.times[index] += [self.contender.seconds(batch) for _ in range(steps)]

    def seconds(self, index: int) -> float:
        """The median of one of the shapes."""
        return statistics.median(self.times[index])

    def per_second(self, amount: Callable[[AnyBatch], float]) -> float:
        """What is done of something in a second, with the shapes in proportion to an epoch's steps."""
        done = sum(typical.share * amount(typical.batch) for typical in self.mix)
        return done / sum(typical.share * self.seconds(index) for index, typical in enumerate(self.mix))


@dataclasses.dataclass(frozen=True)
class PlainCourses:
    """What is timed beside plain Flax.

    Attributes:
      ours: our steps, in as many forward passes as the plain network's.
      plain: those of the plain network, of padded rows.
    """

    ours: Course
    plain: Course


@dataclasses.dataclass(frozen=True)
class TwinCourses:
    """What is timed beside the PyTorch twin.

    Attributes:
      ours: our steps with AdamW; the configuration's own where that is AdamW.
      twin: the twin's, of padded rows.
    """

    ours: Course
    twin: Course


@dataclasses.dataclass(frozen=True)
class FirstCourse:
    """What is timed of the first SunFish.

    Attributes:
      contender: its steps.
      times: the seconds of each.
      filled: the share of its positions that this corpus would fill, one text in each block.
    """

    contender: FirstSunFishSteps
    times: list[float]
    filled: float


@dataclasses.dataclass(frozen=True)
class Measured:
    """All that was timed; None what ours are not compared with.

    Attributes:
      ours: our steps, as configured.
      plain: plain Flax.
      twin: the PyTorch twin.
      first: the first SunFish.
    """

    ours: Course
    plain: PlainCourses | None = None
    twin: TwinCourses | None = None
    first: FirstCourse | None = None

    def courses(self) -> list[Course]:
        """All that have batches of a mix, each once."""
        courses = [self.ours]
        courses += [self.plain.ours, self.plain.plain] if self.plain else []
        courses += [self.twin.ours, self.twin.twin] if self.twin else []
        return list({id(course): course for course in courses}.values())


def run(
    name: str,
    config: ConfigDict,
    repeats: int,
    steps: int,
    plain_accumulate_steps: int,
    num_lengths: int,
    peers: Collection[str],
    torch: TorchProcess | None,
) -> None:
    """Measures and prints; the arguments are those of train_step.py, `torch` a process with PyTorch or None.

    Raises:
      UserError: the configuration cannot be prepared, or has no network to compare with.
    """
    of_our_network = {PLAIN_FLAX, TORCH_TWIN} & set(peers)
    if config.prompt_encoder.name == "transformer" and of_our_network:
        raise UserError(
            "config.prompt_encoder.name='transformer' has no plain Flax or PyTorch twin to compare "
            "with: choose minilm or gpt2, whose weights are not trained"
        )
    prepared = prepare_run(config)
    model, mesh = prepared.model, make_mesh(config.train.num_devices)
    state = make_state(config, prepared, mesh)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    print(f"{name}: {parameters:,} parameters, products in {model.number_format}, {mesh.size} device(s)")
    if of_our_network:
        check_same_function(model, state.params, peers, torch)
    rate, handover = MatrixRate(model.dtype), Handover()
    rate.measure()

    mix = typical_batches(config, prepared)
    padded = padded_batches(config, prepared, num_lengths) if of_our_network else []
    fewer = min(plain_accumulate_steps, config.train.accumulate_steps)
    # Copied before our first step gives up the buffers.
    schedule = jax.tree.map(jnp.copy, state.schedule)
    plain = twin = first = None
    if PLAIN_FLAX in peers:
        short_padded = shortened(padded, fewer)
        plain_state = make_plain_state(config, plain_params(state.params), mesh)
        steps_of_plain = faster_plain(config, model, mesh, schedule, plain_state, short_padded, repeats)
        plain = Course.of(steps_of_plain, short_padded)
    if TORCH_TWIN in peers:
        twin = fastest_twin(torch, config, model, state.params, schedule, padded, repeats)
    if FIRST_SUNFISH in peers:
        first = first_course(torch, prepared)
    ours = Course.of(our_steps(config, model, mesh, state), mix)
    short = ours
    if fewer != config.train.accumulate_steps:
        short = Course.of(ours.contender, shortened(mix, fewer))
    ours_adamw = ours
    if twin and config.optimizer.name != "adamw":
        adamw = config.copy_and_resolve_references()
        adamw.optimizer.name = "adamw"
        ours_adamw = Course.of(our_steps(adamw, model, mesh, make_state(adamw, prepared, mesh)), mix)
    measured = Measured(ours, plain and PlainCourses(short, plain), twin and TwinCourses(ours_adamw, twin), first)
    measure(measured, repeats, steps, rate, handover)
    report(name, config, model, rate, handover, measured)


def make_state(config: ConfigDict, prepared: Prepared, mesh: Mesh) -> TrainState:
    """The state before the first step, laid out as in training."""

    def create():
        return create_state(config, prepared.model, prepared.token_counts())

    return jax.jit(create, out_shardings=state_shardings(jax.eval_shape(create), mesh))()


def our_steps(config: ConfigDict, model: TextDenoiser, mesh: Mesh, state: TrainState) -> JaxSteps:
    """Our training steps from a state."""
    return JaxSteps(make_train_step(config, model, mesh).compile, state)


def check_same_function(
    model: TextDenoiser, params: Mapping[str, Any], peers: Collection[str], torch: TorchProcess | None
) -> None:
    """Raises an AssertionError unless those of the peers that have our network return our logits in float32."""
    params, inputs = moved(params), Inputs.random(model)
    ours = our_logits(model, params, inputs)
    if PLAIN_FLAX in peers:
        check_same("plain Flax", ours, plain_logits(model, params, inputs))
    if TORCH_TWIN in peers:
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


def fastest_twin(
    torch: TorchProcess,
    config: ConfigDict,
    model: TextDenoiser,
    params: Mapping[str, Any],
    schedule: Schedule,
    padded: list[Typical],
    repeats: int,
) -> Course:
    """The PyTorch twin with these weights, in the way that is fastest at the row length of most steps."""
    make_twin(torch, model, params)
    twin = TwinSteps(torch, config, schedule)
    twin.choose(most_frequent(padded), number_formats(model), repeats)
    return Course.of(twin, padded)


def first_course(torch: TorchProcess, prepared: Prepared) -> FirstCourse:
    """The first SunFish, not timed yet."""
    first = FirstSunFishSteps(torch)
    print(f"the first SunFish: {first.parameters:,} parameters, {first.positions:,} positions a step", flush=True)
    lengths = np.minimum(prepared.splits["train"].lengths, first.block_size)
    return FirstCourse(first, [], float(lengths.mean()) / first.block_size)


def measure(measured: Measured, repeats: int, steps: int, rate: MatrixRate, handover: Handover) -> None:
    """Times everything in turn, the machine's products and how near its cores are in between.

    Ours and theirs have shapes of their own: the shortest rows of each are timed in turn, then longer ones, and so
    on. Who has fewer shapes is timed at each of them more often: a machine may be faster while one shape is timed
    than at the next.
    """
    courses, first = measured.courses(), measured.first
    print("timing rows of", end="", flush=True)
    rounds = max(len(course.mix) for course in courses)
    for number in range(rounds):
        at_hand = [(course, number * len(course.mix) // rounds) for course in courses]
        lengths = sorted({course.mix[index].length for course, index in at_hand})
        print(f" {'/'.join(map(str, lengths))}", end="", flush=True)
        for _ in range(repeats):
            for course, index in at_hand:
                course.take_turn(index, steps)
                handover.measure()
            if first is not None:
                first.contender.seconds()
                first.times.extend(first.contender.seconds() for _ in range(steps))
        rate.measure()
    print()


def real_tokens(batch: AnyBatch) -> int:
    """Tokens that are no padding."""
    return int(batch.padding_mask.sum())


def report(
    name: str, config: ConfigDict, model: TextDenoiser, rate: MatrixRate, handover: Handover, measured: Measured
) -> None:
    """Prints a line for each shape of batch, the sums, and the JSON object."""

    def needed(batch: PackedBatch) -> float:
        return useful_flops(model, batch, config.diffusion)

    ours, plain, twin, first = (getattr(measured, field.name) for field in dataclasses.fields(Measured))
    peak, optimizer = rate.flops_per_second, config.optimizer.name
    shape = "[{}, {}] @ [{}, {}]".format(*rate.shape[:2], *rate.shape[1:])
    print(f"the machine's best {rate.dtype.name} product, {shape}: {peak / 1e9:.0f} GFLOP/s")
    print(f"what one core wrote another reads at {handover}")
    print(f"a step is {config.train.accumulate_steps} forward passes", end="")
    both = len(plain.ours.mix[0].batch.tokens) if plain else config.train.accumulate_steps
    print("" if both == config.train.accumulate_steps else f"; beside plain Flax it is {both} on both sides")
    titles = f"{'a pass':>6} {'of steps':>8} {'real':>6} {'tokens/s':>9}"
    print(f"{'rows up to':>10} {titles} {'of peak':>8}  ours, packed")
    for index, typical in enumerate(ours.mix):
        of_peak = needed(typical.batch) / ours.seconds(index) / peak
        print(f"{line_of(ours, index, typical.batch.lengths[0].size)} {of_peak:>8.1%}")
    rivals = {"plain Flax": plain and plain.plain, "the twin": twin and twin.twin}
    for rival, course in rivals.items():
        if course is not None:
            print(f"{'rows of':>10} {titles}  {rival}, padded")
            for index, typical in enumerate(course.mix):
                print(line_of(course, index, typical.batch.tokens.shape[1]))
    tokens_per_s = ours.per_second(real_tokens)
    result = {
        "config": name,
        "tokens_per_s": round(tokens_per_s, 1),
        "matmul_share": round(ours.per_second(needed) / peak, 4),
    }
    print(f"real tokens/s: ours {tokens_per_s:.0f} with {optimizer}")
    if plain is not None:
        result |= plain_ratio(optimizer, plain)
    if twin is not None:
        result |= twin_ratios(tokens_per_s, optimizer, twin)
    if first is not None:
        result |= first_ratios(tokens_per_s, optimizer, first)
    print(json.dumps(result), flush=True)


def line_of(course: Course, index: int, rows: int) -> str:
    """One shape of batch: its length, `rows` in a pass, share of steps, real share and real tokens per second."""
    typical = course.mix[index]
    tokens = real_tokens(typical.batch)
    return (
        f"{typical.length:>10} {rows:>6} {typical.share:>8.1%} {tokens / typical.batch.tokens.size:>6.1%} "
        f"{tokens / course.seconds(index):>9.0f}"
    )


def plain_ratio(optimizer: str, plain: PlainCourses) -> dict[str, float]:
    """Prints the comparison with plain Flax; returns its part of the JSON object."""
    ours, theirs = plain.ours.per_second(real_tokens), plain.plain.per_second(real_tokens)
    print(f"plain Flax {theirs:.0f} with {optimizer} (optax's), ours {ours:.0f}: {ours / theirs:.2f} times it")
    return {"ratio_plain_flax": round(ours / theirs, 3)}


def twin_ratios(tokens_per_s: float, optimizer: str, twin: TwinCourses) -> dict[str, float]:
    """Prints the comparison with the twin; returns its part of the JSON object."""
    check_processes()
    ours, theirs = twin.ours.per_second(real_tokens), twin.twin.per_second(real_tokens)
    taken = twin.twin.contender.taken
    for variant in sorted(set(taken.values())):
        lengths = ", ".join(str(length) for length in sorted(taken) if taken[length] == variant)
        print(f"PyTorch twin, rows of {lengths}: {variant}")
    print(
        f"PyTorch twin {theirs:.0f} with AdamW, ours with AdamW {ours:.0f}: {ours / theirs:.2f} times it; "
        f"with {optimizer} {tokens_per_s / theirs:.2f}"
    )
    return {
        "ratio_torch_twin": round(ours / theirs, 3),
        "ratio_torch_twin_as_configured": round(tokens_per_s / theirs, 3),
    }


def first_ratios(tokens_per_s: float, optimizer: str, first: FirstCourse) -> dict[str, float]:
    """Prints the comparison with the first SunFish; returns its part of the JSON object."""
    check_processes()
    positions = first.contender.positions / statistics.median(first.times)
    real = positions * first.filled
    print(
        f"the first SunFish {real:.0f} with AdamW, {first.filled:.0%} of its {positions:.0f} positions/s: ours "
        f"with {optimizer} {tokens_per_s / real:.2f} times its real tokens, "
        f"{tokens_per_s / positions:.2f} times its positions"
    )
    return {
        "ratio_first_sunfish": round(tokens_per_s / positions, 3),
        "ratio_first_sunfish_real_tokens": round(tokens_per_s / real, 3),
    }


def check_processes() -> None:
    """Raises an AssertionError if PyTorch was imported in this process."""
    if "torch" in sys.modules:
        raise AssertionError("PyTorch was imported beside JAX: the two did not have a process each")
