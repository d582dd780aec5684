import jax.numpy as jnp
import pytest

from sunfish_jax.ops import compute_dtype


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({"float32": 2.0, "bfloat16": 1.0}, "bfloat16"),
        # As on processors without bfloat16 instructions.
        ({"float32": 1.0, "bfloat16": 2.0}, "float32"),
        ({"float32": 1.0, "bfloat16": 0.9}, "float32"),
    ],
)
def test_bfloat16_is_taken_where_it_is_clearly_faster(monkeypatch, seconds, chosen):
    class Product:
        def __init__(self, dtype):
            self._dtype = dtype

        def seconds(self):
            return seconds[self._dtype]

    monkeypatch.setattr(compute_dtype, "_Product", Product)
    assert compute_dtype.fastest_compute_dtype() == chosen


def test_one_slow_product_decides_nothing(monkeypatch):
    times = iter([1.0] * 100)

    class Product:
        def __init__(self, dtype):
            self._scale = {"float32": 2.0, "bfloat16": 1.0}[dtype]
            self._first = True

        def seconds(self):
            interrupted, self._first = self._first, False
            return next(times) * self._scale * (50.0 if interrupted else 1.0)

    monkeypatch.setattr(compute_dtype, "_Product", Product)
    assert compute_dtype.fastest_compute_dtype() == "bfloat16"


def test_a_product_is_measured():
    for dtype in ("float32", "bfloat16"):
        product = compute_dtype._Product(dtype)
        assert 0 < product.seconds() < 60
        assert {operand.dtype for operand in product._operands} == {jnp.dtype(dtype)}
