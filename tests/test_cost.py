"""The cost model of collectives: links between TPUs, and what was published of GPUs."""

import pytest
from helpers import slice_of

from ladder_jax.hardware import chips, cost
from ladder_jax.planner import calibrate, reference


def test_exchanges_take_the_links_between_chips():
    chip, network = chips.CHIPS["v5e"], slice_of("v5e", 2, 4, 1)
    near = network.collective("collective-permute", [(0, 1), (1, 0)], 45_000)
    hop_s = chip.collective_launch_s + chip.hop_latency_s
    assert near.latency_s == pytest.approx(hop_s)
    assert near.bandwidth_s == pytest.approx(1e-6) and len(near.links) == 2
    # 4 apart is two rows apart; rows 0 and 1 both send through the links between rows
    # 1 and 2
    far = network.collective(
        "collective-permute", [(i, i ^ 4) for i in range(8)], 45_000
    )
    assert far.latency_s == pytest.approx(
        chip.collective_launch_s + 2 * chip.hop_latency_s
    ) and far.bandwidth_s == pytest.approx(2e-6)
    # from the third row to the first around the ends, where there are links around them
    assert len(list(slice_of("v5p", 4, 1, 1).route(3, 0))) == 1
    assert len(list(slice_of("v5e", 4, 1, 1).route(3, 0))) == 3


def test_gpu_all_reduces_take_what_was_published():
    node = cost.Network(chips.CHIPS["h100"], [0] * 8)
    seconds = lambda n, size: (
        node.collective("all-reduce", [list(range(n))], size).seconds * 1e6
    )
    assert seconds(8, 16 * 1024) == pytest.approx(24.0, rel=0.02)  # facts: 70B, batch 1
    assert seconds(4, 16 * 1024) == pytest.approx(14.5, rel=0.02)
    assert seconds(8, 64 * 16 * 1024) == pytest.approx(31.4, rel=0.02)  # batch 64
    assert node.collective("all-reduce", [[0]], 1024).seconds == 0


# facts: vLLM pull request 42324, torch on 8 H100; 4.2: Megatron-LM pull request 5596.
MIB = 2**20
NCCL = {1: 25, 2: 37, 4: 50, 8: 76, 16: 121, 32: 195, 64: 316, 128: 561}
MULTIMEM = {0.5: 11, 1: 14, 2: 18, 4: 27, 8: 46, 16: 87, 32: 165}
GATHERS = {2: 20.2, 8: 43.4, 32: 118.9, 128: 385.3}
FAR = {256: 1681, 512: 2959, 1024: 5518}  # 16 H100 in two nodes, host-timed


@pytest.mark.parametrize(
    "kind, devices, all_reduce, published",
    [
        ("all-reduce", 8, None, NCCL),
        ("all-reduce", 8, 7.8e-6, MULTIMEM),
        ("all-gather", 8, None, GATHERS),
        ("all-reduce", 16, None, FAR),
    ],
)
def test_gpu_collectives_take_what_was_published_at_every_size(
    kind, devices, all_reduce, published
):
    nodes = [device // 8 for device in range(devices)]
    network = cost.Network(chips.CHIPS["h100"], nodes, all_reduce)
    group = [list(range(devices))]
    previous = 0.0
    for size, us in published.items():
        seconds = network.collective(kind, group, size * MIB).seconds
        assert seconds * 1e6 == pytest.approx(us, rel=0.27), f"{size} MiB"
        assert seconds > previous, "a longer message takes longer"
        previous = seconds


def test_a_product_has_half_a_wave_of_idle_cores():
    chip = chips.CHIPS["h100"]
    rate = chip.product_efficiency * chip.peak_flops
    depth, waves = 4096, 10
    whole = cost.Product(waves * 132 * 2 * 128**2 * depth, depth)
    seconds, idle_s = cost.product_seconds(chip, whole)
    assert seconds == pytest.approx((waves + 0.5) / waves * whole.flops / rate)
    assert idle_s == pytest.approx(seconds - whole.flops / rate)
    small = cost.Product(2 * 128**2 * depth, depth)  # one tile: its depth is split
    assert cost.product_seconds(chip, small)[0] == pytest.approx(
        1.5 * small.flops / rate
    )


# ---------------------------------------------------------------- published runs

# The largest error of times and of speed-ups, by table. torch.compile's prefills agree
# neither with those of the kernel nor with what an all-reduce takes.
LARGEST = {
    "fitted, prefill": (0.05, 0.06),
    "fitted, compiled prefill": (0.08, 0.10),
    "fitted, whole run": (0.05, 0.05),
    "check, whole run": (0.11, 0.05),
    "check, two nodes": (0.05, 0.06),
    "check, no NVLink": (0.0, 0.08),
}


def test_the_h100_model_is_near_what_was_published():
    for row in calibrate.rows():
        if row.table in LARGEST:
            largest = LARGEST[row.table][0 if row.unit else 1]
            assert abs(row.error) <= largest, row
    tables = {row.table for row in calibrate.rows()}
    assert tables == {*LARGEST, "check, 176B"}


def test_the_fitted_numbers_are_those_of_the_fit():
    """If this fails: python -m ladder_jax.planner.calibrate fit"""
    chip, fitted = calibrate.fit()
    row = chips.CHIPS["h100"]
    for name, value in fitted._asdict().items():
        assert getattr(reference.Fitted(), name) == pytest.approx(value, rel=0.01), name
    assert row.long_all_reduce == pytest.approx(chip.long_all_reduce, rel=0.01)
    assert row.interference == pytest.approx(chip.interference, rel=0.01)
    assert row.product_interference == pytest.approx(
        chip.product_interference, rel=0.01
    )


@pytest.mark.parametrize("batch", [1, 4, 16, 64])
def test_a_fit_predicts_a_batch_that_it_has_not_seen(batch):
    case = f"70B, batch {batch}"
    unseen = [row for row in calibrate.rows(*calibrate.fit([case])) if row.case == case]
    assert unseen
    for row in unseen:
        assert abs(row.error) < 0.1, row


def test_a_gpus_bytes_leave_its_node_through_its_own_link():
    """Eight groups with one GPU in each node share no link, and each has one."""
    network = cost.Network(chips.CHIPS["h100"], [device // 8 for device in range(64)])
    rail = [list(range(0, 64, 8))]
    size = 1e9
    seconds = network.collective("all-reduce", rail, size).seconds
    assert seconds == pytest.approx(2 * 7 / 8 * size / 50e9, rel=0.01)
    assert network.collective("all-gather", rail, size).seconds == pytest.approx(
        seconds / 2, rel=0.01
    )
    whole = network.collective("all-reduce", [list(range(64))], size).seconds
    assert whole < seconds / 5
