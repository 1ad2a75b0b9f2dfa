"""The planner without compilers: its clock on programs small enough to play by hand,
its pictures, its comparison, and the tables of docs/overlap."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import pytest

from ladder_jax import cli
from ladder_jax.config import Config, Mesh, Model
from ladder_jax.hardware import aot
from ladder_jax.hardware.chips import CHIPS
from ladder_jax.hardware.cost import Network, Transfer
from ladder_jax.planner import (
    calibrate,
    command,
    compare,
    hlo,
    lanes,
    planning,
    records,
    survey,
    tables,
)
from ladder_jax.planner import operations as ops
from ladder_jax.planner.plan import Request
from ladder_jax.planner.records import Record
from ladder_jax.planner.scopes import Place, place_of
from ladder_jax.planner.stack import LayerCounter, Stack
from ladder_jax.planner.timeline import Span, Timeline, play
from ladder_jax.residual import choose

DOCS = Path(__file__).resolve().parent.parent / "docs/overlap"

# ---------------------------------------------------------------- the clock


def program(*lines: str) -> hlo.Module:
    """A module whose main computation has these instructions."""
    return hlo.parse(
        "HloModule step, is_scheduled=true, num_partitions=4\n\n"
        "ENTRY %main (x: f32[4]) -> f32[4] {\n"
        "  %x = f32[4]{0} parameter(0)\n" + "\n".join(lines) + "\n}\n"
    )


def compute(name: str, seconds: int, scope: str = "") -> str:
    return (
        f"  %{name} = f32[4]{{0}} add(%x, %x), "
        f'metadata={{op_name="jit(f)/{scope}/add"}}, '
        f'backend_config={{"estimated_cycles":"{seconds}"}}'
    )


def start(name: str, scope: str = "") -> str:
    return (
        f"  %{name} = (f32[4]{{0}}, f32[4]{{0}}) collective-permute-start(%x), "
        "source_target_pairs={{0,1},{1,0},{2,3},{3,2}}, "
        f'metadata={{op_name="jit(f)/{scope}/ppermute"}}'
    )


def done(name: str, scope: str = "") -> str:
    return (
        f"  %{name}.done = f32[4]{{0}} collective-permute-done(%{name}), "
        f'metadata={{op_name="jit(f)/{scope}/ppermute"}}'
    )


def all_reduce(name: str, scope: str = "last") -> str:
    return (
        f"  %{name} = f32[4]{{0}} all-reduce(%x), replica_groups={{{{0,1,2,3}}}}, "
        f'metadata={{op_name="jit(f)/{scope}/psum"}}'
    )


def fetch(name: str, seconds: int) -> str:
    """A prefetch that takes HBM so long: `play_seconds` gives a byte a second."""
    return f"  %{name} = (s8[{seconds}]{{0:S(1)}}, s8[{seconds}]{{0}}) copy-start(%x)"


def fetched(name: str, seconds: int) -> str:
    return f"  %{name}.done = s8[{seconds}]{{0:S(1)}} copy-done(%{name})"


def play_seconds(
    module: hlo.Module, transfer: Transfer | dict[str, Transfer], **options: object
) -> Timeline:
    """Plays a module: an instruction takes its cycles in seconds, and no HBM."""

    def cost(kind: str, groups: hlo.Groups, size: int) -> Transfer:
        return transfer[kind] if isinstance(transfer, dict) else transfer

    return play(
        module,
        lambda instruction, _: float(instruction.cycles or 0),
        # Arrays of float32 are no traffic: prefetches alone use HBM.
        lambda size: float(size) if size % 4 else 0.0,
        cost,
        **options,
    )


def test_a_transfer_is_hidden_by_what_is_computed_between_its_start_and_its_done():
    module = program(start("send"), compute("product", 3), done("send"))
    played = play_seconds(module, Transfer(1.0, 4.0))
    (send,) = played.collectives
    assert (send.seconds, send.window, send.hidden, send.exposed) == (5, 3, 3, 2)
    assert (played.step, played.compute, played.exposed) == (5, 3, 2)
    assert played.spans == [Span("product", "jit(f)//add", 0, 3, 1)]
    assert played.waits == [(3, 5)]


def test_two_transfers_on_one_link_send_one_after_the_other():
    """The second one's latency runs while the first still sends."""
    module = program(start("a"), start("b"), done("a"), done("b"))
    one_link = Transfer(1.0, 4.0, frozenset("l"))
    played = play_seconds(module, one_link)
    assert [(one.start, one.end) for one in played.collectives] == [(0, 5), (4, 9)]
    assert [one.unoverlapped for one in played.collectives] == [5, 4]
    assert played.exposed == played.step == 9
    apart = play_seconds(module, Transfer(1.0, 4.0))
    assert [(one.start, one.end) for one in apart.collectives] == [(0, 5), (0, 5)]
    assert [one.unoverlapped for one in apart.collectives] == [5, 0]
    assert apart.exposed == 5


def test_a_synchronous_collective_is_exposed_in_full_even_beside_a_prefetch():
    module = program(
        fetch("weights", 7), all_reduce("sum"), fetched("weights", 7), compute("a", 1)
    )
    played = play_seconds(module, Transfer(0.0, 5.0))
    assert (played.exposed, played.prefetch, played.step) == (5, 2, 8)
    assert played.collectives[0].exposed == 5


def test_a_prefetch_goes_on_while_instructions_leave_hbm_idle():
    module = program(fetch("w", 7), compute("product", 3), fetched("w", 7))
    played = play_seconds(module, Transfer(0, 0))
    assert (played.prefetch, played.compute, played.exposed) == (4, 7, 0)


PREFETCHED = [
    fetch("weights", 9),
    start("send"),
    compute("product", 1),
    done("send"),
    fetched("weights", 9),
    compute("next", 1),
]


@pytest.mark.parametrize("size", [1, 3, 5, 6, 7, 9, 21])
@pytest.mark.parametrize("flow", [0.0, 1.0, 2.0, 6.0])
def test_exposed_is_what_the_step_saves_if_the_transfer_takes_no_time(size, flow):
    """A prefetch goes on while the device waits for the transfer, and the device must
    wait for the prefetch in any case."""
    module = program(*(line.replace("9", str(size)) for line in PREFETCHED))
    played = play_seconds(module, Transfer(0.0, flow))
    free = play_seconds(module, Transfer(0.0, 0.0))
    assert played.exposed == played.step - free.step
    assert played.compute == free.step
    assert played.prefetch == free.prefetch
    assert sum(one.exposed for one in played.collectives) == played.exposed


def test_a_saving_counts_against_the_latest_waits_first():
    module = program(
        fetch("weights", 7),
        start("first"),
        done("first"),
        start("second"),
        done("second"),
        fetched("weights", 7),
    )
    played = play_seconds(module, Transfer(0.0, 4.0))
    # 8 s of waits; without them the device waits 7 s for the weights.
    assert played.exposed == 1
    assert [one.exposed for one in played.collectives] == [1, 0]
    assert [one.window for one in played.collectives] == [3, 4]
    assert played.waits == [(0, 1)]
    assert [(span.start, span.end) for span in played.spans] == [(1, 4), (4, 8)]


def test_a_wait_counts_with_its_own_layer():
    """In a short stack layers stand for different numbers of layers."""
    module = program(
        start("send", "layer0/mlp"),
        done("send", "layer0/mlp"),
        start("again", "layer1/mlp"),
        done("again", "layer1/mlp"),
    )
    counter = LayerCounter(Stack("ladder", "all", "none", (1.0, 9.0), ()))
    played = play_seconds(module, Transfer(0.0, 2.0), count=counter)
    assert [one.count for one in played.collectives] == [1, 9]
    assert played.exposed == played.step == 2 * 1 + 2 * 9


def test_a_conditional_takes_its_longest_branch():
    text = """HloModule step, is_scheduled=true, num_partitions=4

%short (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %a = f32[4]{0} add(%p, %p), backend_config={"estimated_cycles":"1"}
}

%long (q: f32[4]) -> f32[4] {
  %q = f32[4]{0} parameter(0)
  ROOT %b = f32[4]{0} add(%q, %q), backend_config={"estimated_cycles":"8"}
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  ROOT %c = f32[4]{0} conditional(%x, %x, %x), BRANCHES
}
"""
    for branches in (
        "branch_computations={%short, %long}",
        "true_computation=%long, false_computation=%short",
    ):
        module = hlo.parse(text.replace("BRANCHES", branches))
        assert play_seconds(module, Transfer(0, 0)).compute == 8
    with pytest.raises(ValueError, match="conditional c has no attribute true"):
        play_seconds(hlo.parse(text.replace("BRANCHES", "")), Transfer(0, 0))


def test_a_done_without_its_start_is_an_error():
    module = program(done("send"))
    with pytest.raises(ValueError, match="ends a collective that it did not start"):
        play_seconds(module, Transfer(0, 0))


def test_operations_are_listed_in_the_order_of_their_issue():
    module = program(fetch("w", 9), start("s"), compute("a", 2), done("s"))
    listed = ops.operations(
        module,
        lambda instruction, _: float(instruction.cycles or 0),
        lambda size: 0.0,
        lambda *_: Transfer(0, 1),
    )
    assert [type(one) for one in listed] == [
        ops.StartPrefetch,
        ops.StartCollective,
        ops.Compute,
        ops.EndCollective,
    ]


@pytest.mark.parametrize(
    "dtype, bits",
    [("pred", 8), ("s4", 4), ("bf16", 16), ("f8e4m3fn", 8), ("c64", 64), ("token", 0)],
)
def test_the_size_of_xlas_types(dtype, bits):
    assert hlo.bits_of(dtype) == bits


@pytest.mark.parametrize(
    "scope, place",
    [
        ("jit(f)/layer3/mlp/dot", Place("forward", "layer3", "mlp")),
        (
            "jit(f)/transpose(jvp)/layers0to3/mlp/",
            Place("backward", "layers0to3", "mlp"),
        ),
        ("layers[3].mlp.up", Place("forward", "layer3", "mlp")),
        (
            "jit(f)/layer1/attention+mlp/dot",
            Place("forward", "layer1", "attention+mlp"),
        ),
        ("jit(f)/last/psum", Place("forward", "", "last")),
        ("", Place("forward", "", "")),
    ],
)
def test_scopes_name_places(scope, place):
    assert place_of(scope) == place
    assert place.scanned == ("to" in place.layer)


# ---------------------------------------------------------------- pictures


def stack_of(layers: int) -> hlo.Module:
    """Layers: an attention of 4 s, then an MLP of 2 s beside a transfer."""
    lines = []
    for n in range(layers):
        lines += [
            compute(f"a{n}", 4, f"layer{n}/attention"),
            start(f"s{n}", f"layer{n}/mlp"),
            compute(f"m{n}", 2, f"layer{n}/mlp"),
            done(f"s{n}", f"layer{n}/mlp"),
        ]
    return program(*lines, compute("end", 1, "last"))


def test_lanes_show_two_layers_from_the_middle():
    played = play_seconds(stack_of(5), Transfer(0.0, 3.0))
    shown = lanes.lanes_of(played)
    assert shown.seconds == 14  # twice: 4 s, 2 s, and 1 s of waiting
    attention, mlp = lanes.BLOCKS["attention"], lanes.BLOCKS["mlp"]
    assert shown.compute == [
        lanes.Bar(0, 4, attention),
        lanes.Bar(4, 6, mlp),
        lanes.Bar(7, 11, attention),
        lanes.Bar(11, 13, mlp),
    ]
    assert shown.send == [
        lanes.Bar(4, 7, lanes.HIDDEN),
        lanes.Bar(6, 7, lanes.EXPOSED),
        lanes.Bar(11, 14, lanes.HIDDEN),
        lanes.Bar(13, 14, lanes.EXPOSED),
    ]


def test_lanes_of_few_layers_show_all_of_them():
    played = play_seconds(stack_of(2), Transfer(0.0, 2.0))
    shown = lanes.lanes_of(played)
    assert shown.seconds == 12
    assert [bar for bar in shown.send if bar.color == lanes.EXPOSED] == []


def test_draw_writes_a_picture_with_a_pair_of_lanes_a_timeline(tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib import image

    path = tmp_path / "lanes.png"
    slow = play_seconds(stack_of(5), Transfer(0.0, 6.0))
    fast = play_seconds(stack_of(5), Transfer(0.0, 1.0))
    lanes.draw(path, [("slow", slow), ("fast", fast)])
    height, width, _ = image.imread(path).shape
    assert (height, width) == (round(130 * (0.5 + 2 * 1.1)), 130 * 12)


# ---------------------------------------------------------------- the command


def test_arguments_change_the_recipes_config():
    config = Config(model=Model(residual="ladder"), mesh=Mesh(data=2, tensor=4))
    args = cli.PlanArguments("small", "v5e:2x4", batch=3)
    asis = command.make_request(config, args)
    assert (asis.recipe, asis.target.name, asis.batch) == ("small", "v5e:2x4", 3)
    assert asis.context == config.model.max_length == 2048
    assert asis.config.mesh == Mesh(data=2, tensor=4, reduction="auto")
    changed = command.make_request(
        config,
        dataclasses.replace(
            args, context=64, schedule="standard", reduction="psum", tensor=8
        ),
    )
    assert changed.context == 64
    assert changed.config.model.residual == "standard"
    assert changed.config.mesh == Mesh(data=-1, tensor=8, reduction="psum")


def test_the_plan_is_a_line_a_collective_then_totals_then_memory():
    collective = dict(
        name="all-reduce.7",
        kind="all-reduce",
        axis="tensor",
        bytes=4096,
        asynchronous=True,
        communication_us=12.34,
        window_compute_us=9.0,
        hidden_us=9.0,
        exposed_us=3.34,
        count=38.5,
        merged=2,
        block="forward layer1 mlp",
    )
    text = planning.plan_text(
        dict(
            workload="decode",
            layers=80,
            schedule="ladder",
            reduction="psum",
            batch=16,
            context=2048,
            target="v5e:2x4",
            collectives=[collective, collective | dict(asynchronous=False, merged=1)],
            totals=dict(step_us=1234.5, exposed_us=3.0),
            memory=dict(weights_bytes=4e9, capacity_bytes=16e9, fits=False),
        )
    )
    head, titles, merged, single, totals, memory = text.splitlines()
    assert head == (
        "decode of 80 layers, ladder, psum, batch 16, context 2048, on v5e:2x4"
    )
    assert titles.split()[:5] == ["collective", "kind", "axis", "bytes", "x"]
    assert merged.split()[:6] == [
        *("all-reduce.7", "all-reduce", "tensor", "4096", "38.5", "yes")
    ]
    assert merged.endswith("3.3  forward layer1 mlp, 2 merged")
    assert single.split()[5] == "no" and single.endswith("layer1 mlp")
    assert totals == "step 1,234.5, exposed 3.0 (us a step)"
    assert memory == "weights 4.00, capacity 16.00 (GB a device): does not fit"


@pytest.fixture
def plan_on_cpu(monkeypatch, capsys):
    """plan_on_cpu(*arguments): what `ladder-jax plan` prints for a slice of v5e.

    XLA:CPU stands in for XLA's TPU compiler, which is not installed everywhere. So
    nothing is asynchronous; times are those of the TPU's links.
    """
    coordinates = [(x, y, 0) for y in range(4) for x in range(2)]

    def network_of(devices, all_reduce=None):
        return Network(CHIPS["v5e"], coordinates)

    monkeypatch.setattr(choose, "network_of", network_of)
    monkeypatch.setattr(aot.Target, "devices", lambda self: jax.devices())
    monkeypatch.setattr(aot.Target, "options", lambda self, workload: {})

    def plan(*arguments):
        target = ["--target", "v5e:2x4", "--tensor", "4", "--batch", "8"]
        status = cli.plan(["configs/demo.py", *target, *arguments])
        assert status == 0
        return capsys.readouterr().out

    choose.auto_reduction.cache_clear()
    yield plan
    choose.auto_reduction.cache_clear()


def test_the_command_plans_a_decode_step(plan_on_cpu, tmp_path):
    """Of 6 layers, 4 are compiled; the two in the middle count twice."""
    pytest.importorskip("matplotlib")
    from matplotlib import image

    program, picture = tmp_path / "program.txt", tmp_path / "lanes.png"
    text = plan_on_cpu("--hlo", str(program), "--plot", str(picture))
    head, titles, *collectives, totals, memory = text.splitlines()
    assert head == (
        "decode of 6 layers, ladder, recursive-doubling, batch 8, context 512, on "
        "v5e:2x4"
    )
    assert titles.split()[:3] == ["collective", "kind", "axis"]
    # The embedding and 8 blocks, each with two rounds between 4 shards.
    assert len(collectives) == 2 * (1 + 8)
    assert sum(float(line.split()[4]) for line in collectives) == 2 * (1 + 12)
    assert {tuple(line.split()[1:3]) for line in collectives} == {
        ("collective-permute", "tensor")
    }
    assert re.fullmatch(r"step \d.*, exposed \d.* \(us a step\)", totals)
    assert memory.endswith("capacity 16.00 (GB a device): fits")
    assert program.read_text().startswith("HloModule")
    assert image.imread(picture).ndim == 3


@pytest.mark.parametrize(
    "workload, context, axes",
    [("prefill", 16, {"tensor"}), ("train", 32, {"tensor", "data", "data,tensor"})],
)
def test_the_command_plans_each_workload_as_json(plan_on_cpu, workload, context, axes):
    options = ["--workload", workload, "--context", str(context), "--json"]
    plan = json.loads(plan_on_cpu(*options))
    assert (plan["workload"], plan["layers"], plan["context"]) == (workload, 6, context)
    assert {collective["axis"] for collective in plan["collectives"]} == axes
    totals = plan["totals"]
    assert totals["step_us"] == pytest.approx(
        totals["compute_us"] + totals["exposed_us"]
    )
    # XLA:CPU sends nothing while it computes.
    assert totals["hidden_us"] == 0
    assert totals["exposed_us"] == pytest.approx(totals["communication_us"])
    assert plan["memory"]["fits"] is True


def test_the_command_compares_schedules(plan_on_cpu):
    rows = json.loads(plan_on_cpu("--compare", "--json", "--context", "16"))
    assert [row["variant"] for row in rows] == [
        "standard, psum",
        "standard, fastest lossless",
        "parallel",
        "ladder",
        "hybrid:last3",
        "desync:2",
        "dtp:1",
        "no communication",
    ]
    steps = {row["variant"]: row["totals"]["step_us"] for row in rows}
    assert min(steps, key=steps.get) == "no communication"
    assert steps["standard, fastest lossless"] < steps["standard, psum"]


# ---------------------------------------------------------------- the comparison


def request(target: str, reduction: str = "auto") -> Request:
    config = Config(model=Model(layers=8), mesh=Mesh(tensor=8, reduction=reduction))
    return Request("small", config, aot.parse(target), "decode", 16, 256)


def test_fastest_lossless_is_another_all_reduce_on_gpu_and_another_reduction_on_tpu():
    gpu = {one.title: one for one in compare.variants(request("h100:1x8"))}
    tpu = {one.title: one for one in compare.variants(request("v5p:2x2x2"))}
    name = "standard, fastest lossless"
    assert gpu[name].all_reduce == compare.FASTEST_ALL_REDUCE
    assert gpu[name].request == gpu["standard, psum"].request
    assert tpu[name].all_reduce is None
    assert tpu[name].request.config.mesh.reduction == "auto"
    assert list(gpu) == list(tpu)
    assert gpu["hybrid:last4"].request.config.model.residual == "hybrid:last4"
    assert gpu["no communication"].request.config.model.residual == "upper-bound"


def planned(title: str, step: float) -> compare.VariantPlan:
    totals = dict(
        step_us=step,
        compute_us=900.0,
        communication_us=300.0,
        hidden_us=200.0,
        exposed_us=100.0,
        unavoidable_us=50.0,
    )
    memory = dict(
        weights_bytes=4e9,
        kv_bytes=1e9,
        temporary_bytes=5e8,
        capacity_bytes=16e9,
        fits=True,
    )
    report = dict(
        workload="decode",
        recipe="small",
        target="v5e:2x4",
        batch=16,
        context=256,
        reduction="psum",
        totals=totals,
        memory=memory,
    )
    return compare.VariantPlan(title, report, Timeline([], []))


def test_the_comparison_is_a_line_a_variant_with_speed_ups_over_the_first():
    text = compare.comparison_text([planned("standard", 1200), planned("ladder", 1000)])
    head, titles, standard, ladder, memory = text.splitlines()
    assert head == "decode of small on v5e:2x4, batch 16, context 256"
    assert titles.split()[-2:] == ["least", "speed-up"]
    assert standard.split() == [
        *("standard", "psum", "1,200", "900", "300", "200", "100", "50", "1.000")
    ]
    assert ladder.split()[-1] == "1.200"
    assert memory == "5.5 of 16 GB a device: fits"


def test_tables_align_numbers_right_and_text_left():
    columns = [
        tables.Column("name", lambda row: row["name"], left=True),
        tables.Column("us", tables.number("us", ",.0f")),
    ]
    rows = [dict(name="a", us=1234.5), dict(name="long one", us=2)]
    assert tables.text_table(columns, rows).splitlines() == [
        "name         us",
        "a         1,234",
        "long one      2",
    ]
    assert tables.markdown_table(columns, rows).splitlines() == [
        "| name | us |",
        "| --- | ---: |",
        "| a | 1,234 |",
        "| long one | 2 |",
    ]


# ---------------------------------------------------------------- docs/overlap

ROW = Record(
    recipe="llama3_8b",
    target="v5e:2x4",
    workload="decode",
    batch=16,
    context=2048,
    tensor=8,
    schedule="ladder",
    mesh_reduction="auto",
    reduction="psum",
    step_us=1234.5,
    compute_us=1200.0,
    sent_us=100.0,
    hidden_us=65.5,
    exposed_us=34.5,
    unavoidable_us=20.0,
    jaxlib="0.10.2",
    date="2026-11-21",
    code="abc",
)


def test_the_tables_of_the_docs_are_those_of_their_rows():
    """If this fails: python -m ladder_jax.planner.survey tables"""
    expected = records.markdown_files(records.read(DOCS))
    expected["published.md"] = calibrate.page()
    for name, text in expected.items():
        assert (DOCS / name).read_text("utf-8") == text, name


def test_the_rows_of_the_docs_have_a_plan_each_and_add_up():
    rows = records.read(DOCS)
    assert len({row.key for row in rows}) == len(rows) > 100
    for row in rows:
        assert row.step_us > 0 and not row.error, row
        assert row.hidden_us + row.exposed_us == pytest.approx(row.sent_us, abs=2), row
        if not row.target.startswith("h100"):  # there, kernels slow each other down
            total = row.compute_us + row.exposed_us
            assert total == pytest.approx(row.step_us, abs=2), row


def test_rows_survive_the_file(tmp_path):
    failed = dataclasses.replace(ROW, batch=64, error="too large, by far", step_us=0.0)
    records.write(tmp_path, [failed, ROW])
    assert records.read(tmp_path) == [ROW, failed]
    table = (tmp_path / "decode.md").read_text("utf-8").splitlines()
    assert table[-2:] == [
        "| llama3_8b, v5e:2x4 | 16x2048 | ladder, psum (auto) | 1,234 | 1,200 | 100 | "
        "66 | 34 | 20 | 82% | 0.10.2 |",
        "| llama3_8b, v5e:2x4 | 64x2048 | ladder: too large, by far |  |  |  |  |  |  |"
        " - | 0.10.2 |",
    ]
    assert records.read(tmp_path / "nothing") == []


def test_the_hideable_share_is_of_what_could_be_hidden():
    assert ROW.hidden_share == pytest.approx(65.5 / 80)
    lucky = dataclasses.replace(ROW, exposed_us=10.0)
    assert lucky.hidden_share == 1.0
    nothing = dataclasses.replace(ROW, unavoidable_us=99.5)
    assert nothing.hidden_share is None


def test_schedules_stand_side_by_side_where_there_are_several():
    standard = dataclasses.replace(
        ROW, schedule="standard", mesh_reduction="psum", step_us=2469.0
    )
    others = [
        dataclasses.replace(standard, schedule=name, step_us=2000.0)
        for name in ("parallel", "desync:2")
    ]
    alone = records.markdown_files([ROW, standard, *others[:1]])["schedules.md"]
    assert "## " not in alone
    text = records.markdown_files([ROW, standard, *others])["schedules.md"]
    assert "## llama3_8b, v5e:2x4, batch 16, context 2048" in text
    assert text.splitlines()[-4:] == [
        line
        for line in text.splitlines()
        if line.startswith(("| standard", "| parallel", "| ladder", "| desync"))
    ]
    assert (
        "| ladder, psum (auto) | 1,234 | 1,200 | 100 | 66 | 34 | 20 | 2.000 |" in text
    )


@pytest.fixture
def surveyed(monkeypatch, tmp_path):
    """A function that runs the survey without compilers; returns the planned rows."""
    code = ["one"]
    monkeypatch.setattr(survey, "code_version", lambda: code[0])
    monkeypatch.setattr(
        survey,
        "plan_record",
        lambda record, request, all_reduce: dataclasses.replace(
            record, reduction="psum", step_us=100.0 * request.batch
        ),
    )

    def run(*arguments, version="one"):
        code[0] = version
        args = survey.parse([*arguments, "--folder", str(tmp_path)])
        return [(row.target, row.batch, row.schedule) for row in survey.survey(args)]

    return run


def test_the_survey_goes_on_where_it_was_stopped(surveyed):
    decode = ["decode", "--recipes", "llama3_8b", "--targets", "v5e:2x4"]
    assert surveyed(*decode, "--shapes", "1x2048") == [("v5e:2x4", 1, "ladder")]
    rest = [("v5e:2x4", 16, "ladder"), ("v5e:2x4", 64, "ladder")]
    assert surveyed(*decode) == rest
    assert surveyed(*decode) == []
    assert surveyed(*decode, "--shapes", "1x2048", "--again") == [
        ("v5e:2x4", 1, "ladder")
    ]
    assert len(surveyed(*decode, version="two")) == 3


def test_the_survey_compares_schedules_with_a_row_for_each(surveyed, tmp_path):
    planned = surveyed("compare")
    rows = records.read(tmp_path)
    assert len(planned) == len(rows) == 4 * 8
    fast = [row for row in rows if row.all_reduce_us]
    assert [(row.target, row.all_reduce_us) for row in fast] == [("h100:1x8", 7.8)] * 3
    assert (tmp_path / "schedules.md").read_text("utf-8").count("\n## ") == 4


def test_a_shape_that_is_none_is_one_line(surveyed):
    with pytest.raises(
        ValueError, match="shapes='4' is not accepted: it must be batch"
    ):
        surveyed("decode", "--recipes", "llama3_8b", "--shapes", "4")


def test_the_version_of_the_code_ignores_docstrings(tmp_path):
    def version(text):
        (tmp_path / "model.py").write_text(text, encoding="utf-8")
        return survey.code_version(tmp_path)

    first = version('def f(x):\n    """Adds one."""\n    return x + 1\n')
    assert version("def f(x):\n    # One more.\n    return (x + 1)\n") == first
    assert version("def f(x):\n    return x + 2\n") != first
    for pattern in survey.HASHED_FILES:
        assert list(survey.PACKAGE.glob(pattern)), f"{pattern} names no file"
