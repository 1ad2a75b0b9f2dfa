"""Faults of every kind, and restarts: the run is the one without faults, bit for bit.

LADDER_JAX_FAULTS=200 LADDER_JAX_SEED=0 pytest -m slow tests/test_chaos.py
"""

import collections
import os

import pytest
from chaos import Chaos, differences
from fake_s3 import FakeS3


def suffer(folder, count, seed, processes):
    """Runs of `processes` with `count` faults equal one without."""
    with FakeS3() as store:
        chaos = Chaos(folder, count, seed, store, processes)
        whole = chaos.whole()
        chaos.run()
    for out in chaos.outs:
        assert differences(out, whole) == [], (out, seed)
    assert len(chaos.faults) == count
    by_kind = collections.defaultdict(list)
    for fault in chaos.faults:
        by_kind[fault.kind].append(fault.seconds)
    for kind, seconds in sorted(by_kind.items()):
        seconds.sort()
        middle = seconds[len(seconds) // 2]
        print(
            f"{kind}: {len(seconds)}, median {middle:.1f} s, most {seconds[-1]:.1f} s"
        )
    print(f"{count} faults, {len(chaos.outs)} runs of {processes} processes")


def test_some_faults(tmp_path):
    suffer(tmp_path, 5, 0, 2)


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_many_faults(tmp_path):
    count = int(os.environ.get("LADDER_JAX_FAULTS", "200"))
    suffer(tmp_path, count, int(os.environ.get("LADDER_JAX_SEED", "0")), 4)
