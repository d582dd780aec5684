"""Every fast path against its plain form: values and gradients, on random shapes, odd ones included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from sunfish_jax.ops.attention import attention
from sunfish_jax.ops.convolution import depthwise_convolution
from sunfish_jax.ops.cross_entropy import cross_entropy, expected_embedding, token_logits
from sunfish_jax.ops.dense import dense, squared_relu_mlp
from sunfish_jax.ops.rotary import rotary_heads
from sunfish_jax.ops.rows import EqualRows, PackedRows

TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2}
in_both_dtypes = pytest.mark.parametrize("dtype", sorted(TOLERANCE))
# No search for a smaller example of a failure: each is compiled, and they would be many.
few_examples = settings(max_examples=2, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])


def up_to(most, least=1):
    """Hypothesis begins with what it takes for the simplest, here the largest: sizes of 1 would hide errors."""
    return st.integers(0, most - least).map(lambda less: most - less)


# Rows in two packs, some of them missing: the first time 7 and none, 9 and 1.
packs = (
    st.lists(st.integers(0, 9), min_size=4, max_size=6)
    .filter(lambda drawn: len(drawn) % 2 == 0)
    .map(lambda drawn: [(number + first) % 10 for number, first in zip(drawn, (7, 0, 9, 1, 4, 0), strict=False)])
)


def packed_rows(lengths):
    """The rows, with a position of no row at the end of each pack, and the positions of each."""
    lengths = np.reshape(lengths, (2, -1))
    size = int(max(lengths.sum(axis=1))) + 1
    rows = PackedRows.in_packs(jnp.asarray(lengths), size, max(1, int(lengths.max())))
    spans = zip(np.asarray(rows.starts).tolist(), lengths.ravel().tolist(), strict=True)
    return rows, [slice(start, start + length) for start, length in spans if length]


def plain_attention(q, k, v, mask):
    scores = jnp.einsum("bhsd,bhtd->bhst", q, k) / np.sqrt(q.shape[-1])
    if mask is not None:
        scores = jnp.where(mask[:, None, None, :], scores, -jnp.inf)
    return jnp.einsum("bhst,bhtd->bhsd", jax.nn.softmax(scores, axis=-1), v)


def plain_cross_entropy(features, table, bias, targets):
    log_probabilities = jax.nn.log_softmax(features @ table + bias)
    return -jnp.take_along_axis(log_probabilities, targets[:, None], axis=-1)[:, 0]


def normal(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def assert_same_function(fast, plain, arguments, dtype):
    """Compares fast at `dtype` with plain in float32, and the gradients of a random projection of both."""
    tolerance = TOLERANCE[dtype]
    low = [a.astype(dtype) for a in arguments]
    # The plain form sees the same rounded inputs, so that only the operation's own rounding differs.
    full = [a.astype(jnp.float32) for a in low]
    cotangent = normal(np.random.default_rng(1), *jax.eval_shape(plain, *full).shape)

    def value_and_gradients(function, arguments):
        value, pullback = jax.vjp(function, *arguments)
        return value, pullback(cotangent.astype(value.dtype))

    # One program: of single operations, each would be compiled for each shape.
    @jax.jit
    def both(low, full):
        return value_and_gradients(fast, low), value_and_gradients(plain, full)

    (got, got_gradients), (want, want_gradients) = both(low, full)
    assert got.shape == want.shape
    assert_close(got, want, tolerance)
    for argument, got, want in zip(low, got_gradients, want_gradients, strict=True):
        assert got.dtype == argument.dtype
        assert_close(got, want, tolerance)


def assert_close(got, want, tolerance):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert np.abs(got - want).max() <= tolerance * max(1.0, np.abs(want).max())


@in_both_dtypes
@few_examples
@given(n=up_to(37), k=up_to(31), m=up_to(29), seed=st.integers(0, 99))
def test_dense(n, k, m, dtype, seed):
    rng = np.random.default_rng(seed)
    arguments = normal(rng, n, k), normal(rng, k, m) / np.sqrt(k)
    assert_same_function(dense, lambda x, w: x @ w, arguments, dtype)


def test_dense_gradient_keeps_the_inputs_dtype():
    x, kernel = jnp.ones((3, 5)), jnp.ones((5, 2), jnp.bfloat16)
    d_x, d_kernel = jax.grad(lambda x, w: dense(x, w).sum(), (0, 1))(x, kernel)
    assert d_x.dtype == jnp.float32
    assert d_kernel.dtype == jnp.bfloat16


@in_both_dtypes
@few_examples
@given(n=up_to(37), k=up_to(31), m=up_to(29), seed=st.integers(0, 99))
def test_squared_relu_mlp(n, k, m, dtype, seed):
    rng = np.random.default_rng(seed)
    arguments = normal(rng, n, k), normal(rng, k, m) / np.sqrt(k), normal(rng, k, m) / np.sqrt(m)
    assert_same_function(squared_relu_mlp, lambda x, a, b: jnp.square(jax.nn.relu(x @ a)) @ b.T, arguments, dtype)


@in_both_dtypes
@few_examples
@given(
    batch=up_to(3),
    heads=up_to(2),
    queries=up_to(37),
    keys=up_to(31),
    dim=up_to(15),
    masked=st.sampled_from([True, False]),
    seed=st.integers(0, 99),
)
def test_attention(batch, heads, queries, keys, dim, masked, dtype, seed):
    rng = np.random.default_rng(seed)
    mask = None
    if masked:
        mask = jnp.asarray(rng.random((batch, keys)) < 0.5).at[:, 0].set(True)
    arguments = (
        normal(rng, batch, heads, queries, dim),
        normal(rng, batch, heads, keys, dim),
        normal(rng, batch, heads, keys, dim),
    )
    assert_same_function(
        lambda q, k, v: attention(q, k, v, mask),
        lambda q, k, v: plain_attention(q, k, v, mask),
        arguments,
        dtype,
    )


def plain_rotary_heads(qkv, batch, heads):
    rows = qkv.reshape(batch, -1, 3, heads, qkv.shape[-1] // (3 * heads))
    q, k, v = rows.transpose(2, 0, 3, 1, 4)
    half = v.shape[-1] // 2
    # Each pair as a complex number, turned by a root of unity.
    turns = np.exp(1j * np.arange(v.shape[2])[:, None] * 10_000.0 ** (-np.arange(half) / half))
    pairs = (turns * jax.lax.complex(x[..., :half], x[..., half:]) for x in (q, k))
    return jnp.stack([*(jnp.concatenate([pair.real, pair.imag], axis=-1) for pair in pairs), v])


@in_both_dtypes
@few_examples
@given(
    batch=up_to(3), heads=up_to(2), length=up_to(37), half=up_to(9),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_rotary_heads(batch, heads, length, half, dtype, seed):
    qkv = normal(np.random.default_rng(seed), batch * length, 3 * heads * 2 * half)
    rows = EqualRows(batch, length)
    assert_same_function(
        lambda qkv: jnp.stack(rotary_heads(qkv.astype(jnp.float32), rows, heads, jnp.dtype(dtype))),
        lambda qkv: plain_rotary_heads(qkv, batch, heads),
        (qkv,),
        dtype,
    )


@in_both_dtypes
@few_examples
@given(lengths=packs, heads=up_to(2), half=up_to(9), seed=st.integers(0, 99))
def test_attention_among_packed_rows(lengths, heads, half, dtype, seed):
    """From one product to the next, against each row by itself."""
    rows, spans = packed_rows(lengths)
    qkv = normal(np.random.default_rng(seed), rows.num_positions, 3 * heads * 2 * half)
    inside = rows.inside[:, None]

    def fast(qkv):
        q, k, v = rotary_heads(qkv.astype(jnp.float32), rows, heads, jnp.dtype(dtype))
        read = rows.positions(attention(q, k, v, rows.mask))
        return jnp.where(inside, read.reshape(len(qkv), -1), 0)

    def plain(qkv):
        y = jnp.zeros((len(qkv), qkv.shape[1] // 3))
        for span in spans:
            q, k, v = plain_rotary_heads(qkv[span], 1, heads)
            read = plain_attention(q, k, v, None)[0].swapaxes(0, 1)
            y = y.at[span].set(read.reshape(read.shape[0], -1))
        return y

    assert_same_function(fast, plain, (qkv,), dtype)


def test_attention_does_not_read_masked_keys():
    rng = np.random.default_rng(0)
    q, k, v = (normal(rng, 2, 2, 5, 4) for _ in range(3))
    mask = jnp.asarray([[True, True, False, True, False]] * 2)
    changed = attention(q, k.at[:, :, 2].set(9.0), v.at[:, :, 4].set(-9.0), mask)
    np.testing.assert_array_equal(changed, attention(q, k, v, mask))


@in_both_dtypes
@few_examples
@given(n=up_to(37), dim=up_to(31), vocab=up_to(59, least=2), seed=st.integers(0, 99))
def test_cross_entropy(n, dim, vocab, dtype, seed):
    rng = np.random.default_rng(seed)
    targets = jnp.asarray(rng.integers(0, vocab, n), jnp.int32)
    bias = normal(rng, vocab)
    arguments = normal(rng, n, dim), normal(rng, dim, vocab) / np.sqrt(dim)
    assert_same_function(
        lambda f, e: cross_entropy(f, e, bias, targets),
        lambda f, e: plain_cross_entropy(f, e, bias, targets),
        arguments,
        dtype,
    )


def test_cross_entropy_is_finite_at_large_logits():
    features = 1000.0 * jnp.eye(4)
    losses = cross_entropy(features, jnp.eye(4), jnp.zeros(4), jnp.asarray([0, 1, 2, 0]))
    np.testing.assert_allclose(losses, [0.0, 0.0, 0.0, 1000.0], atol=1e-4)


@in_both_dtypes
@few_examples
@given(n=up_to(37), dim=up_to(31), vocab=up_to(59, least=2), seed=st.integers(0, 99))
def test_expected_embedding(n, dim, vocab, dtype, seed):
    rng = np.random.default_rng(seed)
    features, table, bias = normal(rng, n, dim), normal(rng, vocab, dim), normal(rng, vocab)
    table = table.astype(dtype)
    got = expected_embedding(token_logits(features, table.T, bias), table)
    table, features = table.astype(jnp.float32), features.astype(dtype).astype(jnp.float32)
    assert_close(got, jax.nn.softmax(features @ table.T + bias) @ table, TOLERANCE[dtype])


@pytest.mark.parametrize("width", [1, 3, 5])
@pytest.mark.parametrize("lengths", [(1, 0, 2, 9), (9, 9), (1, 1)])
def test_depthwise_convolution(lengths, width):
    rows, spans = packed_rows(lengths)
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(rows.num_positions, 3)), rng.normal(size=(width, 3))
    want = np.zeros_like(x)
    for span in spans:
        for s in range(span.start, span.stop):
            for j in range(width):
                if span.start <= s + j - width // 2 < span.stop:
                    want[s] += kernel[j] * x[s + j - width // 2]
    got = depthwise_convolution(jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32), rows.reach())
    inside = np.asarray(rows.inside)
    np.testing.assert_allclose(np.asarray(got)[inside], want[inside], atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("width", [1, 5])
@few_examples
@given(lengths=packs, channels=up_to(5), seed=st.integers(0, 99))
def test_gradients_of_the_convolution(lengths, channels, width, causal, seed):
    rows, spans = packed_rows(lengths)
    rng, size = np.random.default_rng(seed), rows.num_positions
    before = width - 1 if causal else width // 2
    # Place t of x adds kernel[j] times itself to place t - j + before.
    reads = np.zeros((width, size, size), np.float32)
    for span in spans:
        for j in range(width):
            for s in range(span.start, span.stop):
                if span.start <= s + j - before < span.stop:
                    reads[j, s, s + j - before] = 1
    inside = rows.inside[:, None]

    assert_same_function(
        lambda x, kernel: jnp.where(inside, depthwise_convolution(x, kernel, rows.reach(), causal), 0),
        lambda x, kernel: jnp.einsum("jst,tw,jw->sw", reads, x, kernel),
        (normal(rng, size, channels), normal(rng, width, channels)),
        "float32",
    )
