"""Which tokens are given clean in training, so that the model learns to fill gaps."""

import numpy as np

# The mean length in tokens of the shorter kind of span (known or gap) is drawn from this range for each row.
_MEAN_SPAN = (1.0, 8.0)
_KNOWN_SHARE = (0.1, 0.9)


def known_spans(rng: np.random.Generator, padding_mask: np.ndarray, fraction: float) -> np.ndarray:
    """Draws rows with known and unknown spans by turns; in the other rows nothing is known.

    Each chosen row draws the share of its tokens that is known and the mean length of its spans; span lengths
    are geometric, so that every token has the same chance of being known.

    Args:
      rng: is drawn from in the same way whatever the masks hold.
      padding_mask: `[n, S]` bool, True at real tokens.
      fraction: the share of rows with known tokens.

    Returns:
      `[n, S]` bool, True at known tokens; never at padding.
    """
    n, length = padding_mask.shape
    chosen = rng.random(n) < fraction
    share = rng.uniform(*_KNOWN_SHARE, n)
    shorter = rng.uniform(*_MEAN_SPAN, n)
    known_length = np.where(share < 0.5, shorter, shorter * share / (1 - share))
    gap_length = np.where(share < 0.5, shorter * (1 - share) / share, shorter)
    # A two-state Markov chain, started in its stationary distribution, has exactly such spans.
    leave = np.stack([1 / gap_length, 1 / known_length], axis=-1)  # [n, 2], from gap and from known
    known = np.empty((n, length), bool)
    known[:, 0] = rng.random(n) < share
    changes = rng.random((length, n))
    for position in range(1, length):
        before = known[:, position - 1]
        known[:, position] = before ^ (changes[position] < np.where(before, leave[:, 1], leave[:, 0]))
    return known & padding_mask & chosen[:, None]
