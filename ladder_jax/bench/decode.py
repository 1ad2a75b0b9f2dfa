"""Compares temporal fusion with other ways of batching, under load:
`ladder-jax bench decode`.

One run has one model. Every policy decodes the same requests (workloads.py), which
arrive at the same times (`--load`), with the same compiled forward pass, so that
policies differ in scheduling alone:

    sequential     decodes one request at a time
    concurrent     gives every request a decode state of its own; the states take turns
                   (the baseline of Flover's figures: concurrent model instances)
    static         starts a batch with the requests that wait, and the next batch when
                   the longest request of this one has ended. A batch of fewer requests
                   than slots still takes requests that arrive while it runs, until it
                   has had as many as there are slots
    dynamic        as static, but a batch that is not full first waits for a window of
                   time
    per-token      continuous batching by the host: one jitted call, one synchronization
                   and one scheduling decision for every token
    no-shuffle     temporal fusion, always at full width and length
    rows           temporal fusion; each slot has memory for the longest request, and
                   attention reads as much of every slot as the longest live request has
    ours           temporal fusion: the device admits requests inside the jitted loop,
                   and the compiled width follows the load. Requests have pages where
                   these are faster (decode.kv_layout=auto)
    speculate      the same, and an iteration may emit several tokens of a request: it
                   drafts `--drafts` of them from the request's own text
    carry          the same as ours, with pages, and an iteration may carry a piece of
                   `--carry-tokens` of a prompt, where that saves time

The model has random weights. At temperature 0 its outputs soon repeat themselves, which
is the best case of drafts; at `--temperature 1` they never do, which is the worst.

A load is "saturated", where all requests wait from the start, or a share of the
capacity: requests then arrive at random (a Poisson process) at that share of the rate
of "per-token" in its saturated run, until no request waits.

Where prompts share a beginning (the workload "shared"), the policies of temporal fusion
(no-shuffle, rows, ours, speculate, carry) have a prefix cache, which is empty when a
run starts: see `--prefix-cache`.

Three workloads with three policies under saturated load took 2.6 minutes on two cores,
one of which was XLA's compiling; a load that is a share takes longer than a saturated
one.

The upper bound is the bare step: forward pass and argmax at full width and length in a
loop, without scheduling and without prefill. The benchmark measures it before and after
every run. "of bare" is a policy's rate over the bare step's; under saturated load, the
policy's rate until no request waits. "of matmul" is 2 FLOPs a token and parameter over
the CPU's own rate of matrix products (machine.py).

Flover gives gaps between arrivals for a model with a slower step. Unless `--unscaled`,
the benchmark multiplies them by this model's step over that model's step.

Tokens of a chunk reach the host together, so that most inter-token latencies (ITL) are
near 0 and a few are as long as a chunk. Time per output token is their mean. The
engines shorten their chunks to `--burst-ms`; those of static and dynamic batching do so
only while the batch can still grow.
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax

from ladder_jax import files, model, sharding
from ladder_jax.bench import machine, plots
from ladder_jax.bench.bare_step import BARE_ROUNDS, bare_step, compare_weights
from ladder_jax.bench.decode_arguments import Arguments, check, has_prefix_cache
from ladder_jax.bench.decode_loads import read_loads
from ladder_jax.bench.decode_runs import Bench, Turn, compare
from ladder_jax.bench.latency import HEAD, latencies_of, result_table
from ladder_jax.bench.policies import make_policies
from ladder_jax.bench.sizes import DECODE_SIZES
from ladder_jax.config import Decode, Mesh
from ladder_jax.serve.engine import Engine


def make_engines(bench: Bench) -> dict[str, dict[str, Any]]:
    """Builds and compiles the engines of all workloads: {workload: {policy: engine}}.

    Workloads have the same engines, unless prompts share a beginning.
    """
    arguments = bench.arguments
    policies = make_policies(
        arguments.policies,
        Decode(
            slots=arguments.slots,
            steps_per_call=arguments.chunk,
            burst_ms=arguments.burst_ms,
            max_length=bench.length,
            queue_size=10**6,
            staging=arguments.slots,
            prompt_logprobs=False,
            prefill_budget=64 if arguments.longest_prompt <= 16 else 256,
            weights_dtype=arguments.weights_dtype,
        ),
        bench.parameters,
        bench.model_config,
        bench.mesh,
        [window * 1e-3 * bench.scale for window in arguments.windows],
        arguments.drafts,
        arguments.carry_tokens,
    )

    # The blocks of all prompts on the device, and as many again.
    prefix_tokens = 4 * arguments.slots * arguments.longest_prompt
    prefixes = dict(prefix_memory=str(prefix_tokens * bench.token_bytes))

    @functools.cache
    def engine(name: str, has_prefixes: bool) -> Any:
        made = policies[name](**prefixes if has_prefixes else {})
        made.warm_up()
        return made

    return {
        kind: {
            name: engine(name, kind == "shared" and has_prefix_cache(arguments, name))
            for name in policies
        }
        for kind in arguments.kinds
    }


def run(arguments: Arguments) -> dict[str, Any]:
    """Runs the benchmark. Prints tables, writes what `json` and `plots` name, and
    returns the results. Raises ConfigError for arguments that are not accepted."""
    check(arguments)
    loads = read_loads(arguments.load, arguments.gaps, arguments.policies)
    bench = set_up(arguments)
    single_step_ms = bench.single_step * 1e3
    full_step = bench.measure_bare_step(BARE_ROUNDS)
    rate = arguments.slots / full_step
    gain = rate * bench.single_step
    device = jax.devices()[0].device_kind
    print(
        f"{arguments.size}, {arguments.dtype}, {arguments.residual}, "
        f"tensor {arguments.tensor}, {arguments.slots} slots, "
        f"chunks of {arguments.chunk}, {bench.cpu or device}\n"
        f"bare step: {single_step_ms:.2f} ms at width 1, {full_step * 1e3:.2f} ms at "
        f"width {arguments.slots} = {rate:.0f} tokens/s, "
        f"so batching can gain {gain:.1f}x"
    )
    if bench.int8_gain:
        gains = ", ".join(f"{x:.2f}x at width {w}" for w, x in bench.int8_gain.items())
        print(
            f"int8 weights: the bare step is {gains} as fast as with {arguments.dtype}"
        )
    if not arguments.unscaled:
        print(
            f"gaps and windows are scaled by {bench.scale:.3f}: this model's step over "
            "the paper's"
        )
    if "shared" in arguments.kinds:
        having = [p for p in arguments.policies if has_prefix_cache(arguments, p)]
        print(f"shared prompts: a prefix cache for {', '.join(having) or 'no policy'}")
    engines = make_engines(bench)
    turns = {
        kind: compare(bench, engines[kind], kind, loads) for kind in arguments.kinds
    }
    rows = [
        dict(workload=kind, load=load, policy=policy) | turn.figures
        for kind, of_kind in turns.items()
        for load, of_load in of_kind.items()
        for policy, turn in of_load.items()
    ]
    print(f"{HEAD}\n\n{arguments.requests} requests a run\n{result_table(rows)}")
    for kind, of_kind in turns.items():
        for load, of_load in of_kind.items():
            if arguments.plots:
                for path in _plot(arguments.plots, f"{kind} {load}", of_load):
                    print(f"wrote {path}")
    output = dict(
        arguments=dataclasses.asdict(arguments),
        device=device,
        machine=bench.cpu._asdict() if bench.cpu else None,
        batch_gain=gain,
        int8_gain=bench.int8_gain,
        step_ms={"1": single_step_ms, str(arguments.slots): full_step * 1e3},
        bare_step_tokens_per_s=rate,
        workloads={
            kind: {
                load: {policy: turn.figures for policy, turn in of_load.items()}
                for load, of_load in of_kind.items()
            }
            for kind, of_kind in turns.items()
        },
    )
    if arguments.json:
        files.write_text(arguments.json, json.dumps(output, indent=1))
    return output


def set_up(arguments: Arguments) -> Bench:
    """Initializes the model, and measures the bare step at width 1."""
    most = max(sum(arguments.longest(kind)) for kind in arguments.kinds)
    length = -(-most // 64) * 64
    changes: Any = dict(
        residual=arguments.residual, dtype=arguments.dtype, max_length=length
    )
    model_config = dataclasses.replace(DECODE_SIZES[arguments.size], **changes)
    mesh = sharding.make_mesh(
        Mesh(data=1, tensor=arguments.tensor), jax.devices()[: arguments.tensor]
    )
    sharding.check_fits(model_config, mesh)
    specs = sharding.parameter_specs(model.abstract(model_config))
    init = jax.jit(
        functools.partial(model.init, model_config),
        out_shardings=sharding.named_shardings(mesh, specs),
    )
    parameters = init(jax.random.key(0))
    options = Decode(
        slots=arguments.slots,
        steps_per_call=arguments.chunk,
        max_length=length,
        weights_dtype=arguments.weights_dtype,
    )
    probe = Engine(parameters, model_config, mesh, options)
    int8_gain = None
    if arguments.weights_dtype == "int8":
        full = dataclasses.replace(options, weights_dtype="auto")
        other = Engine(parameters, model_config, mesh, full)
        int8_gain = compare_weights(arguments, other, probe, length)
        del other
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    return Bench(
        arguments,
        parameters,
        model_config,
        mesh,
        length,
        probe.capacity.token_bytes,
        single_step=bare_step(probe, 1, length, arguments.chunk)(BARE_ROUNDS),
        measure_bare_step=bare_step(probe, arguments.slots, length, arguments.chunk),
        cpu=machine.measure() if on_cpu else None,
        int8_gain=int8_gain,
    )


def _plot(folder: str, title: str, turns: dict[str, Turn]) -> list[Path]:
    traced = {name: turn.history for name, turn in turns.items() if turn.history}
    latencies = {name: latencies_of(turn.requests) for name, turn in turns.items()}
    return [
        *(
            plots.draw_occupancy(folder, title, name, history)
            for name, history in traced.items()
        ),
        plots.draw_latencies(folder, title, latencies),
    ]
