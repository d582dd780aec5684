import time

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

        def processor_seconds(self):
            return seconds[self._dtype]

    monkeypatch.setattr(compute_dtype, "_Product", Product)
    assert compute_dtype.fastest_compute_dtype() == chosen


def test_waiting_for_other_processes_is_not_counted():
    product = compute_dtype._Product("float32")
    multiply = product._multiply

    def kept_waiting(*operands):
        time.sleep(1.0)
        return multiply(*operands)

    product._multiply = kept_waiting
    assert product.processor_seconds() < 0.5


def test_a_product_is_measured():
    for dtype in ("float32", "bfloat16"):
        product = compute_dtype._Product(dtype)
        assert 0 < product.processor_seconds() < 60
        assert {operand.dtype for operand in product._operands} == {jnp.dtype(dtype)}
