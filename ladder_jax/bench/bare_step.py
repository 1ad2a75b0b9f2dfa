"""Measures the bare step: what a decode step takes without an engine around it."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from ladder_jax import (
    decode,
    decode_state,
    decode_weights,
    model,
    pages,
    sampling,
    sharding,
)
from ladder_jax.bench.decode_arguments import Arguments
from ladder_jax.hardware import xla_options
from ladder_jax.serve.engine import Engine

# How often the bare step is measured before and after every policy. The median counts.
BARE_ROUNDS = 6


def bare_step(
    engine: Engine, width: int, length: int, iterations: int
) -> Callable[[int], float]:
    """Compiles the bare step: forward pass and argmax, at positions from length / 2 on.

    Returns a function that measures it so many times, and returns the median seconds of
    an iteration.
    """
    spec = engine.spec
    entries = decode_state.table_size(spec, length)
    state = decode_state.empty(spec, width, 1, length, width * entries)
    table_WM = jnp.arange(width * entries, dtype=jnp.int32).reshape(width, entries)

    def local(weights: Any, token_W: jax.Array, position_W: jax.Array, kv: Any) -> Any:
        def step(_: jax.Array, carry: Any) -> Any:
            token_W, position_W, kv = carry
            reads = None
            if spec.page_size:
                reads_W = jnp.ones(width, bool)
                reads = pages.pairs(
                    table_WM, position_W, reads_W, spec.page_size, table_WM.size
                )
            x_W1D, kv = model.hidden(
                weights,
                spec.model_config,
                token_W[:, None],
                position_W[:, None],
                cache=kv,
                pages_read=reads,
            )
            logits_W1V = sharding.gather_vocabulary(
                model.logits(weights, spec.model_config, x_W1D)
            )
            token_W = sampling.argmax(logits_W1V[:, 0])
            return token_W, (position_W + 1) % length, kv

        return lax.fori_loop(0, iterations, step, (token_W, position_W, kv))

    specs = P(), P(), decode.kv_specs(spec)
    step = jax.jit(
        sharding.shard_map(
            local, spec.mesh, (decode_weights.weights_specs(spec), *specs), specs
        ),
        donate_argnums=3,
        compiler_options=xla_options.options(spec.mesh, "decode"),
    )
    tokens = np.zeros(width, np.int32)
    positions = np.full(width, length // 2, np.int32)
    kv = state.slots.kv if state.pool is None else state.pool.kv
    carry: Any = tokens, positions, kv

    def measure_step(rounds: int) -> float:
        nonlocal carry
        seconds = []
        for _ in range(rounds + 1):
            start = time.perf_counter()
            carry = jax.block_until_ready(step(engine.programs.weights, *carry))
            seconds.append((time.perf_counter() - start) / iterations)
        return float(np.median(seconds[1:]))

    return measure_step


def compare_weights(
    arguments: Arguments, full: Engine, int8: Engine, length: int
) -> dict[str, float]:
    """Measures the bare step of two engines in turn, at width 1 and at full width.

    Returns {width: the time with weights in --dtype over that with int8 weights}.
    """
    gain = {}
    for width in sorted({1, arguments.slots}):
        steps = [
            bare_step(engine, width, length, arguments.chunk) for engine in (full, int8)
        ]
        rounds = [[step(1) for step in steps] for _ in range(BARE_ROUNDS)]
        seconds = np.median(rounds, axis=0)
        gain[str(width)] = float(seconds[0] / seconds[1])
    return gain
