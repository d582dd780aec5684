"""Noise schedules: distributions over the noise level gamma.

A schedule maps a quantile u in (0, 1) to gamma; u grows with the noise. Training draws u uniformly, sampling
walks u from 1 to 0. `gumbel` is fitted while training; `linear`, `cosine` and `sqrt` are fixed, with u in the
place of the time t of the papers they come from. Every schedule is a pytree of fp32 scalars.
"""

import math

import flax.struct
import jax
import jax.numpy as jnp
import optax

from sunfish_jax.diffusion.names import SCHEDULES
from sunfish_jax.errors import UserError

# Where the fitted parameters must stay, whatever a few odd batches say. mu = ln D - 1.92 is 1.5 to 6 for any
# sensible D; a narrower beta would starve the ends of the range and could not recover.
MU_RANGE = (-5.0, 12.0)
BETA_RANGE = (0.25, 3.0)
ENTROPY_RANGE = (0.05, 20.0)

# Fixed schedules are cut at these noise levels: beyond them nothing is left to learn, or to remove.
FIXED_GAMMA_RANGE = (-10.0, 10.0)


@flax.struct.dataclass
class GumbelSchedule:
    """gamma ~ Gumbel(mu, beta), with `entropy * cdf(gamma)` fitted to the measured cross-entropy.

    The cdf is F(gamma) = exp(-exp(-(gamma - mu) / beta)). When the fit holds, equal steps of u remove equal
    amounts of information about the text (LangFlow, arXiv 2604.11748; CDCD's time warping, 2211.15089).

    Attributes:
      mu: [] mode.
      log_beta: [] log of the scale.
      log_entropy: [] log of the cross-entropy, in nats per token, that is approached in pure noise.
    """

    mu: jax.Array
    log_beta: jax.Array
    log_entropy: jax.Array

    def _standardized(self, gamma: jax.Array) -> jax.Array:
        return (gamma - self.mu) * jnp.exp(-self.log_beta)

    def gamma(self, u: jax.Array) -> jax.Array:
        """The noise level at quantile u, of any shape."""
        return self.mu - jnp.exp(self.log_beta) * jnp.log(-jnp.log(u))

    def cdf(self, gamma: jax.Array) -> jax.Array:
        """The quantile u of a noise level."""
        return jnp.exp(-jnp.exp(-self._standardized(gamma)))

    def log_pdf(self, gamma: jax.Array) -> jax.Array:
        """The log density of gamma."""
        standardized = self._standardized(gamma)
        return -standardized - jnp.exp(-standardized) - self.log_beta

    def predicted_cross_entropy(self, gamma: jax.Array) -> jax.Array:
        """The cross-entropy that the fit predicts at a noise level, in nats per token."""
        return jnp.exp(self.log_entropy) * self.cdf(gamma)


@flax.struct.dataclass
class _FixedSchedule:
    """A schedule given as gamma over time t, restricted to [gamma_min, gamma_max] and u in [0, 1].

    A subclass gives `gamma_at(t)`, its inverse `time_at(gamma)` and `log_speed(gamma)`, the log of dt/dgamma.
    """

    gamma_min: jax.Array
    gamma_max: jax.Array

    def gamma(self, u: jax.Array) -> jax.Array:
        """The noise level at quantile u, of any shape."""
        start, end = self.time_at(self.gamma_min), self.time_at(self.gamma_max)
        return jnp.clip(self.gamma_at(start + (end - start) * u), self.gamma_min, self.gamma_max)

    def cdf(self, gamma: jax.Array) -> jax.Array:
        """The quantile u of a noise level."""
        start, end = self.time_at(self.gamma_min), self.time_at(self.gamma_max)
        return (self.time_at(jnp.clip(gamma, self.gamma_min, self.gamma_max)) - start) / (end - start)

    def log_pdf(self, gamma: jax.Array) -> jax.Array:
        """The log density of gamma; -inf outside the range."""
        length = self.time_at(self.gamma_max) - self.time_at(self.gamma_min)
        inside = (gamma >= self.gamma_min) & (gamma <= self.gamma_max)
        return jnp.where(inside, self.log_speed(gamma) - jnp.log(length), -jnp.inf)


@flax.struct.dataclass
class LinearSchedule(_FixedSchedule):
    """beta linear in time: alpha^2 = exp(-I(t)), I(t) = 0.1 t + 19.9 t^2 / 2.

    The continuous form of DDPM's schedule (arXiv 2006.11239; the constants are those of 2011.13456, VP SDE).
    """

    def gamma_at(self, t: jax.Array) -> jax.Array:
        return jnp.log(jnp.expm1(0.1 * t + 9.95 * t**2))

    def time_at(self, gamma: jax.Array) -> jax.Array:
        # The root of 9.95 t^2 + 0.1 t = I in the form that does not subtract near-equal numbers.
        integral = jax.nn.softplus(gamma)
        return 2.0 * integral / (0.1 + jnp.sqrt(0.01 + 39.8 * integral))

    def log_speed(self, gamma: jax.Array) -> jax.Array:
        return jax.nn.log_sigmoid(gamma) - jnp.log(0.1 + 19.9 * self.time_at(gamma))


@flax.struct.dataclass
class CosineSchedule(_FixedSchedule):
    """alpha = cos(pi t / 2), so gamma = 2 ln tan(pi t / 2) (arXiv 2102.09672, without its offset)."""

    def gamma_at(self, t: jax.Array) -> jax.Array:
        return 2.0 * jnp.log(jnp.tan(0.5 * math.pi * t))

    def time_at(self, gamma: jax.Array) -> jax.Array:
        return 2.0 / math.pi * jnp.arctan(jnp.exp(0.5 * gamma))

    def log_speed(self, gamma: jax.Array) -> jax.Array:
        # dt/dgamma = 1 / (2 pi cosh(gamma / 2)), and 2 cosh(x) = e^x + e^-x.
        return -math.log(math.pi) - jnp.logaddexp(0.5 * gamma, -0.5 * gamma)


@flax.struct.dataclass
class SqrtSchedule(_FixedSchedule):
    """sigma^2 = sqrt(t + 1e-4): much noise from the start, which suits text (Diffusion-LM, 2205.14217)."""

    def gamma_at(self, t: jax.Array) -> jax.Array:
        variance = jnp.sqrt(t + 1e-4)
        return jnp.log(variance) - jnp.log1p(-variance)

    def time_at(self, gamma: jax.Array) -> jax.Array:
        return jax.nn.sigmoid(gamma) ** 2 - 1e-4

    def log_speed(self, gamma: jax.Array) -> jax.Array:
        return math.log(2.0) + 2.0 * jax.nn.log_sigmoid(gamma) + jax.nn.log_sigmoid(-gamma)


Schedule = GumbelSchedule | LinearSchedule | CosineSchedule | SqrtSchedule


def make_schedule(name: str, embedding_dim: int, vocab_size: int) -> Schedule:
    """The schedule of that name as it is before training.

    Args:
      name: one of `SCHEDULES`.
      embedding_dim: D, the dimension (and squared norm) of the token embeddings.
      vocab_size: number of tokens; a model that knows nothing has cross-entropy ln(vocab_size).

    Raises:
      UserError: no schedule has that name.
    """
    low, high = (jnp.float32(bound) for bound in FIXED_GAMMA_RANGE)
    if name == "gumbel":
        return GumbelSchedule(
            mu=jnp.float32(math.log(embedding_dim) - 1.92),
            log_beta=jnp.float32(math.log(0.85)),
            log_entropy=jnp.float32(math.log(math.log(vocab_size))),
        )
    if name == "linear":
        return LinearSchedule(gamma_min=low, gamma_max=high)
    if name == "cosine":
        return CosineSchedule(gamma_min=low, gamma_max=high)
    if name == "sqrt":
        # At t = 0 its noise is already 0.01.
        return SqrtSchedule(gamma_min=jnp.float32(math.log(0.01 / 0.99)), gamma_max=high)
    raise UserError(f"diffusion.schedule is {name!r}; choose one of {', '.join(SCHEDULES)}")


def fit_schedule(
    schedule: Schedule,
    opt_state: optax.OptState,
    optimizer: optax.GradientTransformation,
    gamma: jax.Array,
    cross_entropy: jax.Array,
    weight: jax.Array,
) -> tuple[Schedule, optax.OptState]:
    """One step towards `entropy * cdf(gamma) = cross_entropy`; fixed schedules come back as they are.

    Args:
      schedule: the schedule that gamma was drawn from.
      opt_state: state of `optimizer`, made by `optimizer.init(schedule)`.
      optimizer: what takes the gradient step on the mean squared error.
      gamma: [n] noise levels of the step's rows.
      cross_entropy: [n] measured mean cross-entropy of each row, in nats per token.
      weight: [n] how much each row counts; 0 leaves it out.

    Returns:
      The schedule after the step, within `MU_RANGE`, `BETA_RANGE` and `ENTROPY_RANGE`, and the new state.
    """
    if not isinstance(schedule, GumbelSchedule):
        return schedule, opt_state
    # An untrained network may be confidently wrong: a cross-entropy far above the entropy says nothing about
    # where the information lies, and must not drag the fit along.
    ceiling = 2.0 * jnp.exp(schedule.log_entropy)
    target = jax.lax.stop_gradient(jnp.clip(cross_entropy, 0.0, ceiling))

    def mean_squared_error(candidate: GumbelSchedule) -> jax.Array:
        errors = candidate.predicted_cross_entropy(gamma) - target
        return jnp.sum(weight * errors**2) / jnp.maximum(jnp.sum(weight), 1e-6)

    gradient = jax.grad(mean_squared_error)(schedule)
    updates, opt_state = optimizer.update(gradient, opt_state, schedule)
    moved = optax.apply_updates(schedule, updates)
    bounded = GumbelSchedule(
        mu=jnp.clip(moved.mu, *MU_RANGE),
        log_beta=jnp.clip(moved.log_beta, *map(math.log, BETA_RANGE)),
        log_entropy=jnp.clip(moved.log_entropy, *map(math.log, ENTROPY_RANGE)),
    )
    return bounded, opt_state
