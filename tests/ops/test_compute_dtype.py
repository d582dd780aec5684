import time

import jax.numpy as jnp
import pytest
from encoders import FrozenEncoder

from configs import nano
from sunfish_jax.models.denoiser import make_model
from sunfish_jax.ops import compute_dtype


@pytest.mark.parametrize(
    ("seconds", "without_int8", "with_int8"),
    [
        ({"float32": 4.0, "bfloat16": 2.0, "int8": 1.0}, "bfloat16", "int8"),
        # As on processors without bfloat16 instructions: what is not multiplied in eight bits would be slow.
        ({"float32": 1.0, "bfloat16": 2.0, "int8": 0.5}, "float32", "float32"),
        ({"float32": 1.0, "bfloat16": 0.9, "int8": 0.9}, "float32", "float32"),
        ({"float32": 2.0, "bfloat16": 1.0, "int8": 0.8}, "bfloat16", "bfloat16"),
    ],
)
def test_less_precision_is_taken_where_it_is_clearly_faster(monkeypatch, seconds, without_int8, with_int8):
    class Product:
        def __init__(self, dtype):
            self._dtype = dtype

        def processor_seconds(self):
            return seconds[self._dtype]

    monkeypatch.setattr(compute_dtype, "_Product", Product)
    assert compute_dtype.fastest_compute_dtype() == without_int8
    assert compute_dtype.fastest_compute_dtype(128) == without_int8
    assert compute_dtype.fastest_compute_dtype(256) == with_int8


def test_waiting_for_other_processes_is_not_counted():
    product = compute_dtype._Product("float32")
    multiply = product._multiply

    def kept_waiting(*operands):
        time.sleep(1.0)
        return multiply(*operands)

    product._multiply = kept_waiting
    assert product.processor_seconds() < 0.5


def test_a_product_is_measured():
    for dtype in compute_dtype.FORMATS:
        product = compute_dtype._Product(dtype)
        assert 0 < product.processor_seconds() < 60
        assert {operand.dtype for operand in product._operands} == {jnp.dtype(dtype)}


def test_a_model_is_made_in_the_format_that_is_measured(monkeypatch):
    config = nano.get_config()
    for number_format in compute_dtype.FORMATS:
        monkeypatch.setattr(
            "sunfish_jax.models.denoiser.fastest_compute_dtype",
            lambda width, chosen=number_format: {config.model.width: chosen}[width],
        )
        assert make_model(config, 60, FrozenEncoder(output_dim=24)).number_format == number_format
