"""Plans an engine's memory on one device: weights, keys and values, programs, logits.

The plan needs no arrays. `plan` knows all but what the programs take; `with_programs`
adds it, from XLA's own analysis of compiled programs.

The most is taken at one of two moments: while the weights are loaded, when one
parameter exists twice; and while the engine serves at its largest shape.
"""

import bisect
import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from ladder_jax import decode_state, decode_weights, model, sharding
from ladder_jax.config import ConfigError
from ladder_jax.hardware.memory import size
from ladder_jax.quantised import quantise_parameters
from ladder_jax.serve.design import Design

FLOAT_BYTES = 4  # of a logit
STEP = 64  # tokens that decode.max_length is lowered by, in advice
INT8_SAVES = 0.4  # of bfloat16 weights, at least


@dataclasses.dataclass(frozen=True)
class ProgramMemory:
    """What one compiled program takes on a device beside its arguments, in bytes."""

    temporary: int  # while it runs, with the outputs that take no argument's place
    code: int


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """The bytes that an engine takes on one device."""

    weights: int
    loaded: int  # the weights as they are read; more than `weights` if those are int8
    largest_parameter: int  # all layers of it: it exists twice while weights load
    keys_values: int  # of slots and staging
    prefixes: int
    reshaping: int  # one array of keys or values, which a change of shape copies
    states: int  # of slots and staging, without keys and values: the tokens' counts
    logits: int  # of all slots or of one prefill call, float32; part of `temporary`
    temporary: int  # of the program that takes most; from `plan`: the logits
    code: int  # of all programs; from `plan`: 0

    @property
    def loading(self) -> int:
        """While the weights are loaded."""
        return self.loaded + self.largest_parameter

    @property
    def serving(self) -> int:
        """While the engine serves at its largest shape."""
        resident = self.weights + self.keys_values + self.prefixes + self.states
        return resident + max(self.temporary, self.reshaping) + self.code

    @property
    def total(self) -> int:
        """The most at any moment."""
        return max(self.loading, self.serving)

    def text(self) -> str:
        """The parts, on one line."""
        parts = {
            "weights": self.weights,
            "keys and values": self.keys_values,
            "prefixes": self.prefixes,
            "requests' states": self.states,
            "programs": max(self.temporary, self.reshaping) + self.code,
        }
        shown = [f"{name} {size(count)}" for name, count in parts.items() if count]
        logits = f" (logits {size(self.logits)})" if self.logits else ""
        return f"{', '.join(shown)}{logits}"


def plan(design: Design) -> MemoryPlan:
    """Returns the plan without the programs, of which only the logits are known."""
    loaded = loaded_model(design)
    converted = loaded
    if design.spec.weights_dtype == "int8":
        shapes = jax.eval_shape(quantise_parameters, loaded)
        converted = sharding.abstract(shapes, design.mesh)
    state = abstract_state(
        design, design.capacity.widths[-1], design.capacity.lengths[-1]
    )
    arrays = sum(_bytes(state))
    capacity = design.capacity
    pool = None if state.pool is None else state.pool.kv
    cached = sum(_bytes([state.slots.kv, state.staging.kv, pool]))
    keys_values = capacity.memory["rows"]
    # A pool has the prefixes, too.
    prefixes = cached - keys_values if pool else capacity.memory["prefixes"]
    shapes = capacity.prefill_shapes(capacity.lengths[-1])
    slot_rows = capacity.slots * design.spec.most_tokens
    rows = max(slot_rows, *(count for _, count, _ in shapes))
    logits = rows * design.model_config.vocab_size * FLOAT_BYTES
    return MemoryPlan(
        weights=sum(_bytes(abstract_weights(design))),
        loaded=sum(_bytes(loaded)),
        largest_parameter=max(_bytes(converted)),
        keys_values=keys_values,
        prefixes=prefixes,
        reshaping=capacity.memory["reshaping"],
        states=arrays - cached,
        logits=logits,
        temporary=logits,
        code=0,
    )


def with_programs(
    memory: MemoryPlan, programs: Iterable[ProgramMemory], count: int
) -> MemoryPlan:
    """Returns the plan with what these compiled programs take.

    count: how many there will be: each of the others has as much code as one of these
      at most.
    """
    known = list(programs)
    code = [program.code for program in known]
    return dataclasses.replace(
        memory,
        temporary=max(memory.logits, *(program.temporary for program in known)),
        code=sum(code) + (count - len(code)) * max(code),
    )


def check(memory: MemoryPlan, design: Design, limit: int | None) -> None:
    """Raises ConfigError, which says what to lower, unless the plan fits.

    limit: the bytes that are free on a device; None: unknown, and all plans fit.
    """
    if limit is None or memory.total <= limit:
        return
    devices = design.mesh.size
    each = "the device" if devices == 1 else f"each of {devices} devices"
    raise ConfigError(
        f"the engine needs {size(memory.total)} on {each}, and {size(limit)} are free: "
        f"{memory.text()}; {advice(memory, design, limit)}"
    )


def advice(memory: MemoryPlan, design: Design, limit: int) -> str:
    """What the user can change so that the plan fits, most useful first."""
    if memory.loading > limit:
        return (
            "the weights alone need "
            f"{size(memory.loading)} while they are loaded: use more devices (--tensor)"
        )
    options, capacity = design.options, design.capacity

    def fits(**changed: int) -> bool:
        return dataclasses.replace(memory, **changed).serving <= limit

    def with_slots(slots: int) -> bool:
        rows = slots + capacity.staging_size_for(slots)
        all_rows = capacity.slots + capacity.staging_size
        return fits(
            keys_values=memory.keys_values * rows // all_rows,
            states=-(-memory.states * rows // all_rows),
            reshaping=capacity.budget(slots)["reshaping"],
        )

    def with_length(length: int) -> bool:
        return fits(
            keys_values=-(-memory.keys_values * length // design.length),
            reshaping=-(-memory.reshaping * length // design.length),
        )

    ways = []
    # Programs for fewer slots take less, too; nobody has compiled them.
    fewer = bisect.bisect_left(
        range(1, capacity.slots), True, key=lambda slots: not with_slots(slots)
    )
    if fewer:
        ways.append(f"lower decode.slots from {capacity.slots} to {fewer}")
    shorter = range(STEP, design.length, STEP)
    count = bisect.bisect_left(
        shorter, True, key=lambda length: not with_length(length)
    )
    if count:
        length = shorter[count - 1]
        ways.append(f"decode.max_length from {design.length} to {length}")
    excess = memory.serving - limit
    if memory.prefixes >= excess:
        left = memory.prefixes - excess
        ways.append(
            f"decode.prefix_memory from {options.prefix_memory} to {left >> 20}MiB"
        )
    smaller = {"float32": "bfloat16", "bfloat16": "int8"}.get(design.spec.kv_dtype)
    factor = {"bfloat16": 2, "int8": 1.8}.get(smaller or "", 1)
    if smaller and memory.keys_values * (1 - 1 / factor) >= excess:
        ways.append(f"choose decode.kv_dtype={smaller}")
    if design.spec.weights_dtype != "int8" and memory.weights * INT8_SAVES >= excess:
        ways.append("choose decode.weights_dtype=int8")
    if memory.temporary > memory.keys_values:  # logits, most of it
        ways.append(f"decode.prefill_budget from {options.prefill_budget}")
        if options.prompt_logprobs:
            ways.append("set decode.prompt_logprobs=False")
    ways.append("use more devices (--tensor)")
    return ", or ".join(ways)


# ---------------------------------------------------------------- abstract arrays


def loaded_model(design: Design) -> model.Transformer:
    """The parameters as they are loaded: shapes, shardings, and the dtypes of decoding.

    So a checkpoint in float32 is cast while it is read, shard by shard.
    """
    shapes = model.abstract(design.model_config)

    def cast(role: sharding.Role, x: Any) -> jax.ShapeDtypeStruct:
        dtype = x.dtype if role == "norm" else jnp.dtype(design.model_config.dtype)
        return jax.ShapeDtypeStruct(x.shape, dtype)

    shapes = jax.tree.map(cast, sharding.parameter_roles(shapes), shapes)
    return sharding.abstract(shapes, design.mesh)


def abstract_weights(design: Design) -> Any:
    """The weights of the engine's programs, as shapes with shardings."""
    return decode_weights.abstract_weights(design.spec)


def abstract_state(design: Design, width: int, length: int) -> decode_state.DecodeState:
    """The engine's decode state at one of its shapes, as shapes with shardings."""
    capacity = design.capacity
    return decode_state.abstract(
        design.spec, width, capacity.staging_size, length, capacity.page_count
    )


def _bytes(tree: Any) -> list[int]:
    """The bytes of each array of a tree on one device."""
    return [
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    ]
