"""What a traced program consists of."""

import jax


def equations(jaxpr, times=1):
    """(equation, how often it runs) of a jaxpr and of all jaxprs inside it."""
    for eqn in jaxpr.eqns:
        yield eqn, times
        is_scan = eqn.primitive.name == "scan"
        inner_times = times * (eqn.params["length"] if is_scan else 1)
        values = list(eqn.params.values())
        for inner in jax.tree.leaves(values, is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns"):
                yield from equations(getattr(inner, "jaxpr", inner), inner_times)
