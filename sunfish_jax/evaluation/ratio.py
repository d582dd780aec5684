"""A ratio of sums, such as bits over bytes, and how exact it is."""

import math

import numpy as np


def ratio_of_sums(numerators: np.ndarray, denominators: np.ndarray) -> tuple[float, float]:
    """sum(numerators) / sum(denominators), and its standard error over independent rows.

    Cochran 1977, Sampling Techniques, section 6.3.

    Args:
        numerators: `[n]`, of each row.
        denominators: `[n]`, above zero in sum.

    Returns:
        The ratio and the error; NaN for the error of a single row.
    """
    numerators, denominators = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    n, total = len(numerators), denominators.sum()
    ratio = numerators.sum() / total
    deviation = numerators - ratio * denominators
    error = math.sqrt(np.sum(deviation**2) * n / (n - 1)) / total if n > 1 else math.nan
    return float(ratio), float(error)
