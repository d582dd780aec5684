import math

import numpy as np
import pytest

from sunfish_jax.evaluation.ratio import ratio_of_sums


def test_of_equal_denominators_it_is_the_mean_and_its_error():
    values = np.array([1.0, 4.0, 2.0, 7.0])
    ratio, error = ratio_of_sums(2 * values, np.full(4, 2))
    assert ratio == pytest.approx(values.mean())
    assert error == pytest.approx(values.std(ddof=1) / math.sqrt(4))


def test_the_error_is_how_ratios_scatter():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 50, (4000, 60))
    # Longer rows have more than their share: what scatters is the lengths too.
    values = 0.3 * lengths**1.2 + rng.normal(0, 3, lengths.shape)
    ratios, errors = np.transpose([ratio_of_sums(*rows) for rows in zip(values, lengths, strict=True)])
    assert np.mean(errors) == pytest.approx(np.std(ratios), rel=0.05)


def test_one_row_has_no_error():
    ratio, error = ratio_of_sums([3.0], [2.0])
    assert ratio == 1.5 and math.isnan(error)
