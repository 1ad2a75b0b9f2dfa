"""A model of every residual schedule, a batch, and their loss on a mesh and by the
reference, for several test files.
"""

import functools
from unittest import mock

import jax
import numpy as np
import reference
from helpers import BIASES, FAST, make_mesh, random_parameters, small_model
from jax import lax
from jaxprs import equations

from ladder_jax import config, model, sharding
from ladder_jax.residual import layers as residual

B, T, V = 8, 8, 32
# By schedule: how many layers, and other fields of the model. 16 query heads share 8
# key-value heads.
CASES = {
    "standard": (2, BIASES | dict(tie_embeddings=True)),
    "ladder": (3, dict(qk_norm=True, qkv_bias=True, rope_scaling="llama3")),
    "ladder:1,2": (3, BIASES | dict(tie_embeddings=True, qk_norm=True)),
    "hybrid:0": (
        2,
        dict(activation="gelu_pytorch_tanh", qkv_bias=True, sliding_window=2),
    ),
    "hybrid:last1": (2, dict(rope_scaling="yarn")),
    "delays:0,1,2,1": (2, dict(activation="gelu", qk_norm=True, tie_embeddings=True)),
    "parallel": (2, BIASES | dict(qk_norm=True, rope_scaling="llama3")),
    "desync:2": (2, dict(tie_embeddings=True, qkv_bias=True)),
    "desync:4": (4, dict(qk_norm=True)),
    "desync:3": (2, BIASES | dict(rope_scaling="linear")),
    "dtp:2": (4, BIASES | dict(tie_embeddings=True)),
}
OWN_STREAMS = "desync", "dtp"  # models that differ with the number of tensor shards
MESHES = [(1, 1, 8), (2, 2, 2), (1, 1, 1), (8, 1, 1), (1, 8, 1)]  # data, fsdp, tensor


def case_model(name, layers=None, **fields):
    """The model of a case; `fields` replace those of the case."""
    case_layers, case_fields = CASES.get(name, (None, {}))
    fields = case_fields | fields
    if kind := fields.pop("rope_scaling", None):
        fields["rope_scaling"] = config.RopeScaling(
            kind=kind, factor=8.0, original_length=16, beta_fast=2.0, beta_slow=0.1
        )
    return small_model(name, layers=layers or case_layers, **fields)


def packed_batch(seed=0):
    """Rows of several documents, whose positions restart, and tokens without weight."""
    random = np.random.default_rng(seed)
    tokens = random.integers(0, V, (B, T + 1))
    segments = np.sort(random.integers(1, 4, (B, T)), axis=1)
    first = np.array([[list(row).index(s) for s in row] for row in segments])
    batch = dict(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        segments=segments,
        positions=np.arange(T) - first,
    )
    return {
        **{name: x.astype(np.int32) for name, x in batch.items()},
        "weights": random.integers(0, 2, (B, T)).astype(np.float32),
    }


BATCH = packed_batch()
BATCH_SPECS = dict.fromkeys(BATCH, sharding.TOKENS)
# The first row reads other positions than the others, and not in order.
READ = np.array([[5, 2]] + [[0, 7]] * (B - 1))


# ---------------------------------------------------------------- loss and gradients


def on_mesh(model_config, mesh, **options):
    """(parameters, batch) -> (mean loss, gradients) of the whole batch."""
    specs = sharding.parameter_specs(model.abstract(model_config))

    def local(parameters, batch):
        weight = lax.psum(batch["weights"].sum(), sharding.BATCH_AXES)
        loss, gradients = jax.value_and_grad(
            lambda m: model.loss(m, model_config, batch, **options) / weight
        )(parameters)
        return lax.psum(loss, sharding.BATCH_AXES), sharding.sum_gradients(
            gradients, specs
        )

    return sharding.shard_map(
        local, make_mesh(*mesh), (specs, BATCH_SPECS), (sharding.REPLICATED, specs)
    )


scanned = residual.run


def run_unrolled(plan, embedded, layers, apply, form, **options):
    """`residual.run` with the stack of layers given as a list."""
    return scanned(
        plan,
        embedded,
        [jax.tree.map(lambda x, i=i: x[i], layers) for i in range(len(plan.layers))],
        apply,
        form,
        **options,
    )


@functools.cache
def computed(model_config, mesh, unrolled=False, **options):
    with mock.patch.object(residual, "run", run_unrolled if unrolled else residual.run):
        run = jax.jit(on_mesh(model_config, mesh, **options), compiler_options=FAST)
        return jax.device_get(run(random_parameters(model_config), BATCH))


@functools.cache
def reference_of(model_config, ranks):
    run = jax.value_and_grad(lambda m: reference.loss(m, model_config, BATCH, ranks))
    if ranks == 1:  # the loops over ranks take longer to compile than to run
        run = jax.jit(run, compiler_options=FAST)
    return jax.device_get(run(random_parameters(model_config)))


def assert_same(actual, expected, tolerance, what):
    """The same loss, and gradients within `tolerance` of each one's largest value."""
    # In NumPy, as JAX would compile each operation for each shape.
    loss, gradients = jax.device_get(actual)
    expected_loss, expected_gradients = jax.device_get(expected)
    wrong = (
        []
        if abs(loss - expected_loss) <= tolerance * abs(expected_loss)
        else [f"loss {loss} {expected_loss}"]
    )
    names = jax.tree.leaves(sharding.parameter_names(gradients))
    for name, a, b in zip(
        names,
        jax.tree.leaves(gradients),
        jax.tree.leaves(expected_gradients),
        strict=True,
    ):
        assert a.shape == b.shape and a.dtype == b.dtype == np.float32, (
            f"{what}: {name} is {a.dtype}{a.shape}"
        )
        error = float(np.abs(a - b).max() / np.abs(b).max())
        if not error <= tolerance:
            ratio = np.vdot(a, b) / np.vdot(b, b)
            wrong.append(
                f"d/d {name}: {error:.1e} of its largest value (ratio {ratio:.3f})"
            )
    assert not wrong, f"{what} differs by more than {tolerance:.0e}:\n  " + "\n  ".join(
        wrong
    )


# ---------------------------------------------------------------- what is communicated


def reductions(function, *args):
    """How often `function` sends (a part of) a [B, T, D] array over the tensor axis."""
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    return sum(
        times
        for eqn, times in equations(jaxpr)
        if eqn.primitive.name.startswith(("psum", "ppermute"))
        and "tensor" in str(eqn.params.get("axes", eqn.params.get("axis_name")))
        and eqn.outvars[0].aval.ndim == 3
        and eqn.outvars[0].aval.shape[-1] == 16
    )


def forward(model_config, mesh):
    specs = sharding.parameter_specs(model.abstract(model_config))
    local = lambda m, batch: lax.psum(
        model.loss(m, model_config, batch), sharding.BATCH_AXES
    )
    return sharding.shard_map(
        local, make_mesh(*mesh), (specs, BATCH_SPECS), sharding.REPLICATED
    )
