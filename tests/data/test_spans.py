import numpy as np

from sunfish_jax.data.spans import known_spans


def spans(row):
    """Lengths of the runs of equal values."""
    edges = np.flatnonzero(np.diff(row.astype(int))) + 1
    return np.diff(np.concatenate([[0], edges, [len(row)]]))


def test_share_of_rows_and_of_tokens():
    padding_mask = np.arange(100) < np.random.default_rng(1).integers(60, 101, 4000)[:, None]
    known = known_spans(np.random.default_rng(0), padding_mask, 0.25)
    assert not (known & ~padding_mask).any()
    rows = known.any(axis=1)
    assert abs(rows.mean() - 0.25) < 0.03
    share = known[rows].sum(1) / padding_mask[rows].sum(1)
    # Uniform in 10-90 %: mean 0.5, and as many rows below 30 % as between 30 and 50 %.
    assert abs(share.mean() - 0.5) < 0.03
    assert abs(np.mean(share < 0.3) - 0.27) < 0.06 and abs(np.mean(share > 0.7) - 0.27) < 0.06
    # Every position is as likely to be known as any other.
    at = known[rows][:, :60].mean(0)
    assert at.max() - at.min() < 0.15


def test_known_tokens_come_in_spans_of_varied_length():
    known = known_spans(np.random.default_rng(0), np.ones((500, 128), bool), 1.0)
    mean_lengths = np.array([spans(row).mean() for row in known])
    # Independent draws at rates of 10-90 % would give 2 to 5.6.
    assert np.mean(mean_lengths) > 5
    assert (mean_lengths < 3).any() and (mean_lengths > 10).any()


def test_none_and_reproducible():
    mask = np.ones((50, 32), bool)
    assert not known_spans(np.random.default_rng(0), mask, 0.0).any()
    one, other = (known_spans(np.random.default_rng(3), mask, 0.5) for _ in range(2))
    np.testing.assert_array_equal(one, other)
