import jax
import jax.numpy as jnp
import numpy as np

from sunfish_jax.ops.dropout import dropout

SEEDS = jnp.asarray([7, 8, 9, 10], jnp.uint32)
GROUPS = (4, 64, 128)
ONES = jnp.ones(GROUPS).reshape(-1, 128)


def test_drops_the_stated_share_and_keeps_the_mean():
    dropped = np.asarray(dropout(ONES, SEEDS, 0, 0.1)).reshape(GROUPS)
    zero = dropped == 0.0
    # 32,768 elements: the share's standard error is 0.0017.
    assert abs(zero.mean() - 0.1) < 0.006
    np.testing.assert_allclose(dropped[~zero], 1.0 / 0.9, rtol=1e-6)
    # Neither groups nor positions nor features are dropped together.
    assert np.abs(zero.mean(axis=(0, 1)) - 0.1).max() < 0.1
    assert np.abs(zero.mean(axis=(0, 2)) - 0.1).max() < 0.08


def test_masks_differ_between_groups_and_sites_without_correlation():
    keep = np.asarray(dropout(ONES, SEEDS, 0, 0.5)).reshape(GROUPS) > 0
    other_site = np.asarray(dropout(ONES, SEEDS, 1, 0.5)).reshape(GROUPS) > 0
    next_position = np.roll(keep, 1, axis=1)
    for first, second in [(keep[0], keep[1]), (keep, other_site), (keep, next_position)]:
        assert abs((first == second).mean() - 0.5) < 0.02


def test_a_groups_mask_does_not_depend_on_the_others():
    together = dropout(ONES, SEEDS, 3, 0.3)
    third = slice(2 * 64, 3 * 64)
    np.testing.assert_array_equal(together[third], dropout(ONES[third], SEEDS[2:3], 3, 0.3))


def test_the_gradient_uses_the_same_mask():
    value = dropout(ONES, SEEDS, 0, 0.3)
    gradient = jax.grad(lambda x: dropout(x, SEEDS, 0, 0.3).sum())(ONES)
    np.testing.assert_array_equal(gradient, value)


def test_off_without_seeds():
    assert dropout(ONES, None, 0, 0.5) is ONES
