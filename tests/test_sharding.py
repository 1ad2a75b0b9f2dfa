"""The mesh, on TPU slices too, whose devices are only coordinates here; and the specs:
every parameter has one, and what does not divide is one line.
"""

import dataclasses
import math
from dataclasses import dataclass

import jax
import numpy as np
import pytest
from helpers import BIASES, make_mesh
from model_cases import case_model

from ladder_jax import config, model, sharding
from ladder_jax.config import ConfigError, Mesh
from ladder_jax.residual import reductions


@dataclass(frozen=True, order=True)
class Chip:
    coords: tuple[int, int, int]
    process_index: int
    core_on_chip: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5"
    slice_index: int = 0


def slice_of(*sides, host=(2, 2, 1), cores=1):
    """The devices of a slice, x fastest, in hosts of `host` chips."""
    hosts = [side // of for side, of in zip(sides, host)]
    return [
        Chip(
            (x, y, z),
            x // host[0] + hosts[0] * (y // host[1] + hosts[1] * (z // host[2])),
            core,
        )
        for z in range(sides[2])
        for y in range(sides[1])
        for x in range(sides[0])
        for core in range(cores)
    ]


@pytest.mark.parametrize(
    "sides, cores, tensor, farthest",
    [
        ((2, 4, 1), 1, 8, 2),
        ((2, 2, 2), 1, 8, 1),
        ((2, 2, 1), 1, 4, 1),
        ((16, 16, 1), 1, 8, 2),
        ((8, 8, 8), 1, 8, 1),
        ((4, 4, 12), 1, 16, 2),
        ((16, 16, 1), 1, 16, 2),
        ((2, 2, 2), 2, 8, 1),
        ((2, 4, 1), 1, 2, 1),
    ],
)
def test_a_tensor_group_is_a_block_of_the_slice_whose_exchanges_keep_to_one_distance(
    sides, cores, tensor, farthest
):
    devices = slice_of(*sides, cores=cores)
    mesh = sharding.make_mesh(Mesh(data=-1, tensor=tensor), devices)
    assert sorted(mesh.devices.flat) == sorted(devices)
    for group in mesh.devices.reshape(-1, tensor):
        places = np.array([(*device.coords, device.core_on_chip) for device in group])
        assert math.prod(np.ptp(places, axis=0) + 1) == tensor
        for bit in (1 << k for k in range(tensor.bit_length() - 1)):
            ways = {
                tuple(abs(places[a] - places[b]).tolist())
                for a, b in reductions.exchange(tensor, bit)
            }
            assert len(ways) == 1 and 0 < sum(ways.pop()) <= farthest


def test_neighbours_in_a_cube_are_neighbours_in_the_ring():
    """In whatever order devices are listed, and whatever jax makes of a slice."""
    devices = slice_of(2, 2, 2)
    ring = [
        np.array(chip.coords)
        for chip in sharding.make_mesh(Mesh(tensor=8), devices[::-1]).devices.flat
    ]
    assert all(abs(ring[i] - ring[i - 1]).sum() == 1 for i in range(8))


@pytest.mark.parametrize("tensor, shares", [(1, 4), (2, 4), (4, 4), (8, 2), (16, 1)])
def test_hosts_hold_whole_shares_of_a_batch(tensor, shares, monkeypatch):
    mesh = sharding.make_mesh(Mesh(data=-1, tensor=tensor), slice_of(4, 4, 1))
    held = []
    for process in range(4):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        held.append(sharding.data_shard(mesh))
    assert {count for _, count in held} == {shares} and {
        index for index, _ in held
    } == set(range(shares))
    assert all(
        sum(index == share for index, _ in held) == 4 // shares
        for share in range(shares)
    )


@pytest.mark.parametrize("fsdp, tensor", [(1, 4), (4, 1), (2, 2), (1, 1)])
def test_of_several_slices_only_the_data_axis_crosses_them(fsdp, tensor):
    """And in each slice the other axes are arranged as if it were alone."""
    own = slice_of(2, 2, 1)
    both = [dataclasses.replace(d, slice_index=i) for i in (1, 0) for d in own]
    sizes = dict(fsdp=fsdp, tensor=tensor)
    mesh = sharding.make_mesh(Mesh(data=-1, **sizes), both)
    alone = sharding.make_mesh(Mesh(data=-1, **sizes), own).devices
    assert mesh.shape["data"] == 8 // (fsdp * tensor)
    for index, part in enumerate(np.split(mesh.devices, 2)):
        assert {device.slice_index for device in part.flat} == {index}
        assert [d.coords for d in part.flat] == [d.coords for d in alone.flat]


def test_other_axes_are_refused_across_slices():
    own = slice_of(2, 2, 1)
    both = [dataclasses.replace(d, slice_index=i) for i in range(2) for d in own]
    for mesh, devices, text in (
        (Mesh(data=1, tensor=8), both, "mesh.data=1 is not accepted on 2 TPU slices"),
        (Mesh(data=1, fsdp=-1), both, "mesh.data=1 is not accepted on 2 TPU slices"),
        (Mesh(data=-1), both[:-1], "the TPU slices have 4, 3 devices: take equal"),
    ):
        assert text in one_line(sharding.make_mesh, mesh, devices)


def test_elsewhere_the_mesh_is_jaxs():
    sizes = dict(data=2, fsdp=2, tensor=2)
    mine = sharding.make_mesh(Mesh(**sizes)).devices
    assert (mine == jax.make_mesh(tuple(sizes.values()), tuple(sizes)).devices).all()


# ---------------------------------------------------------------- parameters


def test_norms_and_biases_are_vectors_and_matrices_are_not():
    for name, row in sharding.PARAMETERS.items():
        heads = "N" in row.axes or "K" in row.axes
        is_vector = len(row.axes) == (2 if heads else 1)
        assert is_vector == (row.role in ("norm", "bias")), f"{name} is a {row.role}"


def test_roles_are_those_of_the_table_layer_by_layer():
    tree = {"embedding": 0, "layers": {"attention": {"wq": 0, "q_norm": 0, "bq": 0}}}
    assert sharding.parameter_roles(tree) == {
        "embedding": "embedding",
        "layers": {"attention": {"wq": "matrix", "q_norm": "norm", "bq": "bias"}},
    }


def test_abstract_gives_shapes_the_shardings_of_the_table_or_of_specs():
    mesh = sharding.make_mesh(Mesh(data=2, fsdp=2, tensor=2))
    shapes = {
        "embedding": jax.ShapeDtypeStruct((32, 16), np.float32),
        "layers": {"mlp": {"up": jax.ShapeDtypeStruct((3, 16, 8), np.float32)}},
    }
    placed = sharding.abstract(shapes, mesh)
    up = placed["layers"]["mlp"]["up"]
    assert up.sharding.spec == jax.P(None, "fsdp", "tensor")
    assert up.sharding.shard_shape(up.shape) == (3, 8, 4) and up.dtype == np.float32
    assert placed["embedding"].sharding.spec == jax.P("tensor", "fsdp")
    one = sharding.abstract(shapes["embedding"], mesh, sharding.REPLICATED)
    assert one.sharding.is_fully_replicated and one.shape == (32, 16)


# ---------------------------------------------------------------- what has to divide

VARIANTS = [
    {},
    dict(tie_embeddings=True),
    dict(qk_norm=True),
    BIASES,
    dict(residual="parallel"),
    dict(residual="desync:2", qk_norm=True, qkv_bias=True, layers=1),
]


def test_every_parameter_has_a_spec_that_divides_the_dimension_it_names():
    names = set()
    for options in VARIANTS:
        model_config = config.Model(
            vocab_size=320,
            dim=24,
            heads=16,
            kv_heads=8,
            head_dim=10,
            ffn_dim=48,
            **{**dict(layers=3), **options},
        )
        tree = model.abstract(model_config)
        for name, leaf, spec in zip(
            *map(
                jax.tree.leaves,
                (sharding.parameter_names(tree), tree, sharding.parameter_specs(tree)),
            )
        ):
            names.add(name)
            axes = sharding.PARAMETERS[name].axes
            sizes = [getattr(model_config, sharding.DIMS[dim]) for dim in axes]
            stacked = [model_config.layers] * ("." in name)
            assert list(leaf.shape) == stacked + sizes, (
                f"{name} is {leaf.shape}, not layers + {sizes}"
            )
            assert tuple(spec) == (*(None for _ in stacked), *axes.values()), name
    assert names == set(sharding.PARAMETERS), (
        "PARAMETERS has a row that no model has, or lacks one"
    )


def one_line(function, *args):
    with pytest.raises(ConfigError) as error:
        function(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "field, size, mesh",
    [
        ("vocab_size", 31, (1, 1, 8)),
        ("heads", 12, (1, 1, 8)),
        ("kv_heads", 4, (1, 1, 8)),
        ("ffn_dim", 20, (1, 1, 8)),
        ("dim", 20, (1, 8, 1)),
    ],
)
def test_a_model_that_does_not_divide_is_one_line_with_the_field(field, size, mesh):
    options = {"kv_heads": 4} if field == "heads" else {}
    model_config = case_model("ladder", **{**options, field: size})
    text = one_line(sharding.check_fits, model_config, make_mesh(*mesh))
    assert f"model.{field}={size}" in text and (
        "mesh.tensor=8" in text or "mesh.fsdp=8" in text
    )


def test_a_batch_that_does_not_divide_is_one_line():
    assert "batch of 6" in one_line(
        sharding.check_fits, case_model("ladder"), make_mesh(2, 2, 2), 6
    )
    sharding.check_fits(case_model("ladder"), make_mesh(2, 2, 2), 8)


def test_a_mesh_that_does_not_fit_the_devices_is_one_line():
    assert "mesh data=3 x fsdp=1 x tensor=1 has 3 devices, but there are 8" in one_line(
        sharding.make_mesh, config.Mesh(3, 1, 1)
    )
    assert "data=-1 x fsdp=1 x tensor=3 does not divide the 8" in one_line(
        sharding.make_mesh, config.Mesh(-1, 1, 3)
    )
    assert tuple(sharding.make_mesh(config.Mesh(2, -1, 2)).shape.items()) == (
        ("data", 2),
        ("fsdp", 2),
        ("tensor", 2),
    )
    assert make_mesh(1, 1, 2).devices.size == 2
