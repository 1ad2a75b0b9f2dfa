"""The planner's reader of XLA's scheduled programs: arrays, groups, scopes, threads."""

import pytest
from hlo_programs import OVERLAPPED

from ladder_jax.config import Model
from ladder_jax.hardware import cost
from ladder_jax.planner import hlo
from ladder_jax.planner.scopes import Place, place_of
from ladder_jax.planner.stack import shorten


def test_the_reader_sees_arrays_operands_groups_and_scopes():
    module = hlo.parse(OVERLAPPED)
    assert module.scheduled and module.entry == "main" and module.devices == 4
    body = module.computations["main"]
    assert list(body) == ["x", "w", "start", "dot", "done", "after", "total"]
    assert (
        body["dot"].operands == ("x", "w")
        and body["dot"].dims == (1,)
        and body["dot"].cycles == 3000
    )
    assert (
        body["w"].outputs == (hlo.Buffer("bf16", (8, 8), 1),)
        and body["w"].outputs[0].bytes == 128
    )
    assert hlo.groups(body["start"]) == [(0, 1), (1, 0), (2, 3), (3, 2)]
    assert hlo.groups(body["total"]) == [[0, 1, 2, 3]]
    assert place_of(body["dot"].scope) == ("forward", "layer1", "mlp")
    assert place_of(body["total"].scope) == ("forward", "", "last")
    with pytest.raises(ValueError, match="HloModule"):
        hlo.parse("{}")


@pytest.mark.parametrize(
    "text, groups",
    [
        ("replica_groups={{0,2},{1,3}}", [[0, 2], [1, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['data'=2,'tensor'=2] {'tensor'}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['data'=2,'tensor'=2] {'data'}", [[0, 2], [1, 3]]),
    ],
)
def test_groups_of_devices_in_every_form_that_xla_writes(text, groups):
    assert hlo.groups(hlo.Instruction("r", "all-reduce", (), (), text)) == groups


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


def test_bytes_and_flops_of_a_matrix_product():
    module = hlo.parse(OVERLAPPED)
    body = module.computations["main"]
    assert cost.flops(module, body["dot"], body) == 2 * 4 * 8 * 8
    assert cost.traffic(module, body["dot"], body) == 64 + 64  # w is in VMEM already


LOOP = """HloModule step, is_scheduled=true, num_partitions=4

%layer (p: (s32[])) -> (s32[]) {
  %p = (s32[]) parameter(0)
  %a = s32[] add(%p, %p), metadata={op_name="jit(step)/jvp(layers0to3)/mlp/add"}
  ROOT %t = (s32[]) tuple(%a)
}

%below (p.1: (s32[])) -> pred[] {
  %bound = s32[]{:T(128)} constant(3), metadata={op_name="jit(step)"}
  %p.1 = (s32[]) parameter(0)
  %n = s32[] get-tuple-element(%p.1), index=0
  ROOT %lt = pred[] compare(%n, %bound), direction=LT
}

ENTRY %main (x: (s32[])) -> (s32[]) {
  %x = (s32[]) parameter(0)
  ROOT %loop = (s32[]) while(%x), condition=%below, body=%layer
}
"""


def test_a_loop_of_tpu_runs_as_often_as_its_condition_says():
    module = hlo.parse(LOOP)
    loop = module.computations["main"]["loop"]
    assert (loop.trips, module.trips(loop)) == (None, 3)
    known = 'body=%layer, backend_config={"known_trip_count":{"n":"5"}}'
    module = hlo.parse(LOOP.replace("body=%layer", known))
    assert module.trips(module.computations["main"]["loop"]) == 5


def test_a_loop_without_a_name_is_the_scan_of_its_layers():
    """XLA:GPU takes a layer out of a loop that it pipelines, and its name away."""
    stack = shorten(Model(residual="ladder", layers=80), 4)
    module = hlo.parse(LOOP)
    loop = module.computations["main"]["loop"]
    assert stack.scan_of(loop, module) == ("layers0to3", 4, 80)
    assert stack.trips_of(loop, module) == 79
    other = hlo.parse(LOOP.replace("layers0to3", "loss"))
    assert stack.trips_of(loop, other) == 3
