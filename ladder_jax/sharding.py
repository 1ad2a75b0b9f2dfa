"""The mesh, the spec of every parameter and activation, and the collectives.

The collectives have their derivative rules here. A whole step runs inside one
`jax.shard_map`: the model computes on local shards, and only the collectives of this
file and of residual/reductions.py communicate. A value is a *partial* over the tensor
axis when the true value is the sum of the shards' values.

Gradients follow Megatron's pair of rules (arXiv 1909.08053, section 3). Every tensor
shard computes the same loss, so the sum that ends a block passes its cotangent through
(reductions.reduce). The stream that a block's column-parallel products read is shared
by the shards, so the cotangents that they send back to it are partials, and
reductions.copy_to_tensor_axis sums them. One rule for parameters follows: a gradient is
a partial over every axis that its parameter is not sharded over (`sum_gradients`).

JAX's own check (`check_vma`) is off: it cannot tell that a reduction by exchanges gives
the same sum on every shard. Tests compare every mesh shape with a single-device
reference instead.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ladder_jax import config
from ladder_jax.config import ConfigError

# A mesh always has all three axes; an unused axis has size 1.
DATA, FSDP, TENSOR = AXES = ("data", "fsdp", "tensor")
BATCH_AXES = (DATA, FSDP)  # sequences are divided over these

# Dimensions, by the field of config.Model that gives their size.
DIMS = {
    "V": "vocab_size",
    "D": "dim",
    "N": "heads",
    "K": "kv_heads",
    "H": "head_dim",
    "F": "ffn_dim",
}

Role = Literal["embedding", "matrix", "norm", "bias"]


class Parameter(NamedTuple):
    """A row of PARAMETERS."""

    role: Role  # decides on weight decay (optimizer.py) and on the cast for decoding
    axes: dict[str, str | None]  # dimension -> mesh axis, in the array's order
    summed: str  # a matrix: the dimensions that products sum over, see quantised.py


def _row(role: Role, summed: str = "", /, **axes: str | None) -> Parameter:
    return Parameter(role, axes, summed)


# Stacked layers have a layer dimension before these.
PARAMETERS = {
    "embedding": _row("embedding", "D", V=TENSOR, D=FSDP),
    "attention.norm": _row("norm", D=None),
    "attention.wq": _row("matrix", "D", D=FSDP, N=TENSOR, H=None),
    "attention.wk": _row("matrix", "D", D=FSDP, K=TENSOR, H=None),
    "attention.wv": _row("matrix", "D", D=FSDP, K=TENSOR, H=None),
    "attention.bq": _row("bias", N=TENSOR, H=None),
    "attention.bk": _row("bias", K=TENSOR, H=None),
    "attention.bv": _row("bias", K=TENSOR, H=None),
    "attention.bo": _row("bias", D=None),
    "attention.q_norm": _row("norm", H=None),
    "attention.k_norm": _row("norm", H=None),
    "attention.wo": _row("matrix", "NH", N=TENSOR, H=None, D=FSDP),
    "mlp.norm": _row("norm", D=None),
    "mlp.gate": _row("matrix", "D", D=FSDP, F=TENSOR),
    "mlp.up": _row("matrix", "D", D=FSDP, F=TENSOR),
    "mlp.down": _row("matrix", "F", F=TENSOR, D=FSDP),
    "mlp.gate_bias": _row("bias", F=TENSOR),
    "mlp.up_bias": _row("bias", F=TENSOR),
    "mlp.down_bias": _row("bias", D=None),
    "norm": _row("norm", D=None),
    "unembedding": _row("matrix", "D", D=FSDP, V=TENSOR),
}
TOKENS = P(BATCH_AXES, None)  # B T: ids, targets, segments, positions, weights
LOGITS = P(BATCH_AXES, None, TENSOR)  # B T V
CACHE = P(None, BATCH_AXES, TENSOR, None, None)  # L B K S H: past keys and values
PAGES = P(None, TENSOR, None, None, None)  # L K P S H: the same, in pages
JOINT_PAGES = P(None, None, None, TENSOR, None)  # L P S 2K H: for the TPU's kernel
REPLICATED = P()  # scalars: loss, counts


# ---------------------------------------------------------------- the mesh


def make_mesh(
    mesh_config: config.Mesh, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh of all `devices`, divided as `mesh_config` says.

    Args:
      mesh_config: the size of each axis; -1 stands for the devices that are left.
      devices: all of JAX's devices by default.

    Where the devices are several TPU slices, the axis `data` goes across them: its sums
    of gradients are all that uses the network between slices.

    Raises ConfigError where the sizes do not make up the number of devices, or the axis
    `data` does not divide by the number of slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {axis: getattr(mesh_config, axis) for axis in AXES}
    product = math.prod(size for size in sizes.values() if size > 0)
    text = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
    if -1 in sizes.values():
        if len(devices) % product:
            raise ConfigError(
                f"mesh {text} does not divide the {len(devices)} devices: "
                "choose sizes whose product does"
            )
        devices_left = len(devices) // product
        sizes = {
            axis: devices_left if size == -1 else size for axis, size in sizes.items()
        }
    elif product != len(devices):
        raise ConfigError(
            f"mesh {text} has {product} devices, but there are {len(devices)}: "
            "change a size, or set one to -1 for the rest"
        )
    slices = _slices(devices)
    if sizes[DATA] % len(slices):
        raise ConfigError(
            f"mesh.data={sizes[DATA]} is not accepted on {len(slices)} TPU slices: it "
            f"must be a multiple of {len(slices)}, as other axes would use the slow "
            "network between slices in every layer"
        )
    sizes[DATA] //= len(slices)
    order = np.concatenate([_order(slice_, sizes) for slice_ in slices])
    return Mesh(order, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _slices(devices: Sequence[jax.Device]) -> list[list[jax.Device]]:
    """The devices of each TPU slice. Others than TPUs are one slice."""
    slices: dict[int, list[jax.Device]] = {}
    for device in devices:
        slices.setdefault(getattr(device, "slice_index", 0) or 0, []).append(device)
    if len({len(own) for own in slices.values()}) > 1:
        counts = ", ".join(str(len(own)) for own in slices.values())
        raise ConfigError(f"the TPU slices have {counts} devices: take equal ones")
    return [slices[index] for index in sorted(slices)]


def _order(devices: Sequence[jax.Device], sizes: dict[str, int]) -> np.ndarray:
    """The devices of one slice as an array with a dimension for each axis."""
    shape = tuple(sizes.values())
    is_tpu = devices[0].platform == "tpu"
    if is_tpu and sizes[FSDP] == 1 and sizes[TENSOR].bit_count() == 1:
        return np.array(_compact_groups(devices, sizes[TENSOR])).reshape(shape)
    types = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(shape, AXES, axis_types=types, devices=devices).devices


def _compact_groups(devices: Sequence[jax.Device], tensor: int) -> list[jax.Device]:
    """TPU devices, ordered so that each group of `tensor` is compact in the slice.

    `tensor` is a power of two. Each bit of a shard's Gray code is a bit of one of its
    chip's coordinates; lower bits mean shorter distances. So all pairs of shards whose
    codes differ in one given bit (reductions.exchange) are at one distance along one
    dimension: in a large slice XLA makes no other exchange asynchronous. Consecutive
    shards are neighbours, as XLA's own rings need there.

    jax.make_mesh puts a tensor axis of 8 on a line instead, and the other axes on whole
    dimensions. That is better where layers gather parameters over those axes (fsdp).
    """
    devices = sorted(devices, key=_z_order)
    groups = []
    for start in range(0, len(devices), tensor):
        groups += [devices[start + gray(i)] for i in range(tensor)]
    return groups


def _z_order(device: jax.Device) -> int:
    """The index of a TPU device on a Z-order curve through its slice.

    The curve's index interleaves the coordinates' bits, from the highest:
    ... z1 y1 x1 core1 z0 y0 x0 core0. So a host's chips, which are neighbours in x and
    y, are neighbours on the curve.
    """
    x, y, z = device.coords
    core = getattr(device, "core_on_chip", 0)
    index = 0
    for bit in range(8):  # a side has fewer than 2^8 chips
        for position, coordinate in enumerate((core, x, y, z)):
            coordinate_bit = coordinate >> bit & 1
            index |= coordinate_bit << (4 * bit + position)
    return index


def gray(index: Any) -> Any:
    """The Gray code of an index, an int or an integer array.

    The codes of i and i + 1 differ in one bit; so do those of 0 and 2^k - 1.
    """
    return index ^ (index >> 1)


def check_fits(
    model_config: config.Model, mesh: Mesh, batch: int | None = None
) -> None:
    """Raises ConfigError where the mesh cannot divide the model or the batch evenly."""
    for name, row in PARAMETERS.items():
        for dim, axis in row.axes.items():
            size = getattr(model_config, DIMS[dim])
            if axis and size % mesh.shape[axis]:
                raise ConfigError(
                    f"model.{DIMS[dim]}={size} does not divide by "
                    f"mesh.{axis}={mesh.shape[axis]} (parameter {name}): "
                    f"choose a mesh.{axis} that divides it"
                )
    rows = batch_shards(mesh)
    if batch is not None and batch % rows:
        raise ConfigError(
            f"a batch of {batch} sequences (train.global_batch / "
            "train.grad_accum_steps) does not divide by "
            f"mesh.data x mesh.fsdp = {rows}: choose a multiple of {rows}"
        )


def batch_shards(mesh: Mesh) -> int:
    """How many shares a batch's rows are divided into: data x fsdp."""
    return mesh.shape[DATA] * mesh.shape[FSDP]


def data_shard(mesh: Mesh) -> tuple[int, int]:
    """(index, count): which of `count` shares of a batch's rows this process loads.

    Processes have the same index if their devices hold the same rows, as they do where
    a tensor axis spans hosts. Raises ConfigError where processes hold different numbers
    of rows.
    """
    rows_of: dict[int, set[int]] = {}  # process -> rows
    for row, devices in enumerate(mesh.devices.reshape(-1, mesh.shape[TENSOR])):
        for device in devices:
            rows_of.setdefault(device.process_index, set()).add(row)
    shares = sorted({tuple(sorted(rows)) for rows in rows_of.values()})
    if sum(map(len, shares)) != batch_shards(mesh):
        raise ConfigError(
            f"the mesh divides a batch's rows unevenly over {len(rows_of)} processes: "
            "choose mesh.tensor so that it divides, or is a multiple of, the devices "
            "of a process"
        )
    own_share = tuple(sorted(rows_of[jax.process_index()]))
    return shares.index(own_share), len(shares)


# ---------------------------------------------------------------- specs of a model


def _name(path: Sequence[Any]) -> str:
    """A parameter's name: ('layers', 3, 'attention', 'wq', '.value') -> 'attention.wq'.

    `path` is its path in JAX's tree of the model. The arrays of a Quantised and of an
    OutputMajor have the matrix's name.
    """
    keys = map(_key, path)
    inner = ("layers", "value", *_QUANTISED, _OUTPUT_MAJOR)
    return ".".join(key for key in keys if key not in inner and not key.isdigit())


def _key(entry: Any) -> str:
    """The text of a path's entry: a GetAttrKey, DictKey or SequenceKey."""
    key = getattr(entry, "name", getattr(entry, "key", getattr(entry, "idx", "")))
    return str(key)


_QUANTISED = "int8", "scale"  # the fields of quantised.Quantised
_OUTPUT_MAJOR = "output_major"  # the array of output_major.OutputMajor


def _axes(row: Parameter, path: Sequence[Any]) -> list[str | None]:
    """The mesh axes of the array at `path`, which is in this row."""
    key, dims = _key(path[-1]), list(row.axes)
    if key == _OUTPUT_MAJOR:
        dims.sort(key=lambda dim: dim in row.summed)
    is_scale = key == "scale"
    return [None if is_scale and dim in row.summed else row.axes[dim] for dim in dims]


def parameter_names(model: Any) -> Any:
    """`model`'s tree with every parameter's name in PARAMETERS."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _name(path), model)


def parameter_roles(model: Any) -> Any:
    """`model`'s tree with every parameter's role: embedding, matrix, norm or bias."""
    return jax.tree.map(lambda name: PARAMETERS[name].role, parameter_names(model))


def parameter_specs(model: Any) -> Any:
    """`model`'s tree with a PartitionSpec for every parameter."""

    def spec(path: Sequence[Any], leaf: Any) -> P:
        axes = _axes(PARAMETERS[_name(path)], path)
        stacked = (None,) * (leaf.ndim - len(axes))
        return P(*stacked, *axes)

    return jax.tree_util.tree_map_with_path(spec, model)


def named_shardings(mesh: Mesh, specs: Any) -> Any:
    """A tree of NamedSharding from a tree of PartitionSpec."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        specs,
        is_leaf=lambda x: isinstance(x, P),
    )


def abstract(shapes: Any, mesh: Mesh, specs: Any = None) -> Any:
    """`shapes` with a sharding for every array; nothing is allocated.

    Args:
      shapes: a tree whose leaves have shape and dtype, such as model.abstract(...).
      mesh: the mesh of the shardings.
      specs: a tree of PartitionSpec; `parameter_specs(shapes)` by default.
    """
    specs = parameter_specs(shapes) if specs is None else specs
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        named_shardings(mesh, specs),
    )


def shard_map(
    function: Callable[..., Any], mesh: Mesh, in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """`jax.shard_map` over the whole mesh, without JAX's check of replicated values.

    This file's derivative rules take its place: see the module's docstring.
    """
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


# ---------------------------------------------------------------- the collectives
# Each is called inside `shard_map`, on local shards.


def axis_size(axis: str) -> int:
    """The mesh's size along `axis`: a Python int."""
    return lax.axis_size(axis)


def largest(value: jax.Array) -> jax.Array:
    """The elementwise maximum over the tensor axis; no derivative passes through it."""
    return lax.pmax(lax.stop_gradient(value), TENSOR)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(shard: jax.Array, dim: int, dtype: Any) -> jax.Array:
    return lax.all_gather(shard.astype(dtype), FSDP, axis=dim, tiled=True)


def _gather_forward(shard: jax.Array, dim: int, dtype: Any) -> tuple[jax.Array, None]:
    return _gather(shard, dim, dtype), None


def _gather_backward(
    dim: int, dtype: Any, _: None, cotangent: jax.Array
) -> tuple[jax.Array]:
    """Sums the gradient over the fsdp axis in float32; each shard gets its part."""
    cotangent = cotangent.astype(jnp.float32)
    return (lax.psum_scatter(cotangent, FSDP, scatter_dimension=dim, tiled=True),)


_gather.defvjp(_gather_forward, _gather_backward)


def gather_parameters(module: Any, dtype: Any, prefix: str = "") -> Any:
    """A copy of `module` whose parameters are gathered over the fsdp axis, in `dtype`.

    With an fsdp axis of size 1 it returns `module` itself, uncast.

    Args:
      module: a part of the model, with no layer dimension.
      dtype: of the gathered parameters; the arrays of a Quantised keep theirs.
      prefix: the module's place in the model ("attention"): PARAMETERS has its names.
    """
    if axis_size(FSDP) == 1:
        return module

    def gather(path: Sequence[Any], leaf: jax.Array) -> jax.Array:
        name = ".".join(filter(None, (prefix, _name(path))))
        axes = _axes(PARAMETERS[name], path)
        if FSDP not in axes:
            return leaf
        own_dtype = leaf.dtype if _key(path[-1]) in _QUANTISED else dtype
        return _gather(leaf, axes.index(FSDP), own_dtype)

    return jax.tree_util.tree_map_with_path(gather, module)


def sum_gradients(gradients: Any, specs: Any) -> Any:
    """Sums each gradient over every axis that its parameter is not sharded over.

    `specs` are the parameters' (`parameter_specs`).
    """

    def total(gradient: jax.Array, spec: P) -> jax.Array:
        axes = tuple(axis for axis in AXES if axis not in spec and axis_size(axis) > 1)
        # a sum over no axis would be a copy on CPUs
        return lax.psum(gradient, axes) if axes else gradient

    return jax.tree.map(total, gradients, specs)


def norm(tree: Any, specs: Any) -> jax.Array:
    """The Euclidean norm of a tree of arrays sharded by `specs`, on every device.

    It takes one reduction for the whole tree.
    """
    squares = jnp.float32(0)
    for shard, spec in zip(jax.tree.leaves(tree), jax.tree.leaves(specs), strict=True):
        # The sum over all devices counts a shard once for each of its copies.
        copies = math.prod(axis_size(axis) for axis in AXES if axis not in spec)
        squares += jnp.sum(jnp.square(shard.astype(jnp.float32))) / copies
    axes = tuple(axis for axis in AXES if axis_size(axis) > 1)
    return jnp.sqrt(lax.psum(squares, axes) if axes else squares)


def gather_vocabulary(logits: jax.Array) -> jax.Array:
    """Gathers all tensor shards' logits: [..., V] of the whole vocabulary."""
    if axis_size(TENSOR) == 1:
        return logits
    return lax.all_gather(logits, TENSOR, axis=logits.ndim - 1, tiled=True)


def on_first_shard(value: jax.Array) -> jax.Array:
    """`value` as a partial: the first tensor shard has it, the others have zeros."""
    if axis_size(TENSOR) == 1:
        return value
    return jnp.where(lax.axis_index(TENSOR) == 0, value, 0)


def vocabulary_offset(local_size: int) -> jax.Array:
    """The first token id of this tensor shard, which holds `local_size` of them."""
    return lax.axis_index(TENSOR) * local_size
