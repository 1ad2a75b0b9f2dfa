"""The cost model of collectives: links between TPUs, and what was published of GPUs."""

import pytest
from helpers import slice_of

from ladder_jax.hardware import chips, cost
from ladder_jax.planner import calibrate


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


def test_the_h100_model_is_near_what_was_published():
    errors = {}
    for row in calibrate.rows():
        errors.setdefault(row.table, []).append(abs(row.error))
    for table, values in errors.items():
        assert sum(values) / len(values) < 0.07, (
            f"{table}: run python -m ladder_jax.planner.calibrate"
        )
    ladder = [
        abs(row.error)
        for row in calibrate.rows()
        if row.table.startswith("cal") and row.schedule == "ladder"
    ]
    assert max(ladder) < 0.1
