"""The mesh on TPU slices, on devices that are only coordinates."""

import math
from dataclasses import dataclass

import jax
import numpy as np
import pytest

from ladder_jax import sharding
from ladder_jax.config import Mesh
from ladder_jax.residual import reductions


@dataclass(frozen=True, order=True)
class Chip:
    coords: tuple[int, int, int]
    process_index: int
    core_on_chip: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5"


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
