"""The causal forms of attention and convolution: against plain loops, and blind to what comes later."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sunfish_jax.ops.attention import attention
from sunfish_jax.ops.convolution import depthwise_convolution
from sunfish_jax.ops.rotary import rotary
from sunfish_jax.ops.rows import EqualRows

TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2}


def plain_causal_attention(q, k, v, mask):
    scores = jnp.einsum("bhsd,bhtd->bhst", q, k) / np.sqrt(q.shape[-1])
    length = q.shape[2]
    readable = np.arange(length)[None, :] <= np.arange(length)[:, None]
    if mask is not None:
        readable = readable & mask[:, None, None, :]
    return jnp.einsum("bhst,bhtd->bhsd", jax.nn.softmax(jnp.where(readable, scores, -jnp.inf), axis=-1), v)


@pytest.mark.parametrize("dtype", sorted(TOLERANCE))
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("length", [1, 7, 16])
def test_causal_attention_and_its_gradients(length, masked, dtype):
    rng = np.random.default_rng(0)
    low = [jnp.asarray(rng.normal(size=(2, 3, length, 4)), dtype) for _ in range(3)]
    full = [x.astype(jnp.float32) for x in low]
    mask = jnp.asarray(rng.random((2, length)) < 0.5).at[:, 0].set(True) if masked else None
    cotangent = jnp.asarray(rng.normal(size=full[0].shape), jnp.float32)

    def projected(function):
        return lambda q, k, v: jnp.vdot(function(q, k, v).astype(jnp.float32), cotangent)

    def ours(q, k, v):
        return attention(q, k, v, mask, True)

    def plain(q, k, v):
        return plain_causal_attention(q, k, v, mask)

    pairs = [(ours(*low), plain(*full))]
    pairs += zip(
        jax.grad(projected(ours), (0, 1, 2))(*low), jax.grad(projected(plain), (0, 1, 2))(*full), strict=True
    )
    for got, want in pairs:
        got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
        assert np.abs(got - want).max() <= TOLERANCE[dtype] * max(1.0, np.abs(want).max())


def test_causal_attention_reads_nothing_later():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 2, 9, 4)), jnp.float32) for _ in range(3))
    at = 5
    changed = attention(q, k.at[:, :, at].set(9.0), v.at[:, :, at].set(-9.0), None, True)
    plain = attention(q, k, v, None, True)
    np.testing.assert_array_equal(changed[:, :, :at], plain[:, :, :at])
    assert (changed[:, :, at:] != plain[:, :, at:]).any(axis=-1).all()


@pytest.mark.parametrize("width", [1, 3, 5])
@pytest.mark.parametrize("length", [1, 2, 9])
def test_causal_convolution(length, width):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, length, 3)), rng.normal(size=(width, 3))
    want = np.zeros_like(x)
    for s in range(length):
        for back in range(min(width, s + 1)):
            want[:, s] += kernel[width - 1 - back] * x[:, s - back]
    flat, kernel = jnp.asarray(x.reshape(-1, 3), jnp.float32), jnp.asarray(kernel, jnp.float32)
    got = depthwise_convolution(flat, kernel, EqualRows(2, length).reach(), causal=True)
    np.testing.assert_allclose(got.reshape(x.shape), want, atol=1e-5)


def test_rotary_may_start_anywhere():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 9, 8)), jnp.float32)
    np.testing.assert_allclose(rotary(x[:, :, 6:], 6), rotary(x)[:, :, 6:], atol=1e-6)
