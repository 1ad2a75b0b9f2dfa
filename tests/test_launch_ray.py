"""launch/on_ray.py on a Ray cluster of this machine (slow; skipped without ray)."""

import os
import re
import subprocess
import sys

import pytest
from helpers import ROOT

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow

# Process 1 ends with status 7 if it is told to; the others end when they are told.
PROCESS = """\
import signal, sys, time
def end(number, frame):
    print("saved", flush=True)
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, end)
print("begins", *sys.argv[2:], flush=True)
if sys.argv[1] == "ends":
    sys.exit(0)
time.sleep(2)
if sys.argv[-1] == "1":
    sys.exit(7)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def cluster():
    """The address of a cluster of two machines, both this one."""
    from ray.cluster_utils import Cluster

    own = Cluster(initialize_head=True, head_node_args=dict(num_cpus=1))
    own.add_node(num_cpus=1)
    yield own.address
    own.shutdown()


@pytest.mark.parametrize("what, status", [("ends", 0), ("fails", 7)])
def test_the_command_runs_on_every_machine(cluster, tmp_path, what, status):
    (tmp_path / "process.py").write_text(PROCESS)
    words = ["--machines", "2", "--processes", "2", "--", sys.executable]
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "launch/on_ray.py",
            *words,
            tmp_path / "process.py",
            what,
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"RAY_ADDRESS": cluster, "RAY_DEDUP_LOGS": "0", "GRACE": "30"},
        timeout=240,
    )
    assert done.returncode == status, done.stdout + done.stderr
    started = re.findall(
        r"begins --distributed --coordinator (\S+:\d+) --processes 4 --process (\d)",
        done.stdout + done.stderr,
    )
    assert sorted(number for _, number in started) == list("0123")
    assert len({address for address, _ in started}) == 1
    if what == "fails":
        assert "saved" in done.stdout + done.stderr
