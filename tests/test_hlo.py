"""The planner's reader of XLA's scheduled programs: arrays, groups, scopes, threads."""

import pytest
from hlo_programs import OVERLAPPED

from ladder_jax.hardware import cost
from ladder_jax.planner import hlo
from ladder_jax.planner.scopes import Place, place_of


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
