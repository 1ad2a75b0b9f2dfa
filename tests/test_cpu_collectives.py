"""Emulated devices have threads enough for their collectives: no deadlock."""

import os
import subprocess
import sys

from helpers import code_environment

from ladder_jax.hardware import distributed

SCRIPT = """
from ladder_jax.hardware import distributed

distributed.emulate(4)
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from ladder_jax import sharding
from ladder_jax.config import Mesh

mesh = sharding.make_mesh(Mesh(data=2, fsdp=1, tensor=2))
SETS = (sharding.DATA, sharding.TENSOR, (sharding.DATA, sharding.TENSOR))

def in_turn(x):
    y = x
    for i in range(4):
        y = lax.psum(jnp.tanh(y @ x), SETS[i % 2])
    return jnp.tanh(y)

# Sums that do not depend on each other, which XLA does not merge.
def independent(x):
    sums = [lax.psum(jnp.tanh(x @ x + i), SETS[i % 3]) for i in range(9)]
    return jnp.tanh(sum(sums))

x = jnp.ones((64, 64))
for step in (in_turn, independent):
    mapped = sharding.shard_map(step, mesh, (P(),), P())
    options = dict(xla_disable_hlo_passes="all-reduce-combiner")
    run = jax.jit(mapped, compiler_options=options)
    for _ in range(25):
        y = x
        for _ in range(40):  # each needs the one before, and is called before its end
            y = run(y)
        y.block_until_ready()
print("done")
"""


def test_steps_that_wait_for_others_leave_threads_to_them():
    """With XLA's default, 4 threads, the steps deadlocked within 1,000 calls."""
    environment = code_environment()
    for name in distributed.THREAD_VARIABLES:
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and done.stdout == "done\n", done.stderr


def test_a_user_decides_on_the_threads(monkeypatch):
    for name in ("XLA_FLAGS", "JAX_PLATFORMS", *distributed.THREAD_VARIABLES):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    distributed.emulate(1)
    assert "PJRT_NPROC" not in os.environ
    distributed.emulate(8)
    assert os.environ.pop("PJRT_NPROC") == "32"
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=6 --other")
    distributed.emulate(None)
    assert os.environ.pop("PJRT_NPROC") == "24"
    monkeypatch.setenv("NPROC", "3")
    distributed.emulate(8)
    assert "PJRT_NPROC" not in os.environ
