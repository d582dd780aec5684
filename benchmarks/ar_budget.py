"""How long the twin is trained: for some time, or for as many steps as another run took in it."""

import dataclasses
import math

from sunfish_jax.workdir.progress import Progress


@dataclasses.dataclass(frozen=True)
class Budget:
    """What a run may spend over all its sittings; one of the two is given.

    Attributes:
      seconds: of training steps.
      num_steps: training steps.
    """

    seconds: float | None = None
    num_steps: int | None = None

    def spent(self, progress: Progress) -> float:
        """The share of it that is spent, 0 to 1 or a little over."""
        if self.num_steps is not None:
            return progress.step / self.num_steps
        return progress.seconds / self.seconds

    def seconds_left(self, progress: Progress) -> float:
        """Of training steps, at the pace so far: of one step at least."""
        return max(0.0, progress.seconds / self.spent(progress) - progress.seconds)


def learning_rate_share(spent: float, step: int, warmup_steps: int) -> float:
    """The share of the full learning rate for the step after `step` steps, when a share of the budget is spent.

    A cosine from 1 to 0, times a linear warm-up of `warmup_steps` or half the budget, whichever is shorter.
    """
    warmup = min(1.0, max(step / max(1, warmup_steps), 2.0 * spent))
    return 0.5 * warmup * (1.0 + math.cos(math.pi * min(1.0, spent)))
