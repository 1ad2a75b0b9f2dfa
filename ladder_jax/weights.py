"""A model's weights as decoding likes them: in the compute dtype, one array a layer, and on CPUs outputs first.

A decode step reads every weight once, so what it costs is how fast they can be read. A scan over stacked layers copies
each layer's out of the stack on GPUs; a cast in the step reads more than it computes with; and a CPU's product of few
rows with a matrix is faster where the summed dimension is the contiguous one ([out, in]).
"""
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from ladder_jax import model as transformer
from ladder_jax import sharding
from ladder_jax.matmul import OutIn

OUT_IN = {       # outputs first, inputs last, in the letters of sharding.PARAMETERS
    "attention.wq": "NHD", "attention.wk": "KHD", "attention.wv": "KHD", "attention.wo": "DNH",
    "mlp.gate": "FD", "mlp.up": "FD", "mlp.down": "DF", "unembedding": "VD",
}


def _axes(name):
    return tuple(list(sharding.PARAMETERS[name]).index(letter) for letter in OUT_IN[name])


def arrange(model, dtype, *, unstack, out_in):
    """`model` (a Transformer) with matrices in `dtype`; `unstack`: an Unstacked; `out_in`: matrices as OutIn."""
    cast = lambda name, x: x if name.endswith("norm") else x.astype(dtype)
    model = jax.tree.map(cast, sharding.parameter_names(model), model)
    model = transformer.unstack(model) if unstack else model
    if not out_in:
        return model
    turn = lambda name, x: OutIn.of(x, _axes(name)) if name in OUT_IN else x
    return jax.tree.map(turn, sharding.parameter_names(model), model)


def specs(config, *, unstack, out_in):
    """The tree of `arrange`d weights with their PartitionSpecs."""
    shapes = lambda: arrange(transformer.init(config, jax.random.key(0)), jnp.float32, unstack=unstack, out_in=False)
    model = jax.eval_shape(shapes)
    made = sharding.parameter_specs(model)
    if not out_in:
        return made

    def turn(name, spec):
        if name not in OUT_IN:
            return spec
        stacked, own = spec[:len(spec) - len(OUT_IN[name])], spec[len(spec) - len(OUT_IN[name]):]
        return OutIn(P(*stacked, *(own[axis] for axis in _axes(name))), _axes(name))
    return jax.tree.map(turn, sharding.parameter_names(model), made, is_leaf=lambda x: isinstance(x, P))


def place(model, config, mesh, **how):
    """`model` on `mesh`, arranged; `how`: unstack, out_in."""
    return _make_place(config, mesh, **how)(model)


@functools.lru_cache(maxsize=32)
def _make_place(config, mesh, **how):
    shardings = sharding.named(mesh, specs(config, **how))
    return jax.jit(functools.partial(arrange, dtype=jnp.dtype(config.dtype), **how), out_shardings=shardings)
