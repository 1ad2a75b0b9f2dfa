"""Compiles the project's own programs for chips that this machine does not have.

The programs are a decode step, a prefill and a training step. report.py parses the
compiled program and reports which communication overlaps with compute.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ladder_jax import (
    attention,
    config,
    model,
    page_kernels,
    pages,
    sharding,
    train_programs,
    training,
)
from ladder_jax.config import Config, ConfigError
from ladder_jax.hardware import aot, chips, xla_options
from ladder_jax.kv_cache import KV, bytes_per_token
from ladder_jax.optimizer import make_optimizer
from ladder_jax.planner import fused, hlo
from ladder_jax.planner.stack import Stack, shorten
from ladder_jax.residual import choose
from ladder_jax.residual.layers import narrow_blocks
from ladder_jax.residual.reductions import LANES
from ladder_jax.serve import design


class Request(NamedTuple):
    """A program to plan."""

    recipe: str
    config: Config
    target: aot.Target
    workload: str  # "decode", "prefill" or "train"
    batch: int  # rows (decode, prefill) or sequences (train), over all devices
    # Tokens: of the cache (decode), of a prompt (prefill), of a sequence (train).
    context: int
    most: int = 4  # layers of each kind to compile
    # Decode: "rows" of `context` tokens, which are read whole; "pages"; or "auto", what
    # an engine takes.
    kv_layout: str = "rows"
    tokens: int | None = None  # decode: of all rows together; None: batch x context
    drafts: int = 0  # decode: drafted tokens of a row, beside the new one
    parts: int = 1  # train: into how many a step divides its batch, one after another
    # train: whether attention is a fused kernel, whose time fused.py has; else XLA's.
    fused: bool = False

    @property
    def alive(self) -> int:
        """The tokens that the cache of a decode step has."""
        return self.tokens or self.batch * self.context

    @property
    def at_once(self) -> int:
        """The rows or sequences, over all devices, that are computed together."""
        return self.batch // self.parts


class Program(NamedTuple):
    """A jitted function and the abstract arguments to compile it for."""

    function: Any
    arguments: tuple[Any, ...]


class Compiled(NamedTuple):
    """A program that XLA has compiled for a target."""

    request: Request
    mesh: jax.sharding.Mesh
    stack: Stack
    text: str  # the scheduled program of the short stack
    # Bytes on a device for the model of the request, with all its layers.
    weights: float  # parameters and, in training, the optimizer's state
    kv: float  # the cache
    temporary: float  # everything else, while the program runs
    # Whether XLA overlaps collectives at all; a GPU may lack the memory (aot.py).
    overlaps: bool = True


def build(request: Request) -> Compiled:
    """Compiles the program of a request.

    Raises ConfigError where the model does not fit the mesh or XLA cannot compile it.
    """
    target, model_config = request.target, request.config.model
    mesh = make_mesh_for(request.config.mesh, target.devices(), request.workload)
    sharding.check_fits(model_config, mesh, request.at_once)
    request = request._replace(kv_layout=layout_of(request, mesh))
    stack = short_stack(request)
    whole, short = make_program(request, mesh), make_program(request, mesh, stack)
    size, limit = bytes_per_device(whole.arguments), target.argument_limit
    has_memory = size <= target.chip.hbm_bytes  # else it is planned as if it fitted
    overlaps = limit is None or size < limit or not has_memory
    if limit is not None and has_memory:
        # XLA gets the memory that the whole model's arguments leave.
        devices = target.devices(size - bytes_per_device(short.arguments))
        mesh = make_mesh_for(request.config.mesh, devices, request.workload)
        short = make_program(request, mesh, stack)
    try:
        compiled = short.function.lower(*short.arguments).compile(
            compiler_options=target.options(request.workload, xla_options.merging(mesh))
        )
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        message = _explain(error, request, stack)
        if message is None:
            raise
        raise ConfigError(message) from None
    weights, *others = whole.arguments
    growth = growth_with_depth(hlo.parse(text), stack, short.arguments)
    if request.parts > 1:  # the sums of the parts' gradients, beside those of a part
        growth += bytes_per_device(weights.model)
        growth -= bytes_per_device(short.arguments[0].model)
    return Compiled(
        request,
        mesh,
        stack,
        text,
        bytes_per_device(weights),
        0 if request.workload == "train" else bytes_per_device(others[-1]),
        compiled.memory_analysis().temp_size_in_bytes + growth,
        overlaps,
    )


def argument_bytes(request: Request) -> int:
    """Bytes on a device of the parameters, and the cache or the optimizer's state."""
    devices = request.target.devices()
    mesh = make_mesh_for(request.config.mesh, devices, request.workload)
    sharding.check_fits(request.config.model, mesh, request.batch)
    request = request._replace(kv_layout=layout_of(request, mesh))
    return bytes_per_device(make_program(request, mesh).arguments)


def make_mesh_for(
    mesh_config: config.Mesh, devices: Sequence[jax.Device], workload: str
) -> jax.sharding.Mesh:
    """The recipe's mesh on a target's devices.

    Where the recipe's mesh has another size than the target, its tensor axis keeps its
    size. The other devices then shard the parameters (training), or hold replicas that
    decode other rows.
    """
    sizes = mesh_config.data, mesh_config.fsdp, mesh_config.tensor
    takes_all = -1 in sizes[:2] or np.prod(sizes) == len(devices)
    if not takes_all:
        data, fsdp = (1, -1) if workload == "train" else (-1, 1)
        mesh_config = dataclasses.replace(mesh_config, data=data, fsdp=fsdp)
    return sharding.make_mesh(mesh_config, devices)


def short_stack(request: Request) -> Stack:
    """The stack of few layers to compile in place of the model of a request."""
    model_config = request.config.model
    ends = 1
    if request.workload == "prefill":
        # The last layers compute less: only the last position's output is needed.
        blocks = model_config.residual_schedule()
        first_narrow = narrow_blocks(blocks)[0] // len(blocks.layers[0])
        ends = model_config.layers - first_narrow
    return shorten(model_config, request.most + ends - 1, ends)


def _explain(error: Exception, request: Request, stack: Stack) -> str | None:
    """The message for an error of XLA that the user can mend; None for other errors."""
    name, text = request.target.name, str(error)
    first_line = text.splitlines()[0]
    if "RET_CHECK" in text:
        # libtpu is newer than jaxlib, which cannot parse the program.
        return f"the program for {name} cannot be read back: {first_line[-150:]}"
    if "RESOURCE_EXHAUSTED" in text:
        return (
            f"batch={request.batch}, context={request.context}: even "
            f"{len(stack.counts)} layers do not fit into {name}: {first_line[:200]}"
        )
    return None


# ---------------------------------------------------------------- the programs


def make_program(
    request: Request, mesh: jax.sharding.Mesh, stack: Stack | None = None
) -> Program:
    """The program of a request; with `stack`, the program of its short model."""
    model_config = request.config.model
    if stack is not None:
        model_config = dataclasses.replace(
            model_config,
            layers=len(stack.counts),
            residual=stack.notation,
            window_layers=stack.window_layers,
            nope_layers=stack.nope_layers,
        )
    if request.workload == "train":
        train_config = dataclasses.replace(
            request.config.train,
            global_batch=request.batch,
            seq_len=request.context,
            grad_accum_steps=request.parts,
        )
        whole = dataclasses.replace(
            request.config, model=model_config, train=train_config
        )
        return training_step(whole, mesh, request.fused)
    is_decode = request.workload == "decode"
    tokens = 1 + request.drafts if is_decode else request.context
    # By the whole model: the table of reductions does not know the short one.
    reduction = choose.reduction_for(
        request.config.mesh.reduction,
        request.config.model,
        mesh,
        request.kv_layout,
    )
    if request.kv_layout == "pages":
        return decode_in_pages(request, model_config, mesh, reduction)
    return forward_pass(
        model_config,
        mesh,
        request.batch,
        tokens,
        request.context,
        reduction,
        reads_all=is_decode,
        sequence_parallel=request.config.mesh.sequence_parallel and not is_decode,
    )


def forward_pass(
    model_config: config.Model,
    mesh: jax.sharding.Mesh,
    batch: int,
    tokens: int,
    context: int,
    reduction: Any,
    reads_all: bool,
    sequence_parallel: bool = False,
) -> Program:
    """The logits after `tokens` new tokens in each of `batch` rows.

    Parameters are in the compute dtype, as in the engine, and an array for every layer.

    Args:
      model_config: the model.
      mesh: its devices.
      batch: rows over all devices.
      tokens: new tokens of a row: 1 in decode, or with drafts 1 more than these.
      context: positions of the cache.
      reduction: of `model.hidden`.
      reads_all: whether there are logits after each of them, or after the last.
      sequence_parallel: of `model.hidden`.
    """
    parameters = unstacked_parameters(model_config)
    specs = sharding.parameter_specs(parameters)
    cache = empty_cache(model_config, batch, context)
    cache_specs = jax.tree.map(lambda _: P(*sharding.CACHE[1:]), cache)

    def local(
        parameters: Any, tokens_BT: jax.Array, positions_BT: jax.Array, cache: list[KV]
    ) -> tuple[jax.Array, list[KV]]:
        read_BR = None
        if tokens > 1 and not reads_all:
            read_BR = jnp.full((tokens_BT.shape[0], 1), tokens - 1)
        x_B1D, cache = model.hidden(
            parameters,
            model_config,
            tokens_BT,
            positions_BT,
            cache=cache,
            read_BR=read_BR,
            reduction=reduction,
            sequence_parallel=sequence_parallel,
            twice=chips.doubles_row(mesh),
        )
        return model.logits(parameters, model_config, x_B1D), cache

    in_specs = (specs, sharding.TOKENS, sharding.TOKENS, cache_specs)
    cache_format = None
    if reads_all and model_config.head_dim % LANES:
        # XLA may choose the cache's layout, as it does in the engine's loop. Where
        # heads fill a TPU's lanes it takes JAX's own layout.
        cache_format = jax.tree.map(
            lambda spec: Format(Layout.AUTO, NamedSharding(mesh, spec)),
            cache_specs,
            is_leaf=lambda x: isinstance(x, P),
        )
    function = jax.jit(
        sharding.shard_map(local, mesh, in_specs, (sharding.LOGITS, cache_specs)),
        donate_argnums=3,
        in_shardings=(None, None, None, cache_format),
        out_shardings=(None, cache_format),
    )
    ids = jax.ShapeDtypeStruct((batch, tokens), jnp.int32)
    arguments = parameters, ids, ids, cache
    return Program(function, sharding.abstract(arguments, mesh, in_specs))


def decode_in_pages(
    request: Request,
    model_config: config.Model,
    mesh: jax.sharding.Mesh,
    reduction: Any,
) -> Program:
    """`forward_pass` of a decode step, with keys and values in pages.

    There are the pages that attention reads for the request's tokens, and no others, so
    that the bytes of this argument are those that the kernel reads.
    Raises ConfigError where no kernel fits.
    """
    kernel, size, count = pages_of(request, model_config, mesh)
    parameters = unstacked_parameters(model_config)
    specs = sharding.parameter_specs(parameters)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    make_layer = partial(
        pages.empty,
        model_config.kv_heads,
        count * shards,
        size,
        model_config.head_dim,
        model_config.dtype,
        kernel,
    )
    pool = [jax.eval_shape(make_layer)] * model_config.layers
    pool_spec = P(sharding.TENSOR, sharding.BATCH_AXES, None, None)
    if kernel == "ragged":
        pool_spec = P(sharding.BATCH_AXES, None, sharding.TENSOR, None)
    pool_specs = jax.tree.map(lambda _: pool_spec, pool)

    def local(
        parameters: Any,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        table_BM: jax.Array,
        pool: Any,
    ) -> tuple[jax.Array, Any]:
        last_B = positions_BT[:, -1]
        reads = pages.reads(table_BM, last_B, last_B >= 0, size, count, kernel)
        x_BTD, pool = model.hidden(
            parameters,
            model_config,
            tokens_BT,
            positions_BT,
            cache=pool,
            pages_read=reads,
            reduction=reduction,
            twice=chips.doubles_row(mesh),
        )
        return model.logits(parameters, model_config, x_BTD), pool

    in_specs = (specs, sharding.TOKENS, sharding.TOKENS, sharding.TOKENS, pool_specs)
    function = jax.jit(
        sharding.shard_map(local, mesh, in_specs, (sharding.LOGITS, pool_specs)),
        donate_argnums=4,
    )
    new = 1 + request.drafts
    ids = jax.ShapeDtypeStruct((request.batch, new), jnp.int32)
    entries = -(-request.context // size)
    table = jax.ShapeDtypeStruct((request.batch, entries), jnp.int32)
    arguments = parameters, ids, ids, table, pool
    return Program(function, sharding.abstract(arguments, mesh, in_specs))


def layout_of(request: Request, mesh: jax.sharding.Mesh) -> str:
    """The request's kv_layout, with the engine's choice for "auto"."""
    if request.workload != "decode" or request.kv_layout != "auto":
        return request.kv_layout if request.workload == "decode" else "rows"
    model_config, tensor = request.config.model, mesh.shape["tensor"]
    row_bytes = request.context * bytes_per_token(model_config, model_config.dtype)
    slots = max(request.batch // (mesh.shape["data"] * mesh.shape["fsdp"]), 1)
    return design.layout(
        config.Decode(slots=slots),
        chips.platform(mesh),
        row_bytes // tensor,
        *kernel_of(model_config, mesh),
    )


def kernel_of(model_config: config.Model, mesh: jax.sharding.Mesh) -> tuple[str, str]:
    """The kernel that reads pages of the model's dtype: page_kernels.kernel_for."""
    return page_kernels.kernel_for(
        chips.platform(mesh), model_config, model_config.dtype, mesh.shape["tensor"]
    )


def pages_of(
    request: Request, model_config: config.Model, mesh: jax.sharding.Mesh
) -> tuple[str, int, int]:
    """(kernel, tokens of a page, pages a data shard) of a decode step in pages.

    Raises ConfigError where no kernel fits.
    """
    tensor = mesh.shape["tensor"]
    kernel, reason = kernel_of(model_config, mesh)
    if kernel == "xla":
        raise ConfigError(f"kv_layout=pages is not accepted without a kernel: {reason}")
    size = page_kernels.PAGE_SIZES[kernel]
    heads, H = model_config.kv_heads // tensor, model_config.head_dim
    token_bytes = 2 * heads * H * jnp.dtype(model_config.dtype).itemsize
    block = page_kernels.block_tokens(kernel, size, token_bytes)
    rows = request.batch // (mesh.shape["data"] * mesh.shape["fsdp"])
    # Of rows of several lengths, the mean one stands for all.
    row = page_kernels.tokens_read(-(-request.alive // request.batch), block)
    return kernel, size, rows * row // size


def unstacked_parameters(model_config: config.Model) -> model.Unstacked:
    """Abstract parameters in the compute dtype, with an array for every layer."""
    dtype = jnp.dtype(model_config.dtype)
    cast = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, dtype), model.abstract(model_config)
    )
    return jax.eval_shape(model.unstack, cast)


def empty_cache(model_config: config.Model, batch: int, context: int) -> list[KV]:
    """The abstract cache of every layer, [B, K, S, H]."""
    shape = batch, model_config.kv_heads, context, model_config.head_dim
    rows: Any = jax.ShapeDtypeStruct(shape, jnp.dtype(model_config.dtype))
    return [KV(rows, rows)] * model_config.layers


def training_step(
    whole: Config, mesh: jax.sharding.Mesh, is_fused: bool = False
) -> Program:
    """The training step of a config; see Request.fused."""
    optimizer = make_optimizer(whole.optimizer, whole.train.steps)
    shape = whole.train.global_batch, whole.train.seq_len
    dtypes = dict.fromkeys(training.BATCH_FIELDS, jnp.int32) | {"weights": jnp.float32}
    batch = {name: jax.ShapeDtypeStruct(shape, dtype) for name, dtype in dtypes.items()}
    # JAX asks cuDNN during tracing what it can do, and cuDNN is not here: XLA's own
    # attention stands for it.
    kernel: attention.Kernel | None = None
    if chips.platform(mesh) != "tpu":
        kernel = fused.stand_in if is_fused else "xla"
    return Program(
        train_programs.make_step(whole, mesh, optimizer, kernel),
        (
            train_programs.abstract_state(whole, mesh, optimizer),
            sharding.abstract(batch, mesh, dict.fromkeys(batch, sharding.TOKENS)),
        ),
    )


# ---------------------------------------------------------------- memory


def state_bytes(request: Request) -> tuple[int, int]:
    """Bytes on a device of a training step without activations, and of its gradients.

    The first are parameters, the optimizer's state and gradients, without compiling.
    """
    mesh = make_mesh_for(request.config.mesh, request.target.devices(), "train")
    optimizer = make_optimizer(request.config.optimizer, request.config.train.steps)
    state = train_programs.abstract_state(request.config, mesh, optimizer)
    gradients = bytes_per_device(state.model)
    held = gradients if request.parts == 1 else 2 * gradients
    return bytes_per_device(state) + held, gradients


def bytes_per_device(tree: Any) -> int:
    """Bytes of a tree of sharded, abstract arrays on each device."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def growth_with_depth(
    module: hlo.Module, stack: Stack, arguments: tuple[Any, ...]
) -> float:
    """Bytes by which the temporaries of the deep model exceed those of the short one.

    They are arrays with a row for every layer, which a scan keeps for the backward
    pass, and in training the gradients of the layers.
    """
    read, *others = arguments
    if isinstance(read, train_programs.State):
        read = read.model  # layers read no moments
    argument_shapes = sorted(
        x.sharding.shard_shape(x.shape) for x in jax.tree.leaves((read, others))
    )
    growth: dict[str, float] = {}  # by scan; its loops save the same arrays
    for body in module.computations.values():
        for loop in body.values():
            scan = stack.scan_of(loop, module) if loop.opcode == "while" else None
            if scan is not None:
                saved = _saved_by_layer(loop, scan.short, list(argument_shapes))
                more = saved * (scan.deep / scan.short - 1)
                growth[scan.scope] = max(growth.get(scan.scope, 0.0), more)
    return sum(growth.values())


def _saved_by_layer(
    loop: hlo.Instruction, rows: int, argument_shapes: list[tuple[int, ...]]
) -> int:
    """Bytes of the loop's arrays in HBM that have a row for every repetition, without
    arguments of the program."""
    total = 0
    for array in loop.outputs:
        if array.dims in argument_shapes:
            argument_shapes.remove(array.dims)
        elif array.dims[:1] == (rows,) and array.space == 0:
            total += array.bytes
    return total
