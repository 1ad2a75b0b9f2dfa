"""What the real compilers of TPUs and GPUs make of a ladder. `make test` runs these tests
in .venv-plan, where the compilers are installed.
"""

# ruff: noqa: E501  the tests' names are long
import dataclasses
import json
import re
import subprocess

import jax
import pytest
from compilers import hides, needs_gpu, needs_tpu
from helpers import COMMAND
from judge import judge

from ladder_jax import sharding
from ladder_jax.config import (
    Config,
    ConfigError,
    Decode,
    Mesh,
    Model,
    Train,
    from_recipe,
)
from ladder_jax.hardware import aot, xla_options
from ladder_jax.kv_cache import DTYPES
from ladder_jax.matmul import einsum
from ladder_jax.planner import hlo, plan, report
from ladder_jax.quantised import Quantised
from ladder_jax.serve import compilation, design

SMALL = Model(
    vocab_size=1024,
    dim=2048,
    layers=4,
    heads=16,
    kv_heads=8,
    head_dim=128,
    ffn_dim=8192,
    residual="ladder",
)


def planned(
    target, schedule, reduction, workload="decode", batch=16, context=256, **model
):
    config = Config(
        model=dataclasses.replace(SMALL, residual=schedule, **model),
        train=Train(remat="reductions"),
        mesh=Mesh(data=1, tensor=8, reduction=reduction),
    )
    compiled = plan.build(
        plan.Request("small", config, aot.parse(target), workload, batch, context)
    )
    result = report.make_report(compiled, report.make_timeline(compiled))
    assert_the_judge_agrees(compiled.text, result)
    return result


def assert_the_judge_agrees(text, result):
    """The second reader finds the same collectives, and the same empty windows."""
    judged, rows = judge(text), result["collectives"]
    assert [one.name for one in judged] == [row["name"] for row in rows]
    for one, row in zip(judged, rows):
        assert one.kind == row["kind"]
        assert one.synchronous is not row["asynchronous"], one
        if one.hidden:
            assert row["window_compute_us"] > 0, (one, row)
        else:
            assert row["hidden_us"] == pytest.approx(0, abs=1e-6), (one, row)


def of_layers(result):
    """The tensor-axis collectives between the stack's ends."""
    return [
        row
        for row in result["collectives"]
        if row["axis"] == "tensor" and "layer" in row["block"]
    ]


@needs_tpu
@pytest.mark.parametrize(
    "target, groups",
    [("v5e:2x4", 1), ("v6e:2x4", 1), ("v5p:2x2x2", 1), ("v5e:16x16", 32)],
)
def test_tpu_runs_a_ladders_exchanges_behind_its_blocks(target, groups):
    result = planned(target, "ladder", "recursive-doubling", batch=16 * groups)
    rows = of_layers(result)
    # Three exchanges for every block but the last one, whose sum is not of a layer.
    assert len(rows) == 3 * 7
    assert all(
        row["kind"] == "collective-permute"
        and row["asynchronous"]
        and row["merged"] == 1
        for row in rows
    )
    for row in rows:
        assert row["window_compute_us"] > 0, (
            f"{target}: nothing is computed while {row['name']} ({row['block']}) runs"
        )
    assert sum(row["last_of_stack"] for row in result["collectives"]) == 3


@needs_tpu
def test_tpu_multiplies_a_lone_row_as_fast_as_two():
    """One row of a batch; one query for each head of the cache."""
    compute = lambda **changes: planned(
        "v5p:2x2x2", "ladder", "recursive-doubling", **changes
    )["totals"]["compute_us"]
    assert compute(batch=1) < 1.1 * compute(batch=2)
    assert compute(batch=4, context=2048, kv_heads=16) < 1.1 * compute(
        batch=4, context=2048
    )


@needs_gpu
def test_gpu_multiplies_a_lone_row_about_as_fast_as_two():
    """The terms of several products that read it do not go through memory."""
    compute = lambda batch: planned(
        "h100:1x8", "ladder", "psum", batch=batch, dim=4096, ffn_dim=14336
    )["totals"]["compute_us"]
    assert compute(1) < 1.25 * compute(2)


@needs_gpu
@pytest.mark.parametrize("target", ["h200:1x8", "b200:1x8", "gb200:1x8"])
def test_other_gpus_run_a_ladders_reductions_behind_its_blocks(target):
    result = planned(target, "ladder", "psum")
    assert len(of_layers(result)) == 7 and hides(result), result["totals"]


@needs_tpu
@pytest.mark.parametrize(
    "target", ["v5p:2x2x2", pytest.param("v5e:2x4", marks=pytest.mark.slow)]
)
def test_tpu_runs_a_training_steps_exchanges_behind_its_blocks_forward_and_backward(
    target,
):
    """Every block's reduction, every cotangent's, and none of them again in the recomputation."""
    rows = of_layers(
        planned(target, "ladder", "recursive-doubling", "train", batch=1, context=1024)
    )
    for direction in ("forward", "backward"):
        mine = [row for row in rows if row["block"].startswith(direction)]
        assert len(mine) == 2 * 3, (
            f"{target}, {direction}: {[row['block'] for row in mine]}"
        )
        assert all(
            row["kind"] == "collective-permute" and row["asynchronous"] for row in mine
        )
        for row in mine:
            assert row["window_compute_us"] > 0, (
                f"{target}: nothing is computed while {row['name']} ({row['block']}) runs"
            )


@needs_tpu
def test_tpu_exposes_a_standard_models_psum():
    rows = of_layers(planned("v5e:2x4", "standard", "psum"))
    assert len(rows) == 8 and not any(row["asynchronous"] for row in rows)
    assert all(row["hidden_us"] == pytest.approx(0, abs=1e-6) for row in rows)


@needs_gpu
@pytest.mark.parametrize("schedule", ["ladder", "parallel"])
def test_gpu_reads_weights_where_they_are(schedule):
    config = Config(
        model=dataclasses.replace(SMALL, residual=schedule), mesh=Mesh(data=1, tensor=8)
    )
    compiled = plan.build(
        plan.Request("small", config, aot.parse("h100:1x8"), "decode", 16, 256)
    )
    assert not report.copies_of_weights(hlo.parse(compiled.text))


@needs_gpu
@pytest.mark.parametrize(
    "name, batch, hides, fits",
    [
        ("h100:1x8", 480, True, True),
        ("h100:1x8", 520, False, True),
        ("h100:1x8", 700, True, False),
        ("b200:1x8", 1150, False, True),
    ],
)
def test_gpu_overlaps_nothing_where_arguments_take_four_fifths_of_its_memory(
    name, batch, hides, fits
):
    """A plan of few layers shows it, as XLA sees the memory that the others take. A
    model that does not fit is planned as if it did."""
    whole = from_recipe("configs/llama3_8b.py")
    config = dataclasses.replace(
        whole,
        model=dataclasses.replace(whole.model, residual="ladder"),
        mesh=Mesh(data=1, tensor=8, reduction="psum"),
    )
    target = aot.parse(name)
    request = plan.Request(
        "8b", config, target, "decode", batch, 8192, kv_layout="rows", most=3
    )
    with aot.silence():
        compiled = plan.build(request)
    made = report.make_report(compiled, report.make_timeline(compiled))
    totals = made["totals"]
    arguments = compiled.weights + compiled.kv
    assert made["memory"]["overlaps"] == hides
    assert made["memory"]["fits"] == fits
    assert (arguments < target.argument_limit) == (hides and fits)
    share = totals["hidden_us"] / totals["communication_us"]
    assert share > 0.95 if hides else share < 0.01


@needs_gpu
@pytest.mark.parametrize("reduction", ["psum", "one-shot"])
def test_gpu_runs_a_ladders_reductions_behind_its_blocks(reduction):
    result = planned("h100:1x8", "ladder", reduction)
    rows = of_layers(result)
    assert len(rows) == 7 and all(
        row["asynchronous"] and row["merged"] == 1 for row in rows
    )
    for row in rows[1:]:  # behind the whole of a block, not behind its last product
        assert row["window_compute_us"] > 9, (
            f"{row['name']} ({row['block']}) starts late"
        )
    assert hides(result), result["totals"]


@needs_gpu
def test_gpu_runs_the_sums_of_dtp_behind_the_next_block():
    """Those of all blocks but the last, which sends nothing; then the streams' mean."""
    result = planned("h100:1x8", "dtp:1", "psum")
    rows = of_layers(result)
    assert len(rows) == 7
    assert all(row["asynchronous"] and row["merged"] == 1 for row in rows)
    for row in rows:
        assert row["window_compute_us"] > 0, (
            f"nothing is computed while {row['name']} ({row['block']}) runs"
        )
    assert sum(row["last_of_stack"] for row in result["collectives"]) == 1
    assert hides(result), result["totals"]


@needs_gpu
def test_gpu_runs_a_training_steps_all_reduces_behind_its_blocks_forward_and_backward():
    rows = of_layers(
        planned("h100:1x8", "ladder", "psum", "train", batch=1, context=1024)
    )
    assert len(rows) == 4 and all(
        row["asynchronous"] and row["window_compute_us"] > 0 for row in rows
    )


@needs_gpu
def test_gpu_gathers_a_layers_parameters_at_once_and_behind_compute():
    """All seven matrices of a layer, forward and backward, where there is no tensor axis."""
    config = Config(
        model=SMALL,
        train=Train(remat="reductions"),
        mesh=Mesh(data=1, fsdp=8, tensor=1),
    )
    request = plan.Request("small", config, aot.parse("h100:1x8"), "train", 8, 1024)
    compiled = plan.build(request)
    result = report.make_report(compiled, report.make_timeline(compiled))
    rows = [
        row
        for row in result["collectives"]
        if row["kind"] == "all-gather" and "layer" in row["block"]
    ]
    assert rows and all(row["merged"] == 7 for row in rows), rows
    assert all(row["asynchronous"] for row in rows)
    assert {row["block"].split()[0] for row in rows} == {"forward", "backward"}
    for row in rows:
        assert row["window_compute_us"] > 0, (
            f"nothing is computed while {row['name']} ({row['block']}) runs"
        )
    # XLA sums a layer's gradients while it computes the next layer backward. The last
    # layer's sum is outside of the loop.
    inside = [
        row
        for row in result["collectives"]
        if row["kind"] == "reduce-scatter" and row["count"] > 1
    ]
    assert sum(row["merged"] for row in inside) == 7
    for row in inside:
        assert row["asynchronous"] and row["exposed_us"] < 0.05 * row["hidden_us"]
        assert row["count"] == SMALL.layers - 1


@needs_gpu
def test_gpu_runs_a_stream_divided_by_tokens_behind_its_blocks():
    """The scatters and gathers of training, forward and backward: none is synchronous."""
    config = Config(
        model=SMALL,
        train=Train(remat="reductions"),
        mesh=Mesh(data=1, tensor=8, sequence_parallel=True),
    )
    request = plan.Request("small", config, aot.parse("h100:1x8"), "train", 1, 2048)
    compiled = plan.build(request)
    rows = of_layers(report.make_report(compiled, report.make_timeline(compiled)))
    kinds = {row["kind"] for row in rows}
    assert kinds == {"reduce-scatter", "all-gather"}, kinds
    for row in rows:
        assert row["asynchronous"] and row["window_compute_us"] > 0, (
            f"nothing is computed while {row['name']} ({row['block']}) runs"
        )


@needs_tpu
@pytest.mark.parametrize(
    "target", ["v5e:2x4", "v6e:2x4", pytest.param("v5p:2x2x2", marks=pytest.mark.slow)]
)
def test_tpu_runs_long_all_reduces_behind_its_blocks(target):
    """Inside products (v5e) or on SparseCores. The stack's end sends what is read alone."""
    result = planned(target, "ladder", "auto", "prefill", batch=1, context=1024)
    rows = of_layers(result)
    long = [row for row in rows if row["kind"] == "all-reduce"]
    assert len(long) == 5 and all(
        row["bytes"] == 2048 * 2 for row in rows if row not in long
    )
    assert all(row["asynchronous"] and row["merged"] == 1 for row in rows)
    for row in long:
        assert row["hidden_us"] > 0, (
            f"{target}: nothing is computed while {row['name']} ({row['block']}) runs"
        )
    assert hides(result), result["totals"]


@needs_tpu
def test_the_command_prints_one_json_object_and_no_noise():
    done = subprocess.run(
        [
            *COMMAND,
            "plan",
            "configs/demo.py",
            "--target",
            "v5e:2x2",
            "--batch",
            "2",
            "--json",
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    result = json.loads(done.stdout)
    assert {
        "target",
        "recipe",
        "workload",
        "schedule",
        "reduction",
        "collectives",
        "totals",
        "memory",
    } <= set(result)
    assert {
        "name",
        "kind",
        "axis",
        "bytes",
        "asynchronous",
        "communication_us",
        "window_compute_us",
        "hidden_us",
        "exposed_us",
        "last_of_stack",
    } <= set(result["collectives"][0])
    assert {
        "step_us",
        "compute_us",
        "communication_us",
        "hidden_us",
        "exposed_us",
        "unavoidable_us",
    } <= set(result["totals"])
    assert {
        "weights_bytes",
        "kv_bytes",
        "temporary_bytes",
        "capacity_bytes",
        "fits",
        "overlaps",
    } == set(result["memory"])
    again = subprocess.run(
        [
            *COMMAND,
            "plan",
            "configs/demo.py",
            "--target",
            "v5e:2x2",
            "--tensor",
            "3",
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (
        again.returncode == 2
        and again.stderr.count("\n") == 1
        and "does not divide" in again.stderr
    )


@needs_tpu
def test_what_the_compiler_does_not_come_to_an_end_of_is_refused():
    with pytest.raises(
        ConfigError,
        match="mesh.reduction='one-shot' is not accepted on v5e with model.residual='ladder'",
    ):
        planned("v5e:2x4", "ladder", "one-shot")


@needs_tpu
def test_tpu_casts_an_int8_matrix_while_it_multiplies():
    """It reads half the bytes of bfloat16, and has no temporary matrix."""
    sharding = jax.sharding.SingleDeviceSharding(aot.parse("v5e:2x4").devices()[0])
    shape = lambda size, dtype: jax.ShapeDtypeStruct(size, dtype, sharding=sharding)
    a = shape((1, 16, 4096), "bfloat16")
    int8 = Quantised(shape((4096, 14336), "int8"), shape((1, 14336), "float32"))
    read = []
    for weight in (int8, shape((4096, 14336), "bfloat16")):
        multiply = jax.jit(lambda a, weight: einsum("btd,df->btf", a, weight))
        compiled = multiply.lower(a, weight).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < 2**20
        read.append(compiled.cost_analysis()["bytes accessed"])
    assert read[0] < 0.51 * read[1]


# ---------------------------------------------------------------- pages

KERNELS = {"ragged": "tpu_custom_call", "triton": "__gpu$xla.gpu.triton"}
KINDS = "chunk", "prefill", "carry"


def engine_programs(target, kinds, kv_dtype):
    """The spec of an engine with pages on two devices, and some of its programs."""
    devices = aot.parse(target).devices()[:2]
    sizes = dict(dim=256, layers=1, heads=8, kv_heads=4, ffn_dim=256, max_length=8192)
    model_config = Model(vocab_size=256, head_dim=128, residual="ladder", **sizes)
    mesh = sharding.make_mesh(Mesh(tensor=len(devices)), devices)
    options = Decode(
        slots=4,
        kv_layout="pages",
        kv_dtype=kv_dtype,
        steps_per_call=4,
        fit_shapes=False,
        prefill_budget=64,
        carry_tokens=64,
    )
    planned = design.design(model_config, mesh, options)
    jobs = compilation.jobs(planned)
    chosen = [next(job for job in jobs if job.name.startswith(kind)) for kind in kinds]
    return planned.spec, [
        job.function.lower(*job.arguments).compile() for job in chosen
    ]


@pytest.mark.parametrize(
    "target, kernel, kinds, kv_dtype",
    [
        pytest.param("v5e:2x2", "ragged", KINDS, "auto", marks=needs_tpu),
        pytest.param("v6e:2x2", "ragged", ("chunk",), "auto", marks=needs_tpu),
        pytest.param("v5p:2x2x1", "ragged", ("chunk",), "auto", marks=needs_tpu),
        pytest.param("h100:1x2", "triton", KINDS, "auto", marks=needs_gpu),
        pytest.param(
            "h100:1x2", "triton", ("chunk",), "float8_e4m3fn", marks=needs_gpu
        ),
    ],
)
def test_a_kernel_reads_pages_where_they_are(target, kernel, kinds, kv_dtype):
    """In every decode step, prefill, and both at once. GPUs wait in no loop."""
    spec, compiled = engine_programs(target, kinds, kv_dtype)
    assert spec.page_kernel == kernel
    for program in compiled:
        text, memory = program.as_text(), program.memory_analysis()
        assert KERNELS[kernel] in text
        # The pool of a device: 4 rows and 2 of staging, of 8192 tokens, and 2 heads.
        keys = 6 * 8192 * 2 * 128 * DTYPES[spec.kv_dtype]  # bytes; values have as many
        assert memory.alias_size_in_bytes > 2 * keys
        assert memory.temp_size_in_bytes < keys  # there is no copy
        shape = "[768,64,4,128]" if kernel == "ragged" else "[2,1536,32,128]"
        made = [
            line for line in text.splitlines() if f"{shape}{{" in line.split("(")[0]
        ]
        assert made and not any(" copy" in line for line in made)
        loops = [line for line in text.splitlines() if " while(" in line]
        if kernel == "triton":
            assert loops and all("known_trip_count" in line for line in loops)


@pytest.mark.parametrize(
    "target, loss",
    [
        pytest.param("v5e:2x4", 1.0, marks=needs_tpu),
        pytest.param("h100:1x8", 1.02, marks=needs_gpu),
    ],
)
def test_a_step_with_pages_is_faster_for_requests_of_many_lengths(target, loss):
    """And loses little if all requests have the longest length. An engine takes them."""

    def totals(kv_layout, tokens):
        config = Config(model=SMALL, mesh=Mesh(tensor=8))
        request = plan.Request("small", config, aot.parse(target), "decode", 64, 4096)
        request = request._replace(kv_layout=kv_layout, tokens=tokens, most=2)
        compiled = plan.build(request)
        result = report.make_report(compiled, report.make_timeline(compiled))
        assert result["cache"]["layout"] == kv_layout.replace("auto", "pages")
        return result["totals"]["step_us"], result["cache"]

    rows, cache = totals("rows", 64 * 1000)
    assert cache["tokens_read"] == 64 * 4096
    mixed, cache = totals("auto", 64 * 1000)
    assert cache["tokens_alive"] <= cache["tokens_read"] < 1.05 * 64 * 1000
    full, cache = totals("pages", None)
    assert cache["tokens_read"] == 64 * 4096
    assert mixed < 0.95 * rows and full < loss * rows


@needs_tpu
@pytest.mark.slow  # two minutes to compile
def test_only_sums_over_the_data_axis_cross_slices():
    """And they cross once a step: no layer waits for the network between slices."""
    from jax.experimental import topologies

    arguments = dict(platform="tpu", topology_name="v5e:2x2", num_slices=2)
    devices = topologies.get_topology_desc(**arguments).devices
    config = Config(
        model=dataclasses.replace(SMALL, dim=512, heads=4, kv_heads=4, ffn_dim=1024),
        train=Train(global_batch=16, seq_len=512),
        mesh=Mesh(data=2, fsdp=2, tensor=2),
    )
    mesh = sharding.make_mesh(config.mesh, devices)
    program = plan.training_step(config, mesh)
    options = xla_options.options_of("tpu", "v5e", "train")
    lowered = program.function.lower(*program.arguments)
    text = lowered.compile(compiler_options=options).as_text()
    crossing = r" send\(.*_xla_megascale_reduce_operation=\"SUM\""
    bodies = re.split(r"\n(?=ENTRY |%)", text)
    sent = [body for body in bodies for _ in re.findall(crossing, body)]
    assert len(sent) >= 8 and all(body.startswith("ENTRY") for body in sent)
