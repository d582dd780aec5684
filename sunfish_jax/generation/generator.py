"""One compiled function from prompts and random keys to rows of tokens."""

import functools
import math
import zlib
from collections.abc import Mapping, Sequence

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from sunfish_jax.diffusion import samplers
from sunfish_jax.diffusion.guidance import guided
from sunfish_jax.diffusion.schedules import Schedule
from sunfish_jax.generation.gaps import Layout
from sunfish_jax.generation.options import Settings
from sunfish_jax.generation.output import StepCounter
from sunfish_jax.models.denoiser import PromptKeysValues, compute_params, quantized_kernels
from sunfish_jax.models.prompt import Prompt
from sunfish_jax.ops.rows import PackedRows

# Positions in one call: more rows are done in turns, so that the logits fit into memory.
_POSITIONS_AT_ONCE = 2048
# What a sample's length is drawn by, where a pass has its number.
_LENGTH = 2**32 - 1


@flax.struct.dataclass
class Constraint:
    """What must stand where.

    Attributes:
        known: Given tokens, [n, S].
        kinds: [n, S] int32, a row of `allowed` for each position that is not given.
        allowed: [K, V] bool.
    """

    known: samplers.Known
    kinds: np.ndarray | jax.Array
    allowed: np.ndarray | jax.Array

    @classmethod
    def of(cls, layouts: Sequence[Layout], allowed: np.ndarray) -> "Constraint":
        """The constraint that rows of a text with gaps make, one layout a row."""
        tokens, known, kinds = (
            np.stack([getattr(layout, name) for layout in layouts]) for name in ("tokens", "known", "kinds")
        )
        return cls(samplers.Known(tokens, known), kinds, allowed)


def sample_keys(seed: int, indices: np.ndarray) -> jax.Array:
    """The random keys [n] of samples: by seed and number, whatever else is sampled beside them."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.asarray(indices, jnp.uint32))


def text_keys(seed: int, prompts: Sequence[str | None], indices: np.ndarray) -> jax.Array:
    """The random keys [n] of samples for prompts, of which each has its own.

    From the same noise, texts for different prompts would share words that have nothing to do with either.

    Args:
        seed: The person's.
        prompts: One for each sample; None for no prompt.
        indices: [n] the sample's number among those of its prompt.
    """
    hashes = np.array([zlib.crc32((prompt or "").encode()) for prompt in prompts], np.uint32)
    return jax.vmap(jax.random.fold_in)(sample_keys(seed, indices), hashes)


def drawn_lengths(keys: jax.Array, counts: np.ndarray, longest: int) -> np.ndarray:
    """How many positions each of some texts gets: as many as a row of the training text has, drawn at random.

    A row is seldom padded in training, so the model fills all that a text is given; its length is not the model's
    to choose.

    Args:
        keys: [n] the samples' random keys.
        counts: How many rows have each length, [1 + longest row].
        longest: The most that is asked for.

    Returns:
        [n] from 1 to `longest`.
    """
    uniforms = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, _LENGTH)))(keys)
    lengths = np.searchsorted(np.cumsum(counts), np.asarray(uniforms, np.float64) * counts.sum(), side="right")
    return np.clip(lengths, 1, longest).astype(np.int32)


def take_rows(tree, rows: np.ndarray):
    """The rows of those numbers, of every array in a pytree."""
    return jax.tree.map(lambda leaf: leaf[rows], tree)


def generate(
    model: nn.Module,
    params: Mapping,
    schedule: Schedule,
    prompt: Prompt,
    keys: jax.Array,
    seq_len: int,
    settings: Settings,
    *,
    lengths: np.ndarray | None = None,
    constraint: Constraint | None = None,
    counter: StepCounter | None = None,
) -> np.ndarray:
    """Samples n rows of tokens, compiled once for a shape.

    The prompts' keys and values are computed once, and the steps are one `lax.scan`. A row depends on its
    prompt, its key and the settings, not on the rows beside it (up to the rounding of matrix products).

    Args:
        model: The denoiser.
        params: Its parameters; the moving average, usually.
        schedule: The run's schedule, with concrete values.
        prompt: [n, P]; where a row's mask is all False, there is no guidance.
        keys: [n] random keys.
        seq_len: S.
        settings: How to sample.
        lengths: [n] the positions of each row, of which nothing else is read; None for all S.
        constraint: Given tokens and what may stand beside them; None for free text.
        counter: Shows the steps; None for silence.

    Returns:
        [n, S] int32, of which what lies behind a row means nothing.
    """
    n = len(keys)
    lengths = None if lengths is None else np.asarray(lengths, np.int32)
    steps = samplers.make_steps(schedule, settings.num_steps, settings.scheduler)
    interval = schedule.gamma(jnp.asarray(settings.guidance_interval, jnp.float32))
    # Without any prompt both halves of a guided pass would be the same.
    scale = float(settings.guidance_scale) if np.any(prompt.mask) else 1.0
    turns = math.ceil(n / max(1, _POSITIONS_AT_ONCE // seq_len))
    size = math.ceil(n / turns)
    tokens = []
    for start in range(0, n, size):
        # The last turn repeats rows rather than being compiled for another shape.
        rows = np.minimum(np.arange(start, start + size), n - 1)
        here = constraint and constraint.replace(
            known=take_rows(constraint.known, rows), kinds=constraint.kinds[rows]
        )
        if counter is not None:
            counter.start(start, min(start + size, n), n, settings.num_steps)
        tokens.append(
            _generate(
                model, params, take_rows(prompt, rows), keys[rows], steps, interval, settings.temperature,
                None if lengths is None else lengths[rows], here,
                seq_len=seq_len, guidance_scale=scale, counter=counter,
            )
        )  # fmt: skip
        jax.block_until_ready(tokens[-1])
        jax.effects_barrier()
    return np.concatenate(tokens)[:n]


@functools.partial(jax.jit, static_argnames=("model", "seq_len", "guidance_scale", "counter"))
def _generate(
    model,
    params,
    prompt,
    keys,
    steps,
    interval,
    temperature,
    lengths,
    constraint,
    *,
    seq_len,
    guidance_scale,
    counter,
):
    # Before the scan: out of the branches that guidance chooses from, XLA would not take it.
    narrow = compute_params(params, model.dtype)
    variables = {"params": narrow} | quantized_kernels(model, narrow)
    batch = len(keys)
    known = jnp.zeros((batch, seq_len), bool) if constraint is None else constraint.known.mask

    def encode(prompt: Prompt) -> PromptKeysValues:
        return model.apply(variables, prompt, method="encode_prompt")

    vocabulary = model.apply(variables, method="vocabulary")
    if constraint is not None:
        # What the network makes of a given token it is told in the next pass as it is, as in training.
        possible = constraint.allowed[constraint.kinds] | known[..., None]

    # As in training, where rows lie in packs: here one in each.
    packed = {} if lengths is None else {"packed": PackedRows.in_packs(lengths[:, None], seq_len, seq_len)}

    def features(z, gamma, x_hat, *prompts):
        return model.apply(variables, vocabulary, z, gamma, x_hat, known, *prompts, **packed, method="features")

    # Of a prompt that is not given, one position is read.
    no_prompt = jax.tree.map(lambda leaf: jnp.zeros_like(leaf[:, :1]), prompt)
    shape = (batch, seq_len, len(vocabulary.head))
    guided_features, kept = guided(
        features, encode(prompt), encode(no_prompt), guidance_scale, tuple(interval), shape
    )

    def denoise(z, gamma, x_hat, kept):
        combined, kept = guided_features(z, gamma, x_hat, kept)
        logits = vocabulary.logits(combined)
        if constraint is not None:
            # After guidance, which would take the difference of two infinities.
            logits = jnp.where(possible, logits, -jnp.inf)
        return logits, kept

    return samplers.sample(
        denoise,
        vocabulary.embeddings,
        steps,
        keys=keys,
        length=seq_len,
        compute_dtype=model.dtype,
        temperature=temperature,
        known=constraint and constraint.known,
        kept=kept,
        step_callback=counter,
    )
