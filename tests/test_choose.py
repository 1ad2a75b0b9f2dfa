"""Which reduction "auto" takes, and what the cost model makes of new reductions."""

import jax
import pytest
from helpers import slice_of
from jax import lax

from ladder_jax.config import Config, Mesh, Model
from ladder_jax.hardware import chips, cost
from ladder_jax.residual import choose, overlap, reductions
from ladder_jax.residual.reductions import REDUCTIONS, Round

EIGHT = [list(range(8))]
MODEL = Model(
    vocab_size=1024, dim=4096, heads=32, kv_heads=8, head_dim=128, ffn_dim=14336
)


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
    ("v5e", "decode"): ("recursive-doubling", 256),
    ("v6e", "decode"): ("recursive-doubling", 256),
    ("v5p", "decode"): ("recursive-doubling", 256),
    ("h100", "decode"): ("one-shot", 256),
    ("v5e", "standard"): ("one-shot", 64),
    ("v6e", "standard"): ("one-shot", 128),
    ("v5p", "standard"): ("one-shot", 128),
    ("h100", "standard"): ("one-shot", 256),
    ("v5e", "2048 rows"): ("recursive-doubling", 256),
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


def test_rounds_are_read_off_the_reductions_themselves():
    size = 8 * 1024
    assert [
        [kind for kind, *_ in sends] for sends in choose.rounds("psum", 8, size)
    ] == [["all-reduce"]]
    doubling = choose.rounds("recursive-doubling", 8, size)
    assert [len(sends) for sends in doubling] == [1, 1, 1] and {
        sends[0][2] for sends in doubling
    } == {size}
    halving = choose.rounds("halving-doubling", 8, size)
    assert [sends[0][2] * 8 // size for sends in halving] == [4, 2, 1, 1, 2, 4]
    assert [len(sends) for sends in choose.rounds("direct", 8, size)] == [7, 7]
    assert len(choose.rounds("ring", 3, size)) == 4


def test_the_choice_depends_on_machine_message_and_what_it_hides_behind():
    def chosen(kind, size, hides=True, blocks=None):
        network = NETWORKS[kind]
        return choose.choose_reduction(network, EIGHT, size, hides=hides, blocks=blocks)

    # Few rounds have a short latency. SparseCores run a psum beside the products.
    assert chosen("v5p", 16 << 10) == "recursive-doubling"
    assert chosen("v5p", 512 << 10) == "psum"
    assert chosen("v5e", 512 << 10) == "psum"
    assert chosen("h100", 64 << 10) == "one-shot"
    assert chosen("h100", 1 << 20) == chosen("h100", 64 << 20, hides=False) == "psum"
    for kind in ("v5p", "v6e", "v5e"):  # training on 2048 tokens
        blocks = choose.block_seconds(MODEL, NETWORKS[kind].chip, 2048, 8)
        assert chosen(kind, 16 << 20, blocks=blocks) == "psum"
    # In decode, a block takes the time of reading its weights.
    assert choose.block_seconds(MODEL, NETWORKS["v5p"].chip, 64, 8) is None


# ---------------------------------------------------------------- a mesh


def test_auto_is_psum_where_the_machine_is_not_known():
    mesh = jax.make_mesh(
        (1, 1, 4), ("data", "fsdp", "tensor"), devices=jax.devices()[:4]
    )
    assert choose.reduction_for("auto", Model(), mesh) == "psum"
    assert choose.reduction_for("ring", Model(), mesh) == "ring"


def test_auto_chooses_for_every_message_where_the_machine_is_known(monkeypatch):
    monkeypatch.setattr(choose, "network_of", lambda devices: NETWORKS["v5p"])
    mesh = jax.make_mesh((1, 1, 8), ("data", "fsdp", "tensor"))
    config = Config(
        model=Model(residual="ladder"), mesh=Mesh(data=1, tensor=8, reduction="auto")
    )
    reduction = choose.auto_reduction.__wrapped__(config.model, mesh)
    message = lambda *shape: jax.ShapeDtypeStruct(shape, "bfloat16")
    assert reduction.name_for(message(16, 1, 256)) == "recursive-doubling"
    assert reduction.name_for(message(8192, 4, 1024)) != "recursive-doubling"
    assert (
        reduction.name_for(message()) in reductions.REDUCTIONS
        and not reduction.in_order
    )
    monkeypatch.setattr(choose, "network_of", lambda devices: NETWORKS["v6e"])
    assert choose.auto_reduction.__wrapped__(config.model, mesh).in_order


@pytest.mark.parametrize(
    "kind, rows, tied", [("v5p", 1, 3), ("v5p", 8, 3), ("v5p", 9, 2), ("v6e", 1, 2)]
)
def test_where_xla_would_end_a_short_messages_last_round_at_once_a_product_ends_it(
    kind, rows, tied
):
    """Doubling has three rounds on eight shards; without a tie XLA ends the last."""
    policy = reductions.Policy(
        lambda message: "recursive-doubling", tied_rows=chips.CHIPS[kind].tied_rows
    )

    def block(x):
        reduction = overlap.AsyncReduction(x, policy)
        for product in range(reductions.PRODUCTS):
            x = reduction.progress(x * product)
        return reduction.wait(), x

    value = jax.ShapeDtypeStruct((rows, 1, 256), "bfloat16")
    jaxpr = jax.make_jaxpr(block, axis_env=[("tensor", 8)])(value)
    assert str(jaxpr).count("optimization_barrier") == tied
