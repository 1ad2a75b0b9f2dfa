"""Runs a command on the machines of a Ray cluster, as processes of one run.

From the repository, on a cluster whose machines have ladder_jax installed (KubeRay: the
image of launch/Dockerfile with ray) and see the same disk:

    ray job submit --working-dir . -- launch/again.sh python launch/on_ray.py \
        --machines 4 --gpus 8 -- ladder-jax train configs/scratch_1b.py --resume

Each machine runs launch/local.sh with a process for each of its GPUs. If one machine
fails, the others end, and the status is that of the first that failed; 75 if a machine
was lost. `ray job stop` ends all: they save first.

Needs ray[default]. GRACE: seconds between SIGTERM and SIGKILL (default 600).
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import ray
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

LOCAL = Path(__file__).resolve().parent / "local.sh"
LOST = 75  # of a run that should start again


@ray.remote(num_cpus=0)
def free_address() -> str:
    """HOST:PORT of this machine, for process 0."""
    with socket.create_server(("", 0)) as server:
        return f"{ray.util.get_node_ip_address()}:{server.getsockname()[1]}"


@ray.remote(max_retries=0)
def run(script: str, count: int, command: list[str], **variables: str) -> int:
    """Runs `count` processes on this machine. Returns the exit status of local.sh."""
    child = subprocess.Popen(
        ["bash", script, str(count), "--", *command], env=os.environ | variables
    )
    try:
        # ray.cancel raises KeyboardInterrupt between two calls, and interrupts none.
        while child.poll() is None:
            time.sleep(0.2)
        return child.returncode
    finally:
        child.terminate()
        try:
            child.wait(float(os.environ.get("GRACE", 600)))
        except subprocess.TimeoutExpired:
            child.kill()


def main() -> int:
    """Starts the command on all machines, and returns the exit status."""
    parser = argparse.ArgumentParser(usage="on_ray.py [options] -- COMMAND")
    parser.add_argument("--machines", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=0, help="of each machine")
    parser.add_argument("--cpus", type=int, default=1, help="reserved on each machine")
    parser.add_argument("--processes", type=int, help="on each machine: one a GPU")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    command = options.command[1:]
    if options.command[:1] != ["--"] or not command:
        parser.error("missing: -- COMMAND")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))

    ray.init()
    bundle = {"CPU": options.cpus} | ({"GPU": options.gpus} if options.gpus else {})
    group = placement_group([bundle] * options.machines, strategy="STRICT_SPREAD")
    ray.get(group.ready())
    places = [
        PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=i)
        for i in range(options.machines)
    ]
    coordinator = ray.get(free_address.options(scheduling_strategy=places[0]).remote())
    count = options.processes or options.gpus or 1
    tasks = [
        run.options(
            num_cpus=options.cpus, num_gpus=options.gpus, scheduling_strategy=place
        ).remote(
            str(LOCAL),
            count,
            command,
            NODES=str(options.machines),
            NODE=str(i),
            COORDINATOR=coordinator,
        )
        for i, place in enumerate(places)
    ]
    return first_failure(tasks)


def first_failure(tasks: list[ray.ObjectRef]) -> int:
    """Waits for all; after a failure, ends the others. Returns its status, or 0."""
    left = list(tasks)
    try:
        while left:
            (done,), left = ray.wait(left)
            try:
                status = ray.get(done)
            except ray.exceptions.RayError as error:
                print(f"on_ray.py: a machine was lost: {error}", file=sys.stderr)
                status = LOST
            if status:
                return status
        return 0
    finally:
        for task in left:
            ray.cancel(task)
        if left:
            ray.wait(left, num_returns=len(left))


if __name__ == "__main__":
    sys.exit(main())
