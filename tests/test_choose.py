"""Which reduction "auto" takes, and what the cost model makes of new reductions."""

import jax
import pytest
from jax import lax

from ladder_jax.config import Model
from ladder_jax.hardware import chips, cost
from ladder_jax.residual import choose, reductions
from ladder_jax.residual.reductions import REDUCTIONS, Round

EIGHT = [list(range(8))]
MODEL = Model(
    vocab_size=1024, dim=4096, heads=32, kv_heads=8, head_dim=128, ffn_dim=14336
)


def slice_of(kind, *sides):
    """The network of a TPU slice: devices in the order in which JAX lists them."""
    x_side, y_side, z_side = sides
    coordinates = [
        (x, y, z) for z in range(z_side) for y in range(y_side) for x in range(x_side)
    ]
    return cost.Network(chips.CHIPS[kind], coordinates)


NETWORKS = {
    "v5e": slice_of("v5e", 2, 4, 1),
    "v6e": slice_of("v6e", 2, 4, 1),
    "v5p": slice_of("v5p", 2, 2, 2),
    "h100": cost.Network(chips.CHIPS["h100"], [0] * 8),
}
SIZES_KIB = (16, 64, 128, 256, 512, 1024, 4096, 16384)
# What short messages take, and up to which KiB; longer ones take psum. As computed
# before choose_reduction was divided into small functions: only a change of the cost
# model's numbers should change it.
GOLDEN = {
    ("v5e", "decode"): ("recursive-doubling", 512),
    ("v6e", "decode"): ("recursive-doubling", 256),
    ("v5p", "decode"): ("recursive-doubling", 256),
    ("h100", "decode"): ("one-shot", 256),
    ("v5e", "standard"): ("one-shot", 64),
    ("v6e", "standard"): ("one-shot", 128),
    ("v5p", "standard"): ("one-shot", 128),
    ("h100", "standard"): ("one-shot", 256),
    ("v5e", "2048 rows"): ("recursive-doubling", 512),
    ("v6e", "2048 rows"): ("recursive-doubling", 256),
    ("v5p", "2048 rows"): ("recursive-doubling", 256),
}


@pytest.mark.parametrize("machine, work", GOLDEN)
def test_the_reduction_of_each_machine_work_and_size_is_as_before(machine, work):
    network = NETWORKS[machine]
    blocks = None
    if work == "2048 rows":
        blocks = choose.block_seconds(MODEL, network.chip, 2048, 8)
    short, limit = GOLDEN[machine, work]
    for kib in SIZES_KIB:
        reduction = choose.choose_reduction(
            network, EIGHT, kib << 10, hides=work != "standard", blocks=blocks
        )
        expected = short if kib <= limit else "psum"
        assert reduction == expected, f"{machine}, {work}, {kib} KiB"


def start(value):
    return value


def scatter_and_gather(like):
    """Reduce-scatter, then all-gather, by XLA's own collectives."""
    scatter = lambda x: lax.psum_scatter(x, "tensor", tiled=True)
    gather = lambda x: lax.all_gather(x, "tensor", tiled=True)
    replace = lambda _, new: new
    return start, [Round(scatter, replace), Round(gather, replace)], lambda total: total


def by_all_to_all(like):
    send = lambda x: lax.all_to_all(x.reshape(8, -1), "tensor", 0, 0)
    return start, [Round(send, lambda _, new: new)], lambda total: total


def by_a_loop(like):
    def send(x):
        step = lambda _, x: lax.ppermute(x, "tensor", [(i, i ^ 1) for i in range(8)])
        return lax.fori_loop(0, 3, step, x)

    return start, [Round(send, lambda _, new: new)], lambda total: total


def by_a_jitted_sum(like):
    send = jax.jit(lambda x: lax.psum(x, "tensor"))
    return start, [Round(send, lambda _, new: new)], lambda total: total


@pytest.fixture
def added(monkeypatch):
    """Adds a reduction named "new" for one test."""

    def add(reduction):
        monkeypatch.setitem(reductions.REDUCTIONS, "new", reduction)
        choose.rounds.cache_clear()

    yield add
    choose.rounds.cache_clear()


def test_reduce_scatter_and_all_gather_cost_what_one_all_reduce_costs(added):
    added(scatter_and_gather)
    size = 1 << 20
    [[scatter], [gather]] = choose.rounds("new", 8, size)
    assert scatter == ("reduce-scatter", None, size)
    assert gather == ("all-gather", None, size)
    for machine in ("v5p", "h100"):
        network = NETWORKS[machine]
        both_s = sum(choose.seconds("new", network, EIGHT, size))
        once_s = sum(choose.seconds("psum", network, EIGHT, size))
        launch_s = network.chip.collective_launch_s
        assert once_s <= both_s <= once_s + launch_s


@pytest.mark.parametrize(
    "reduction, message",
    [
        (by_all_to_all, "reduction 'new' uses all_to_all, for which the cost model"),
        (by_a_loop, "a reduction has ppermute inside"),
    ],
)
def test_a_collective_without_a_formula_is_an_error_and_not_free(
    added, reduction, message
):
    added(reduction)
    with pytest.raises(ValueError, match=message) as error:
        choose.choose_reduction(NETWORKS["v5p"], EIGHT, 1 << 16, hides=True)
    assert "\n" not in str(error.value)


def test_a_collective_inside_a_jitted_function_is_counted(added):
    added(by_a_jitted_sum)
    assert choose.rounds("new", 8, 1 << 16) == choose.rounds("psum", 8, 1 << 16)


def test_every_round_of_every_reduction_sends_something():
    for name in REDUCTIONS:
        by_round = choose.rounds(name, 8, 1 << 16)
        assert by_round and all(by_round), f"{name} sends {by_round}"
