"""`ladder-jax plan` without compilers: its mistakes, its text, its comparison."""

import dataclasses
import importlib.util
import json
import re
from types import SimpleNamespace

import helpers
import numpy as np
import pytest

from ladder_jax import cli, sharding
from ladder_jax.config import Config, ConfigError, Mesh, Model
from ladder_jax.hardware import aot
from ladder_jax.planner import (
    command,
    compare,
    lengths,
    planning,
    report,
    tables,
    use,
)
from ladder_jax.planner.plan import Compiled, Request
from ladder_jax.planner.stack import shorten
from ladder_jax.planner.timeline import Timeline

LENGTHS = "configs/workloads/sharegpt.toml"
WRONG = [
    (["--target", "v9:2x4"], "target='v9:2x4' is not accepted"),
    (["--target", "v5e:2x2x2"], "target='v5e:2x2x2' is not accepted"),
    (
        ["--target", "v5e:2x4", "--workload", "sleep"],
        "--workload='sleep' is not accepted: it must be one of",
    ),
    (
        ["--target", "v5e:2x4", "--schedule", "snake"],
        "model.residual='snake' is not accepted",
    ),
    (
        ["--target", "v5e:2x4", "--reduction", "magic"],
        "mesh.reduction='magic' is not accepted",
    ),
    (["--target", "v5e:2x4", "--batch", "0"], "batch=0 is not accepted"),
    (
        ["--target", "v5e:2x4", "--context", "9999"],
        "context=9999 is not accepted: it must be from 1 to",
    ),
    (["--target", "v5e:2x4", "--compare", "--hlo", "x"], "leave out --compare"),
    (["--target", "v5e:2x4", "--compare", "--lengths", "x"], "leave out --compare"),
    (
        ["--target", "v5e:2x4", "--lengths", "x.toml", "--context", "9"],
        "leave out --context",
    ),
    (["--target", "v5e:2x4", "--accepted", "2"], "give --drafts, too"),
    (["--target", "v5e:2x4", "--drafts", "2", "--compare"], "leave out --compare"),
    (["--target", "v5e:2x4", "--drafts", "-1"], "it must be 1 or more"),
    (["--target", "v5e:2x4", "--drafts", "9", "--context", "9"], "and context=9"),
    (
        [*"--target v5e:2x4 --workload train --drafts 2".split()],
        "it must be 0 but for decode",
    ),
    (
        [*"--target v5e:2x4 --drafts 2 --accepted 3.5".split()],
        "from 1 to 1 + drafts = 3",
    ),
    (["--target", "v5e:2x4", "--lengths", "x.csv"], "it must be a .toml or .jsonl"),
    (["--target", "v5e:2x4", "--lengths", "x.toml"], "x.toml' cannot be read"),
    (
        [*"--target v5e:2x4 --workload train --lengths".split(), LENGTHS],
        "with decode alone",
    ),
]


@pytest.mark.parametrize("arguments, message", WRONG)
def test_a_mistake_is_one_line_that_names_the_option(arguments, message):
    with pytest.raises(ConfigError) as error:
        cli.plan(["configs/demo.py", *arguments])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_recipe_that_does_not_exist_is_an_error():
    with pytest.raises(ConfigError, match="recipe 'nothing.py' does not exist"):
        cli.plan(["nothing.py", "--target", "v5e:2x4"])


def test_without_its_compiler_a_target_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError,
        match=r"takes XLA's TPU compiler: .*pip install 'ladder_jax\[plan\]'",
    ):
        cli.plan(["configs/demo.py", "--target", "v5e:2x4"])


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
            memory=dict(
                weights_bytes=12e9,
                kv_bytes=4e9,
                temporary_bytes=1e9,
                capacity_bytes=16e9,
                fits=False,
                overlaps=False,
            ),
            use=dict(
                tokens_per_s=12345.6,
                tokens_per_s_device=1543.2,
                mfu=0.0123,
                largest_batch=12,
                price=2.5,
                cost_per_million=0.456,
            ),
            sources=dict(
                peak_flops=dict(label="published", text=""),
                hop_latency_s=dict(label="modelled", text=""),
                hbm_bytes=dict(label="published", text=""),
            ),
        )
    )
    head, titles, merged, single, totals, sizes, speed, fits, alone, sources = (
        text.splitlines()
    )
    assert alone == use.NO_OVERLAP
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
    assert sizes == (
        "weights 12.00, kv 4.00, temporary 1.00, capacity 16.00 (GB a device)"
    )
    assert speed == (
        "12,346 tokens/s, 1,543 a device, MFU 1.2% (modelled); 0.46 a million tokens "
        "at 2.5 an hour of a device"
    )
    assert fits == (
        "does not fit: 17.0 of 16 GB a device; the largest batch that fits is 12"
    )
    assert sources == (
        "the chip's numbers: published: peak_flops, hbm_bytes; modelled: hop_latency_s"
    )


def test_the_command_plans_a_decode_step(plan_on_cpu, tmp_path):
    """Of 6 layers, 4 are compiled; the two in the middle count twice."""
    pytest.importorskip("matplotlib")
    from matplotlib import image

    program, picture = tmp_path / "program.txt", tmp_path / "lanes.png"
    text = plan_on_cpu("--hlo", str(program), "--plot", str(picture))
    head, titles, *collectives, totals, cache, memory, _, fits, sources = (
        text.splitlines()
    )
    assert head == (
        "decode of 6 layers, ladder, recursive-doubling, batch 8, context 512, on "
        "v5e:2x4"
    )
    assert cache == (
        "keys and values in rows: 4,096 tokens read for 4,096 alive (1.00 x)"
    )
    assert titles.split()[:3] == ["collective", "kind", "axis"]
    # The embedding and 8 blocks, each with two rounds between 4 shards.
    assert len(collectives) == 2 * (1 + 8)
    assert sum(float(line.split()[4]) for line in collectives) == 2 * (1 + 12)
    assert {tuple(line.split()[1:3]) for line in collectives} == {
        ("collective-permute", "tensor")
    }
    assert re.fullmatch(r"step \d.*, exposed \d.* \(us a step\)", totals)
    assert memory.endswith("capacity 16.00 (GB a device)")
    assert fits.startswith("fits: 0.0 of 16 GB a device")
    assert sources.startswith("the chip's numbers: published: peak_flops")
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


# ---------------------------------------------------------------- drafts


def test_the_command_plans_drafts_beside_the_step_without_them(plan_on_cpu):
    plain = json.loads(plan_on_cpu("--json"))
    plan = json.loads(plan_on_cpu("--drafts", "3", "--accepted", "2.5", "--json"))
    drafts, alone = plan["drafts"], plan["drafts"]["plain"]
    assert (drafts["drafts"], drafts["tokens_a_pass"]) == (3, 2.5)
    assert alone["step_us"] == pytest.approx(plain["totals"]["step_us"])
    assert drafts["drafted"]["step_us"] == plan["totals"]["step_us"]
    assert drafts["drafted"]["step_us"] > alone["step_us"]  # four times the rows
    assert drafts["drafted"]["us_a_token"] == plan["totals"]["step_us"] / 2.5
    # A pass has the collectives of a step.
    one, both = alone["collectives_a_token"], drafts["drafted"]["collectives_a_token"]
    assert one == sum(row["count"] for row in plain["collectives"]) > 0
    assert both == pytest.approx(one / 2.5)
    last = plan_on_cpu("--drafts", "3").splitlines()[-1]
    assert last.startswith("with 3 drafted tokens a pass takes ")
    assert "At 4 tokens a pass" in last and last.endswith(f"instead of {one:,.1f}")


# ---------------------------------------------------------------- mixed lengths


def test_the_command_plans_rows_and_pages_for_mixed_lengths(plan_on_cpu, tmp_path):
    """Eight requests of 1 to 300 tokens, in rows of 512 tokens or of 96.

    No kernel fits, so that pages are rows of the mean length in whole pages, 76.
    """
    path = helpers.write_rows(tmp_path / "live.jsonl", [1, 1, 1, 1, 32, 33, 64, 300])
    plan = json.loads(plan_on_cpu("--lengths", str(path), "--json"))
    mixed, rows, pages = plan["lengths"], *(plan["lengths"][k] for k in LAYOUTS)
    assert (mixed["shortest"], mixed["longest"], mixed["tokens_alive"]) == (1, 300, 433)
    assert rows["tokens_read"] == 8 * 512
    assert pages["tokens_read"] == 8 * 96 and mixed["kernel"] == ""
    assert plan["context"] == 512 and plan["totals"]["step_us"] == rows["step_us"]
    assert pages["step_us"] < rows["step_us"]
    memory = plan["memory"]
    assert rows["kv_read_bytes"] == memory["kv_bytes"]
    assert pages["kv_read_bytes"] == memory["kv_bytes"] * 96 // 512
    traffic = memory["kv_bytes"] + memory["weights_bytes"]
    assert rows["kv_share"] == pytest.approx(memory["kv_bytes"] / traffic)
    # A row has 300 tokens, pages of the mean request 96.
    assert pages["slots"] / rows["slots"] == pytest.approx(300 / 96, rel=0.01)
    *_, head, titles, in_rows, in_pages, end = plan_on_cpu(
        "--lengths", str(path)
    ).splitlines()
    assert head.startswith("433 live tokens, requests of 1 to 300 (")
    assert titles.split()[-4:] == ["that", "fit", "step", "us"]
    assert in_rows.split()[:3] == ["rows", "4,096", "9.46"]
    assert in_pages.split()[:3] == ["pages", "768", "1.77"]
    assert "with rows of the mean length, as no kernel fits" in end


LAYOUTS = "rows", "pages"


def test_lengths_of_a_distribution_are_those_of_a_random_step():
    mixed = lengths.read(f"{helpers.ROOT}/configs/workloads/sharegpt.toml", 500, 8192)
    assert (np.diff(mixed.lengths) >= 0).all() and mixed.lengths.min() >= 1
    # Outputs that a slot holds for longer count more: sigma is 0.8, so the mean of
    # their lengths is 338 exp(0.8 ** 2), of which half is there; some are cut at 1024.
    expected = 161 + 338 * np.exp(0.64) / 2
    assert 0.8 * expected < mixed.lengths.mean() < expected
    assert mixed.longest >= mixed.lengths.max() and mixed.longest <= 2048
    fewer = lengths.read(mixed.name, 4, 8192).lengths
    assert fewer.tolist() == mixed.lengths[[62, 187, 312, 437]].tolist()


def test_lines_are_the_rows_of_a_batch_of_as_many(tmp_path):
    path = helpers.write_rows(tmp_path / "live.jsonl", [40, 3, 5])
    mixed = lengths.read(str(path), 3, 64)
    assert mixed.lengths.tolist() == [3, 5, 40]
    assert (mixed.row_length, mixed.page_length, mixed.longest) == (64, 64, 40)
    assert lengths.read(str(path), 1, 64).lengths.tolist() == [5]


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.jsonl", "", "has no line"),
        ("a.jsonl", "3\n0\n", "a.jsonl, line 2=0 is not accepted"),
        ("a.jsonl", "[3]\n", "line 1=[3] is not accepted"),
        ("a.jsonl", "65\n", "has a request of 65 tokens, but model.max_length=64"),
        ("a.toml", "distribution", "is not TOML"),
        ("a.toml", "prompts = 3", "prompts=3 is not accepted: it must be one of dist"),
        (
            "a.toml",
            "prompt = '3'",
            "prompt='3' is not accepted: it must be of typ",
        ),
        ("a.toml", "prompt = 3", "lacks distribution, most"),
        (
            "a.toml",
            "distribution = 'chat'\nprompt = 3\nmost = 3",
            "distribution='chat' is not accepted",
        ),
        (
            "a.toml",
            "distribution = 'shared'\nprompt = -1\nmost = 3",
            "prompt=-1 is not accepted: it must be 1 or more",
        ),
    ],
)
def test_a_mistake_in_a_file_of_lengths_is_one_line(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        lengths.read(str(path), 2, 64)
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1


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
    assert [one for one in gpu if one != "standard, symmetric buffers"] == list(tpu)
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
        overlaps=True,
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


def test_gradients_and_moments_of_all_layers_are_arrays_that_grow():
    model_config = Model(
        vocab_size=64, dim=16, layers=32, heads=4, kv_heads=4, head_dim=8, ffn_dim=24
    )
    config = Config(model=model_config)
    request = Request("small", config, aot.parse("h100:1x8"), "train", 8, 64)
    mesh = sharding.make_mesh(Mesh(data=2, fsdp=2, tensor=2))
    compiled = Compiled(request, mesh, shorten(model_config, 4), "", 0, 0, 0)

    def growth(compiled, *dims):
        array = SimpleNamespace(dims=dims)
        return report.growth_of(compiled)(SimpleNamespace(outputs=[array]))

    assert growth(compiled, 4, 8, 12) == 8  # a shard of the gates of four layers
    assert growth(compiled, 8, 12) == growth(compiled, 32, 8) == 1
    decode = compiled._replace(request=request._replace(workload="decode"))
    assert growth(decode, 4, 8, 12) == 1
