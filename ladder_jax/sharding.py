"""The mesh, every parameter's and activation's spec on one screen, and the collectives with their derivative rules.

The whole step runs inside one `jax.shard_map`: the model computes on local shards, and the only communication is what
this file names. A value is a *partial* over the tensor axis when the true value is the sum of the shards' values.

Gradients follow Megatron's pair of rules (arXiv 1909.08053, section 3). The loss is computed alike by every tensor
shard, so that the sum that ends a block passes its cotangent through (reductions.reduce), and the cotangents that the
shards' column-parallel matmuls send back to the stream that they share are partials (reductions.copy_to_tensor_axis sums them).
So follows one rule for parameters: a gradient is a partial over every axis that its parameter is not sharded over
(`sum_gradients`).
`check_vma` cannot follow these rules (reductions made of exchanges have no type for their result), so it is off, and
equality with a single-device reference is tested on every mesh shape instead.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ladder_jax.config import ConfigError

DATA, FSDP, TENSOR = AXES = (
    "data",
    "fsdp",
    "tensor",
)  # always all three, of size 1 where unused
BATCH_AXES = (DATA, FSDP)  # the axes over which sequences are divided

# Dimensions, by the field of config.Model that gives their size.
DIMS = {
    "V": "vocab_size",
    "D": "dim",
    "N": "heads",
    "K": "kv_heads",
    "H": "head_dim",
    "F": "ffn_dim",
}

PARAMETERS = {  # dimension -> mesh axis; layers stack a dimension before these
    "embedding": dict(V=TENSOR, D=FSDP),
    "attention.norm": dict(D=None),
    "attention.wq": dict(D=FSDP, N=TENSOR, H=None),
    "attention.wk": dict(D=FSDP, K=TENSOR, H=None),
    "attention.wv": dict(D=FSDP, K=TENSOR, H=None),
    "attention.bq": dict(N=TENSOR, H=None),
    "attention.bk": dict(K=TENSOR, H=None),
    "attention.bv": dict(K=TENSOR, H=None),
    "attention.q_norm": dict(H=None),
    "attention.k_norm": dict(H=None),
    "attention.wo": dict(N=TENSOR, H=None, D=FSDP),
    "mlp.norm": dict(D=None),
    "mlp.gate": dict(D=FSDP, F=TENSOR),
    "mlp.up": dict(D=FSDP, F=TENSOR),
    "mlp.down": dict(F=TENSOR, D=FSDP),
    "norm": dict(D=None),
    "unembedding": dict(D=FSDP, V=TENSOR),
}
TOKENS = P(BATCH_AXES, None)  # B T: ids, targets, segments, positions, weights
LOGITS = P(BATCH_AXES, None, TENSOR)  # B T V
CACHE = P(
    None, BATCH_AXES, TENSOR, None, None
)  # L B K S H: keys and values of past tokens
REPLICATED = P()  # scalars: loss, counts


def make_mesh(config, devices=None):
    """A `jax.sharding.Mesh` of all `devices` (default: all there are) as `config` (config.Mesh) divides them."""
    devices = jax.devices() if devices is None else devices
    sizes = {axis: getattr(config, axis) for axis in AXES}
    given = int(np.prod([size for size in sizes.values() if size > 0]))
    text = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
    if -1 in sizes.values():
        if len(devices) % given:
            raise ConfigError(
                f"mesh {text} does not divide the {len(devices)} devices: "
                "choose sizes whose product does"
            )
        sizes = {
            axis: len(devices) // given if size == -1 else size
            for axis, size in sizes.items()
        }
    elif given != len(devices):
        raise ConfigError(
            f"mesh {text} has {given} devices, but there are {len(devices)}: "
            "change a size, or set one to -1 for the rest"
        )
    shape, types = tuple(sizes.values()), (AxisType.Auto,) * 3
    if (
        devices[0].platform == "tpu"
        and sizes[FSDP] == 1
        and sizes[TENSOR].bit_count() == 1
    ):
        return jax.sharding.Mesh(
            np.array(_in_blocks(devices, sizes[TENSOR])).reshape(shape),
            AXES,
            axis_types=types,
        )
    return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)


def _in_blocks(devices, tensor):
    """TPU `devices` in an order in which every `tensor` of them (a power of two) are a compact block of the slice.

    A bit of a shard's Gray code is a bit of one of its chip's coordinates, the lowest of the shortest distance. Shards
    that differ in one (reductions.exchange) are near, all at one distance along one dimension: XLA makes no other
    exchange asynchronous in a large slice. The shards' order, which XLA's own rings follow there, goes from neighbour
    to neighbour. jax.make_mesh lays a tensor axis of 8 on a line instead, and the other axes on whole dimensions:
    better where parameters are gathered over them in every layer (fsdp).
    """

    def place(device):  # Z-order; a host's chips are neighbours in x and y
        core, (x, y, z) = getattr(device, "core_on_chip", 0), device.coords
        return getattr(device, "slice_index", 0), [
            c >> k & 1 for k in range(8)[::-1] for c in (z, y, x, core)
        ]

    near = sorted(devices, key=place)
    return [near[i - i % tensor + gray(i % tensor)] for i in range(len(near))]


def gray(index):
    """The Gray code of an index: those of neighbours, and of the first and the last of 2^k, differ in one bit."""
    return index ^ index >> 1


def check_fits(model, mesh, batch=None):
    """Raises ConfigError where `model` (config.Model) or a batch of sequences does not divide over `mesh`."""
    for name, dims in PARAMETERS.items():
        for dim, axis in dims.items():
            size = getattr(model, DIMS[dim])
            if axis and size % mesh.shape[axis]:
                raise ConfigError(
                    f"model.{DIMS[dim]}={size} does not divide by mesh.{axis}={mesh.shape[axis]} "
                    f"(parameter {name}): choose a mesh.{axis} that divides it"
                )
    rows = mesh.shape[DATA] * mesh.shape[FSDP]
    if batch is not None and batch % rows:
        raise ConfigError(
            f"a batch of {batch} sequences (train.global_batch / train.grad_accum_steps) does not divide by "
            f"mesh.data x mesh.fsdp = {rows}: choose a multiple of {rows}"
        )


def data_shard(mesh):
    """(index, count): which of `count` shares of a batch's rows this process holds.

    Processes whose devices hold the same rows (a tensor axis that spans hosts) have the same index.
    """
    shares = {}
    for row, devices in enumerate(mesh.devices.reshape(-1, mesh.shape[TENSOR])):
        for device in devices:
            shares.setdefault(device.process_index, set()).add(row)
    distinct = sorted({tuple(sorted(rows)) for rows in shares.values()})
    if sum(map(len, distinct)) != mesh.shape[DATA] * mesh.shape[FSDP]:
        raise ConfigError(
            f"the mesh divides a batch's rows unevenly over {len(shares)} processes: "
            "choose mesh.tensor so that it divides, or is a multiple of, the devices of a process"
        )
    return distinct.index(tuple(sorted(shares[jax.process_index()]))), len(distinct)


def _name(path):
    """('layers', 3, 'attention', 'wq', '.value') -> 'attention.wq'."""
    keys = [
        str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", ""))))
        for key in path
    ]
    return ".".join(
        key for key in keys if key not in ("layers", "value") and not key.isdigit()
    )


def parameter_names(model):
    """`model`'s tree with every parameter's name in PARAMETERS."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _name(path), model)


def parameter_specs(model):
    """`model`'s tree with a PartitionSpec for every parameter."""

    def spec(path, leaf):
        dims = PARAMETERS[_name(path)]
        return P(*(None,) * (leaf.ndim - len(dims)), *dims.values())

    return jax.tree_util.tree_map_with_path(spec, model)


def named_shardings(mesh, specs):
    """A tree of NamedSharding from a tree of PartitionSpec."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        specs,
        is_leaf=lambda x: isinstance(x, P),
    )


def shard_map(function, mesh, in_specs, out_specs):
    """`jax.shard_map` over the whole mesh with this file's derivative rules in place of JAX's types (see the top)."""
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


# The collectives. Each is called inside `shard_map`, on local shards.


def largest(value):
    """The elementwise maximum over the tensor axis, a constant for derivatives."""
    return lax.pmax(lax.stop_gradient(value), TENSOR)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(shard, dim, dtype):
    return lax.all_gather(shard.astype(dtype), FSDP, axis=dim, tiled=True)


def _scatter(
    dim, dtype, _, cotangent
):  # gradients are summed over data shards in float32
    return (
        lax.psum_scatter(
            cotangent.astype(jnp.float32), FSDP, scatter_dimension=dim, tiled=True
        ),
    )


_gather.defvjp(lambda shard, dim, dtype: (_gather(shard, dim, dtype), None), _scatter)


def gather_parameters(module, dtype, prefix=""):
    """`module` with every parameter gathered over the fsdp axis, in `dtype` (the float32 shards stay as they are).

    `prefix` is the module's place in the model ("attention"), for its rows of PARAMETERS. No layer dimension.
    """
    if axis_size(FSDP) == 1:
        return module

    def gather(path, leaf):
        name = _name(path)
        axes = list(
            PARAMETERS[
                f"{prefix}.{name}" if prefix and name else name or prefix
            ].values()
        )
        return _gather(leaf, axes.index(FSDP), dtype) if FSDP in axes else leaf

    return jax.tree_util.tree_map_with_path(gather, module)


def sum_gradients(gradients, specs):
    """`gradients` summed over every axis that their parameter is not sharded over (`specs`: see `parameter_specs`)."""

    def total(gradient, spec):
        missing = tuple(
            axis for axis in AXES if axis not in spec and axis_size(axis) > 1
        )
        return (
            lax.psum(gradient, missing) if missing else gradient
        )  # XLA on CPUs copies for a sum of one

    return jax.tree.map(total, gradients, specs)


def norm(tree, specs):
    """The Euclidean norm of a tree of arrays sharded by `specs`, in one sum over all devices, shared by them."""
    squares = jnp.float32(0)
    for shard, spec in zip(jax.tree.leaves(tree), jax.tree.leaves(specs), strict=True):
        copies = math.prod(axis_size(axis) for axis in AXES if axis not in spec)
        squares += jnp.sum(jnp.square(shard.astype(jnp.float32))) / copies
    axes = tuple(axis for axis in AXES if axis_size(axis) > 1)
    return jnp.sqrt(lax.psum(squares, axes) if axes else squares)


def axis_size(axis):
    """The mesh's size along `axis`: a Python int."""
    return lax.axis_size(axis)


def gather_vocabulary(logits):
    """The whole vocabulary's logits [..., V] on every tensor shard, from the shards' own."""
    return (
        logits
        if axis_size(TENSOR) == 1
        else lax.all_gather(logits, TENSOR, axis=logits.ndim - 1, tiled=True)
    )


def vocabulary_offset(local_size):
    """The first token id of this tensor shard's rows of the vocabulary, of which it has `local_size`."""
    return lax.axis_index(TENSOR) * local_size
