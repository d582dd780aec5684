import jax
import pytest

from sunfish_jax.ops.eigen import compiler_options


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
