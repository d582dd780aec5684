"""How long a gap should be, chosen by the denoiser."""

import functools
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sunfish_jax.diffusion import process, samplers
from sunfish_jax.diffusion.schedules import Schedule
from sunfish_jax.generation import gaps
from sunfish_jax.generation.generator import Constraint, generate, sample_keys, take_rows
from sunfish_jax.generation.options import Settings
from sunfish_jax.generation.output import StepCounter
from sunfish_jax.models.prompt import Prompt

# Each length is tried with this many fillings, of no more steps than this.
_TRIES, _STEPS = 2, 16
# A filling is judged together with the given tokens this near to it, which are the same for every length.
_NEIGHBOURS = 4
# One token in this many is hidden at a time when a filling is judged: what is next to it is then given.
_HIDDEN_EVERY = 3
# Keeps the search's noise apart from that of the samples, numbered from 0.
_FIRST_INDEX = 1 << 20


def choose_lengths(
    model: nn.Module,
    params: Mapping,
    schedule: Schedule,
    tokenizer,
    template: gaps.Template,
    prompt: Prompt,
    seq_len: int,
    settings: Settings,
    *,
    max_gap: int,
    seed: int,
    counter: StepCounter | None = None,
) -> list[int]:
    """Lengths for all gaps of a template; those that have one keep it.

    The text is filled `2 max_gap` times: every free gap gets each length from 1 to `max_gap` twice, paired at
    random with the other gaps' lengths. A filling's score is the mean log-probability of the gap's tokens and
    of the given ones within 4 of it, each hidden in noise while its neighbours are given clean (a
    pseudo-likelihood, Salazar et al. 2020, 1910.14659, hiding every third token at once). The given ones are
    in it because a gap that is too short or too long shows in how badly they fit, and the mean because a sum
    favours the shortest. Each gap gets the length of its best filling.

    Args:
        model, params, schedule, settings: As for `generate`.
        tokenizer: The run's.
        template: The text.
        prompt: [1, P].
        seq_len: S, enough for all gaps at `max_gap`.
        max_gap: The longest a free gap may be.
        seed: The same seed gives the same lengths.
        counter: Shows the steps.

    Returns:
        As many lengths as there are gaps.
    """
    free = [i for i, gap in enumerate(template.gaps) if gap.length is None]
    lengths = np.array([gap.length or 0 for gap in template.gaps])
    if not free:
        return lengths.tolist()
    rng = np.random.default_rng(seed)
    tried = np.tile(lengths, (_TRIES * max_gap, 1))
    for i in free:
        tried[:, i] = rng.permutation(np.tile(np.arange(1, max_gap + 1), _TRIES))
    layouts = [gaps.lay_out(template, row.tolist(), seq_len, tokenizer) for row in tried]
    constraint = Constraint.of(layouts, gaps.allowed_tokens(tokenizer, model.vocab_size))
    n = len(layouts)
    prompt = take_rows(prompt, np.zeros(n, int))
    keys = sample_keys(seed, _FIRST_INDEX + np.arange(n))
    search = settings.with_steps(min(settings.num_steps, _STEPS))
    tokens = generate(
        model, params, schedule, prompt, keys, seq_len, search, constraint=constraint, counter=counter
    )
    scores = _scores(model, params, schedule, prompt, keys, tokens, layouts)
    for i in free:
        best = [scores[tried[:, i] == length, i].max() for length in range(1, max_gap + 1)]
        lengths[i] = 1 + int(np.argmax(best))
    return lengths.tolist()


def _scores(model, params, schedule, prompt, keys, tokens, layouts) -> np.ndarray:
    """Score of each gap of each filling, [n, gaps]."""
    n, seq_len = tokens.shape
    real = np.stack([layout.known | (layout.kinds != gaps.PADDING) for layout in layouts])
    windows = np.zeros((n, len(layouts[0].gaps), seq_len), bool)
    for row, layout in enumerate(layouts):
        for i, (start, stop) in enumerate(layout.gaps):
            windows[row, i, max(0, start - _NEIGHBOURS) : stop + _NEIGHBOURS] = True
    windows &= real[:, None]
    judged = windows.any(axis=1)
    log_probs = np.zeros((n, seq_len))
    gamma = schedule.gamma(jnp.float32(samplers.FIRST_QUANTILE))
    for phase in range(_HIDDEN_EVERY):
        hidden = judged & (np.arange(seq_len) % _HIDDEN_EVERY == phase)
        losses = _cross_entropy(model, params, prompt, keys, tokens, real & ~hidden, gamma)
        log_probs -= np.where(hidden, losses, 0.0)
    return (windows * log_probs[:, None]).sum(axis=-1) / windows.sum(axis=-1)


@functools.partial(jax.jit, static_argnums=0)
def _cross_entropy(model, params, prompt, keys, tokens, known, gamma):
    """Cross-entropy of tokens [n, S] noised to one level, but for the known ones, in nats."""
    variables = {"params": params}
    vocabulary = model.apply(variables, method="vocabulary")
    clean = vocabulary.embeddings[tokens]
    noise = jax.vmap(lambda key: jax.random.normal(key, clean.shape[1:]))(keys)
    gamma = jnp.full(len(keys), gamma)
    z = jnp.where(known[..., None], clean, process.diffuse(clean, noise, gamma))
    prompt_kv = model.apply(variables, prompt, method="encode_prompt")
    no_estimate = jnp.zeros_like(z)
    return model.apply(
        variables, vocabulary, tokens, z, gamma, no_estimate, known, prompt_kv, method="cross_entropy"
    )
