"""Reading XLA:CPU's compiled text: which matrix products missed the fast library."""

import re

_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) .*\{$")
_FAST_FUSION = re.compile(r"= \S+ fusion\(.*calls=%?([\w.\-]+).*__ynn_fusion")
_DOT = re.compile(r"= (\S+) dot\(%?([\w.\-]+), %?([\w.\-]+)\)")
_RESULT = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (\w+)")
_ORIGIN = re.compile(r'op_name="([^"]*)"')


def slow_matrix_products(compiled_text: str) -> list[str]:
    """The matrix products outside XLA:CPU's fast library.

    A fast product stands in a computation that a `__ynn_fusion` calls. One that stands anywhere else runs as a
    plain loop, or is converted to float32 first: 2 to 5 times slower for the sizes of a transformer. Products of
    float32 alone may be left to Eigen on purpose.

    Args:
      compiled_text: `jax.jit(f).lower(...).compile().as_text()`.

    Returns:
      One line for each slow product: its result's shape and the operation it came from.
    """
    fast, products, computation = set(), [], ""
    for line in compiled_text.splitlines():
        if not line.startswith(" "):
            if match := _COMPUTATION.match(line):
                computation = match.group(1)
            continue
        if match := _FAST_FUSION.search(line):
            fast.add(match.group(1))
        elif match := _DOT.search(line):
            origin = _ORIGIN.search(line)
            products.append((computation, f"{match.group(1)} {origin.group(1) if origin else ''}"))
    return [product for where, product in products if where not in fast]


def float32_matrix_products(compiled_text: str) -> list[str]:
    """The matrix products of float32 operands, which take at least twice the time of bfloat16 ones.

    XLA:CPU widens bfloat16 operands by itself where their layout, or the type asked for, is not to its library's
    liking.

    Args:
      compiled_text: as above.

    Returns:
      One line for each of them, as above.
    """
    types, products = {}, []
    for line in compiled_text.splitlines():
        if match := _RESULT.match(line):
            types[match.group(1)] = match.group(2)
        if (match := _DOT.search(line)) and "f32" in (types[match.group(2)], types[match.group(3)]):
            origin = _ORIGIN.search(line)
            products.append(f"{match.group(1)} {origin.group(1) if origin else ''}")
    return products


def count_matrix_products(compiled_text: str) -> int:
    """How many matrix products stand in the compiled text, fast or slow."""
    return sum(bool(_DOT.search(line)) for line in compiled_text.splitlines())
