"""The design of an engine: its shapes and its programs' spec, before it has weights."""

import dataclasses
import math
from typing import NamedTuple

import jax

from ladder_jax import decode, kv_cache, page_kernels, sharding, speculation
from ladder_jax.config import ConfigError, Decode, Model, require, to_bytes
from ladder_jax.data.tokenizer import Tokenizer
from ladder_jax.hardware import chips
from ladder_jax.residual import choose
from ladder_jax.serve.capacity import Capacity

# Bytes of the slots' rows on a device from which on pages are faster. On two CPU cores
# a step with rows takes 1.1 to 2.5 times as long for 64 to 268 MiB (five cases; with 4
# slots of 125M and 144 MiB: 0.94 times), and 0.8 times for 17 MiB. On TPUs and GPUs the
# plan says so (docs/log.md): with rows that are a third full on average, a step with
# pages takes 0.60 to 0.98 times as long for 64 MiB and more, and 0.94 to 1.03 times for
# 16 MiB; with full rows 0.89 to 1.04 times.
LEAST_FOR_PAGES = 48 * 2**20


class Design(NamedTuple):
    """What an engine is, without its weights; nothing is allocated for it."""

    model_config: Model
    mesh: jax.sharding.Mesh
    options: Decode  # `slots` is a number
    length: int  # the most tokens of a request
    vocabulary: int  # ids are below it
    spec: decode.DecodeSpec
    capacity: Capacity

    @property
    def padding_id(self) -> int:
        """A token id outside the vocabulary."""
        return self.model_config.vocab_size


def design(
    model_config: Model,
    mesh: jax.sharding.Mesh,
    options: Decode | None = None,
    tokenizer: Tokenizer | None = None,
    reduction: str = "auto",
) -> Design:
    """Returns the design of an engine with these arguments, see engine.Engine.

    Raises ConfigError if the options do not fit the model, the mesh, the tokenizer or
    decode.kv_memory.
    """
    options = options or Decode()
    if tokenizer is not None:  # requests stop at every id that it ends at
        most_ids = max(options.max_stop_ids, len(tokenizer.eos_ids))
        options = dataclasses.replace(options, max_stop_ids=most_ids)
    length = options.max_length or model_config.max_length
    vocabulary = tokenizer.size if tokenizer else model_config.vocab_size
    _check_sizes(model_config, mesh, length, vocabulary)
    spec = _spec(model_config, mesh, vocabulary, options, reduction=reduction)
    token_bytes = kv_cache.bytes_per_token(model_config, spec.kv_dtype)
    token_bytes //= mesh.shape[sharding.TENSOR]
    platform = chips.platform(mesh)
    page_size, kernel, reason = _pages(options, platform, model_config, spec)
    if layout(options, platform, length * token_bytes, kernel, reason) == "pages":
        policy = choose.reduction_for(reduction, model_config, mesh, "pages")
        spec = spec._replace(page_size=page_size, page_kernel=kernel, reduction=policy)
    if options.carry_tokens:
        _check_carrying(options, spec)
    capacity = Capacity(
        options,
        length,
        token_bytes,
        page_size=spec.page_size,
        arrays=2 * model_config.layers if options.unroll_layers else 2,
        prefix_bytes=to_bytes(options.prefix_memory, "decode.prefix_memory"),
        fixed_trip_count=spec.fixed_trip_count,
        compute_bound=platform == "cpu",
    )
    options = dataclasses.replace(options, slots=capacity.slots)
    return Design(model_config, mesh, options, length, vocabulary, spec, capacity)


def _check_sizes(
    model_config: Model, mesh: jax.sharding.Mesh, length: int, vocabulary: int
) -> None:
    """Raises ConfigError unless model, mesh, length and tokenizer fit together."""
    data, fsdp = mesh.shape[sharding.DATA], mesh.shape[sharding.FSDP]
    if data * fsdp != 1:
        raise ConfigError(
            f"mesh.data x mesh.fsdp = {data * fsdp} is not accepted: both must be 1, "
            "as an engine decodes on tensor shards of one model"
        )
    sharding.check_fits(model_config, mesh)
    most = model_config.max_length
    require(
        length <= most, "decode.max_length", length, f"at most model.max_length={most}"
    )
    ids = model_config.vocab_size
    if vocabulary > ids:
        raise ConfigError(
            f"the tokenizer has {vocabulary} ids, but model.vocab_size={ids}"
        )


def _check_carrying(options: Decode, spec: decode.DecodeSpec) -> None:
    """Raises ConfigError where no iteration can carry a piece of a prompt."""
    name, tokens = "decode.carry_tokens", options.carry_tokens
    needed = "0 unless requests have pages: set decode.kv_layout=pages"
    require(spec.page_size > 0, name, tokens, needed)
    processes = {device.process_index for device in spec.mesh.devices.flat}
    needed = "0 on several hosts, where each would measure other times"
    require(len(processes) == 1, name, tokens, needed)


def _spec(
    model_config: Model,
    mesh: jax.sharding.Mesh,
    vocabulary: int,
    options: Decode,
    reduction: str,
) -> decode.DecodeSpec:
    """Returns the DecodeSpec of an engine, with values instead of "auto"."""
    platform = chips.platform(mesh)
    is_gpu = platform in chips.GPUS
    kv_dtype = kv_cache.choose_dtype(options.kv_dtype, model_config.dtype, platform)
    return decode.DecodeSpec(
        model_config=model_config,
        mesh=mesh,
        vocabulary=vocabulary,
        max_stop_ids=options.max_stop_ids,
        max_logit_bias=options.max_logit_bias,
        max_logprobs=min(options.max_logprobs, vocabulary),
        kv_dtype=kv_dtype,
        unroll_layers=options.unroll_layers,
        fixed_trip_count=options.loop == "fixed" or (options.loop == "auto" and is_gpu),
        reduction=choose.reduction_for(reduction, model_config, mesh),
        weights_dtype=options.weights_dtype,
        speculate=options.speculate,
        balance=_balance(platform),
    )


def _balance(platform: str) -> int:
    """Returns DecodeSpec.balance for devices of a platform."""
    if platform == "cpu":
        return speculation.BALANCE_CPU
    return speculation.BALANCE_ACCELERATOR


def layout(
    options: Decode, platform: str, row_bytes: int, kernel: str, reason: str
) -> str:
    """Returns decode.kv_layout, or the faster one for "auto": "pages" or "rows".

    Args:
      platform: of the devices.
      row_bytes: of the longest request's keys and values on one device.
      kernel, reason: see page_kernels.kernel_for.
    Raises ConfigError for pages on GPUs, if no kernel fits.
    """
    if options.kv_layout == "pages" and platform in chips.GPUS and kernel == "xla":
        raise ConfigError(
            "decode.kv_layout=pages is not accepted on GPUs without a kernel, as a "
            f"loop over pages waits for the host in every iteration: {reason}; set it "
            "to rows"
        )
    if options.kv_layout != "auto":
        return options.kv_layout
    if options.slots is None:
        size = to_bytes(options.kv_memory or "0", "decode.kv_memory")
    else:
        size = options.slots * row_bytes
    is_fast = platform == "cpu" or kernel != "xla"
    return "pages" if is_fast and size >= LEAST_FOR_PAGES else "rows"


def _has_prefixes(options: Decode) -> bool:
    return to_bytes(options.prefix_memory, "decode.prefix_memory") > 0


def _pages(
    options: Decode, platform: str, model_config: Model, spec: decode.DecodeSpec
) -> tuple[int, str, str]:
    """Returns (tokens of a page, kernel, why it is "xla"), if the layout is pages.

    Raises ConfigError if prefix_block has a part of a page.
    """
    kernel, reason = page_kernels.kernel_for(
        platform,
        model_config,
        spec.kv_dtype,
        spec.mesh.shape[sharding.TENSOR],
        spec.unroll_layers,
    )
    size, block = options.page_size, options.prefix_block
    best = page_kernels.PAGE_SIZES[kernel]
    if options.kv_layout != "rows" and _has_prefixes(options):
        size = size or math.gcd(best, block)
        require(
            block % size == 0,
            "decode.page_size",
            size,
            f"a divisor of decode.prefix_block={block}, as prompts share whole pages",
        )
    size = size or best
    if not page_kernels.reads_pages_of(kernel, size):
        return size, "xla", f"it reads pages of 16, 32, 64, ... tokens, not of {size}"
    return size, kernel, reason
