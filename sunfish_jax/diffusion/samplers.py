"""Samplers: from noise to tokens in a given number of network passes.

DDIM, DDPM and DPM-Solver++(2M) differ only in four numbers a step, so there is one step function:
`z <- a z + b x_hat + c x_hat_prev + d noise`. The numbers are computed on the host in float64.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from sunfish_jax.diffusion import process
from sunfish_jax.diffusion.guidance import Denoise
from sunfish_jax.diffusion.names import SCHEDULERS
from sunfish_jax.diffusion.schedules import Schedule
from sunfish_jax.errors import UserError
from sunfish_jax.ops.cross_entropy import expected_embedding

# The first and the last noise level, as quantiles of the schedule.
FIRST_QUANTILE, LAST_QUANTILE = 1.0 - 1e-3, 1e-3


@flax.struct.dataclass
class Steps:
    """What the sampler does at each of its N network passes; arrays of [N] fp32.

    Attributes:
      gamma: noise level that the pass is made at.
      z, x_hat, x_hat_prev, noise: factors of these in the z of the next pass. The last pass has no next one.
    """

    gamma: jax.Array
    z: jax.Array
    x_hat: jax.Array
    x_hat_prev: jax.Array
    noise: jax.Array


@flax.struct.dataclass
class Known:
    """Tokens that are given, as in infilling.

    Attributes:
      tokens: [B, S] int32.
      mask: [B, S] bool, True where the token is given; elsewhere `tokens` is not read.
    """

    tokens: jax.Array
    mask: jax.Array


def make_steps(schedule: Schedule, num_steps: int, scheduler: str) -> Steps:
    """Tabulates a sampler, at quantiles from 1 - 1e-3 down to 1e-3 in equal steps.

    In float64, on the host: at the ends of the range fp32 loses the digits that the differences of alpha and
    gamma consist of. A step goes from noise level t to s < t:

      ddim: z <- alpha_s x_hat + sigma_s (z - alpha_t x_hat) / sigma_t  (arXiv 2010.02502)
      ddpm: c = -expm1(gamma_s - gamma_t);
        z <- (1 - c) (alpha_s / alpha_t) z + c alpha_s x_hat + sqrt(c) sigma_s noise  (arXiv 2107.00630, A.4)
      dpmpp: h = (gamma_t - gamma_s) / 2, r = h_prev / h; D = (1 + 1 / 2r) x_hat - 1 / 2r x_hat_prev;
        z <- (sigma_s / sigma_t) z - alpha_s expm1(-h) D  (DPM-Solver++ 2M, arXiv 2211.01095; first DDIM)

    Args:
      schedule: the run's schedule, with concrete values.
      num_steps: N, the number of network passes, without those that guidance adds.
      scheduler: one of `SCHEDULERS`.

    Raises:
      UserError: `num_steps` is under 1, or no scheduler has that name.
    """
    if num_steps < 1:
        raise UserError(f"num_steps is {num_steps}; sampling takes at least 1 step, and usually 10 to 100")
    if scheduler not in SCHEDULERS:
        raise UserError(f"scheduler is {scheduler!r}; choose one of {', '.join(SCHEDULERS)}")
    with jax.enable_x64(True):
        u = jnp.linspace(FIRST_QUANTILE, LAST_QUANTILE, num_steps, dtype=jnp.float64)
        gamma_of_pass = schedule.gamma(u)
        levels = (gamma_of_pass, process.alpha(gamma_of_pass), process.sigma(gamma_of_pass))
        gamma, alpha, sigma = (np.asarray(level, np.float64) for level in levels)

    gamma_t, alpha_t, sigma_t = gamma[:-1], alpha[:-1], sigma[:-1]
    gamma_s, alpha_s, sigma_s = gamma[1:], alpha[1:], sigma[1:]
    zeros = np.zeros(num_steps - 1)
    if scheduler == "ddim":
        ratio = sigma_s / sigma_t
        factors = (ratio, alpha_s - alpha_t * ratio, zeros, zeros)
    elif scheduler == "ddpm":
        c = -np.expm1(gamma_s - gamma_t)
        factors = ((1 - c) * alpha_s / alpha_t, c * alpha_s, zeros, np.sqrt(c) * sigma_s)
    else:
        h = (gamma_t - gamma_s) / 2
        # 1 / 2r, which is 0 in the first step: there is no x_hat before it.
        extrapolation = np.append(0.0, h[1:] / (2 * h[:-1]))[: num_steps - 1]
        gain = -alpha_s * np.expm1(-h)
        factors = (sigma_s / sigma_t, gain * (1 + extrapolation), -gain * extrapolation, zeros)
    z, x_hat, x_hat_prev, noise = (np.append(factor, 0.0).astype(np.float32) for factor in factors)
    return Steps(gamma=gamma.astype(np.float32), z=z, x_hat=x_hat, x_hat_prev=x_hat_prev, noise=noise)


def sample(
    denoise: Denoise,
    embedding_table: jax.Array,
    steps: Steps,
    *,
    keys: jax.Array,
    length: int,
    compute_dtype: jnp.dtype = jnp.float32,
    temperature: float | jax.Array = 1.0,
    known: Known | None = None,
    kept: Any = None,
    step_callback: Callable[[int], None] | None = None,
) -> jax.Array:
    """Samples rows of tokens; to be called under `jax.jit`, with `steps` among the arguments.

    The steps are a `lax.scan`, so any number of them compiles one network. The network's last estimate is
    carried to the next pass (self-conditioning, arXiv 2208.04202); the first pass gets zeros.

    Args:
      denoise: the network, with its prompt and the known mask closed over.
      embedding_table: [V, D] embeddings of norm sqrt(D).
      steps: what `make_steps` tabulated.
      keys: [B] random keys, one for each row, whose noise does not depend on the rows beside it.
      length: S, the tokens of a row.
      compute_dtype: what the product with the embeddings is computed in.
      temperature: divides the logits; under 1 the estimates are drawn towards the likeliest tokens.
      known: tokens that are given: clean in every pass, and returned as they are.
      kept: what `denoise` gets in its first pass; later ones get what the last one returned.
      step_callback: called on the host with the number of passes made, after each. Wait for the last call with
        `jax.effects_barrier()`.

    Returns:
      [B, S] int32, the likeliest tokens of the last pass.
    """
    num_rows, embedding_dim = len(keys), embedding_table.shape[1]
    shape = (num_rows, length)

    def noise_of_pass(i: jax.Array | int) -> jax.Array:
        pass_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, i)
        return jax.vmap(lambda pass_key: jax.random.normal(pass_key, (length, embedding_dim)))(pass_keys)

    def with_known(values: jax.Array, given: jax.Array) -> jax.Array:
        mask = known.mask.reshape(known.mask.shape + (1,) * (values.ndim - 2))
        return jnp.where(mask, given, values)

    low_table = embedding_table.astype(compute_dtype)
    num_steps = steps.gamma.shape[0]

    def likeliest(logits: jax.Array) -> jax.Array:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def step(carry, i_and_factors):
        z, x_hat_prev, tokens, kept = carry
        i, factors = i_and_factors
        if known is not None:
            z = with_known(z, embedding_table[known.tokens])
        logits, kept = denoise(z, jnp.full(num_rows, factors.gamma), x_hat_prev, kept)
        x_hat = expected_embedding(logits / temperature, low_table)
        # XLA:CPU takes as long for an argmax over the vocabulary as for a transformer layer: it is made once.
        tokens = jax.lax.cond(i == num_steps - 1, likeliest, lambda logits: tokens, logits)
        if step_callback is not None:
            # One number of this pass is sent along, so that it is made when the host hears of it.
            jax.debug.callback(lambda i, _: step_callback(int(i) + 1), i, x_hat[0, 0, 0])
        z = factors.z * z + factors.x_hat * x_hat + factors.x_hat_prev * x_hat_prev
        # Only DDPM draws noise: the others are spared its cost.
        z = jax.lax.cond(factors.noise > 0, lambda z: z + factors.noise * noise_of_pass(i + 1), lambda z: z, z)
        return (z, x_hat, tokens, kept), None

    start = (noise_of_pass(0), jnp.zeros((*shape, embedding_dim)), jnp.zeros(shape, jnp.int32), kept)
    (_, _, tokens, _), _ = jax.lax.scan(step, start, (jnp.arange(num_steps), steps))
    return tokens if known is None else with_known(tokens, known.tokens)
