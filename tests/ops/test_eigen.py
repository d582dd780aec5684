import jax
import pytest

from sunfish_jax.ops.eigen import compiler_options, passes_at_once


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="XLA:CPU's libraries")
def test_only_float32_products_are_left_to_eigen():
    assert compiler_options("bfloat16") == {}
    text = {
        dtype: jax.jit(lambda x: x @ x, compiler_options=compiler_options(dtype))
        .lower(jax.ShapeDtypeStruct((64, 64), dtype))
        .compile()
        .as_text()
        for dtype in ("bfloat16", "float32")
    }
    assert "__ynn_fusion" in text["bfloat16"]
    assert "__ynn_fusion" not in text["float32"]


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="XLA:CPU's libraries")
@pytest.mark.parametrize(
    ("num_passes", "positions", "expected"),
    [
        # `micro`'s, in pairs.
        (8, 1008, 2),
        (8, 1024, 2),
        (8, 1025, 1),
        # Of three passes no two are left over.
        (3, 1000, 1),
        (9, 500, 3),
        (8, 100, 8),
        (1, 100, 1),
        (8, 5000, 1),
    ],
)
def test_passes_are_made_at_once_while_they_stay_small(num_passes, positions, expected):
    assert passes_at_once("float32", num_passes, positions) == expected
    assert passes_at_once("bfloat16", num_passes, positions) == 1
