"""The planner's clock on programs small enough to play by hand, and its pictures."""

# ruff: noqa: E501  XLA's lines are long
import dataclasses

import pytest
from hlo_programs import (
    OVERLAPPED,
    all_reduce,
    compute,
    done,
    fetch,
    fetched,
    play_seconds,
    program,
    start,
)

from ladder_jax.hardware.cost import Transfer
from ladder_jax.planner import hlo, lanes
from ladder_jax.planner import operations as ops
from ladder_jax.planner.stack import LayerCounter, Stack
from ladder_jax.planner.timeline import Span, play


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
    costs = ops.Costs(
        lambda instruction, _: float(instruction.cycles or 0),
        lambda size: 0.0,
        lambda *_: Transfer(0, 1),
    )
    listed = ops.operations(module, costs)
    assert [type(one) for one in listed] == [
        ops.StartPrefetch,
        ops.StartCollective,
        ops.Compute,
        ops.EndCollective,
    ]


# ---------------------------------------------------------------- text as XLA writes it


def play_text(text, collective, hbm_seconds=lambda size: 0.0):
    """Plays a program on a clock where a thousand cycles take a second."""
    seconds = lambda instruction, _: (instruction.cycles or 0) / 1000
    return play(hlo.parse(text), ops.Costs(seconds, hbm_seconds, collective))


def test_the_clock_hides_what_is_sent_while_it_computes():
    transfer = Transfer(1.0, 4.0, frozenset("a"))
    exchange, total = play_text(OVERLAPPED, lambda *_: transfer).collectives
    assert (exchange.asynchronous, exchange.bytes, exchange.seconds) == (True, 64, 5.0)
    # A product of 3 s runs during a transfer of 5 s.
    times = exchange.window, exchange.hidden, exchange.exposed
    assert times == (3.0, 3.0, 2.0)
    assert (total.asynchronous, total.window, total.hidden, total.exposed) == (
        False,
        0.0,
        0.0,
        5.0,
    )
    transfer = Transfer(0.0, 2.0, frozenset("a"))
    clock = play_text(OVERLAPPED, lambda *_: transfer)
    assert [c.hidden for c in clock.collectives] == [2.0, 0.0]
    assert (clock.compute, clock.exposed) == (4.0, 2.0)


@pytest.mark.parametrize(
    "fetch, exposed", [(0.0, 2.0), (3.0, 2.0), (4.0, 1.0), (4.5, 0.5), (9.0, 0.0)]
)
def test_what_a_prefetch_would_be_waited_for_anyway_is_not_exposed(fetch, exposed):
    """A copy of `fetch` seconds beside a transfer of 5 and a product of 3: it goes on while the transfer is waited for."""
    text = OVERLAPPED.replace(
        "  %dot",
        """  %v = bf16[16,8]{1,0} parameter(2)
  %fetch = (bf16[16,8]{1,0:S(1)}, bf16[16,8]{1,0}, u32[]) copy-start(%v)
  %dot""",
    ).replace(
        "  %after",
        """  %fetched = bf16[16,8]{1,0:S(1)} copy-done(%fetch)
  %after""",
    )

    def clock(seconds):
        return play_text(
            text,
            lambda kind, *_: Transfer(
                0.0, seconds if kind == "collective-permute" else 5.0
            ),
            lambda size: fetch if size == 256 else 0.0,
        )

    real, free = clock(5.0), clock(0.0)
    exchange, total = real.collectives
    assert (exchange.exposed, exchange.hidden, total.exposed) == (
        exposed,
        5.0 - exposed,
        5.0,
    )
    assert exchange.window == exchange.hidden
    # `free` is the same program with a transfer that takes no time.
    assert real.compute + real.exposed - exposed == free.compute + free.exposed
    assert (
        real.compute == free.compute == 4.0 + real.prefetch
        and real.exposed == exposed + 5.0
    )
    ends = [span.end for span in real.spans]
    assert all(span.start >= end for span, end in zip(real.spans[1:], ends))


def test_the_reader_sees_what_sparse_cores_reduce():
    """Their programs are computations of another thread, and all-reduces stand in the midst of a custom call."""
    text = (
        OVERLAPPED.replace(
            "ENTRY %main",
            """%offloaded (p: bf16[4,8]) -> bf16[4,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  ROOT %all-reduce = bf16[4,8]{1,0} all-reduce(%p), replica_groups={{0,1,2,3}}, to_apply=%add
}, execution_thread="sparsecore"

ENTRY %main""",
        )
        .replace(
            "(bf16[4,8]{1,0}, bf16[4,8]{1,0}) collective-permute-start(%x),",
            "((bf16[4,8]{1,0}), bf16[4,8]{1,0}, s32[]) custom-call-start(%x), "
            'custom_call_target="tpu_custom_call", called_computations={%offloaded},',
        )
        .replace("collective-permute-done", "custom-call-done")
    )
    clock = play_text(text, lambda *_: Transfer(0.0, 2.0, frozenset("a")))
    first = clock.collectives[0]
    assert (first.kind, first.bytes, first.groups, first.asynchronous) == (
        "all-reduce",
        64,
        [[0, 1, 2, 3]],
        True,
    )
    assert (first.hidden, clock.exposed) == (2.0, 2.0)


def test_a_loop_counts_as_often_as_it_runs():
    text = (
        OVERLAPPED.replace("ENTRY %main", "%body").replace("ROOT %total", "%total")
        + """
ENTRY %loop (x: bf16[4,8]) -> bf16[4,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  ROOT %w = bf16[4,8]{1,0} while(%p), condition=%add, body=%body, backend_config={"known_trip_count":{"n":"5"}}
}
"""
    )
    clock = play_text(text, lambda *_: Transfer(0.0, 2.0))
    assert (clock.compute, clock.exposed) == (20.0, 10.0)
    assert [c.count for c in clock.collectives] == [5, 5]


# ---------------------------------------------------------------- interference


@pytest.mark.parametrize(
    "seconds, beside, slowed",
    [
        (3.0, 0.0, 0.0),  # nothing is sent
        (3.0, 2.0, 1.0),  # 2 s beside a transfer cost 1 s more
        (3.0, 6.0, 3.0),  # the whole instruction is slowed: it takes 6 s
        (3.0, 100.0, 3.0),
    ],
)
def test_a_transfer_slows_what_is_computed_beside_it(seconds, beside, slowed):
    product = ops.Compute("a", "", 1.0, seconds, 0.0, ops.Interference(0.5))
    assert product.slowed(beside) == slowed


def test_a_transfer_costs_a_product_a_wave_once():
    product = ops.Compute("a", "", 1.0, 3.0, 0.0, ops.Interference(0.5, 1.0))
    assert [product.slowed(beside) for beside in (0, 1, 8, 99)] == [0, 1.5, 5, 5]


def test_interference_is_a_part_of_the_step_and_of_the_picture():
    """Attention of 4 s, MLP of 2 s beside a transfer of 5 s, with half of it lost."""
    played = play_seconds(
        stack_of(5), Transfer(0.0, 5.0), interference=lambda *_: ops.Interference(0.5)
    )
    # MLP takes 4 s, of which 2 are lost; then the device waits for 1 s.
    assert (played.interference, played.exposed) == (5 * 2, 5 * 1)
    assert played.compute == 5 * (4 + 2) + 1
    assert played.step == played.compute + played.exposed + played.interference
    shown = lanes.lanes_of(played)
    assert shown.seconds == 2 * (4 + 4 + 1)
    assert [bar.end - bar.start for bar in shown.compute] == [4, 4, 4, 4]


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


def test_what_has_a_row_for_every_layer_grows_with_them_outside_loops():
    """One longer message, not several: its latency does not grow."""
    module = program(compute("a", 2), start("s"), done("s"))
    costs = ops.Costs(
        lambda instruction, _: float(instruction.cycles or 0),
        lambda size: 0.0,
        lambda kind, groups, size: Transfer(1.0, size),
        growth=lambda instruction: 8.0,
    )
    once = ops.operations(module, dataclasses.replace(costs, growth=lambda _: 1.0))
    grown = ops.operations(module, costs)
    assert [one.count for one in grown] == [one.count for one in once]
    assert grown[0].seconds == 8 * once[0].seconds
    assert grown[1].bytes == 8 * once[1].bytes
    assert grown[1].transfer == Transfer(1.0, 8.0 * once[1].bytes)
