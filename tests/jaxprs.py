"""Reading what JAX traced."""

import jax


def equations(jaxpr):
    """Those of a jaxpr and of all within it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(equation.params):
            if hasattr(inner, "eqns"):
                yield from equations(inner)
