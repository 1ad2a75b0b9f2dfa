"""What a run is: run.json in its folder, with an entry for every start of the run.

An entry has all that decides on the run's numbers: configuration, command, code,
versions, hosts, devices, mesh, seed. It has no variables of the environment, and no
user names and passwords of addresses.
"""

import datetime
import hashlib
import json
import logging
import os
import platform
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from ladder_jax import files
from ladder_jax.config import Config, to_dict
from ladder_jax.hardware import chips
from ladder_jax.hardware.distributed import version

FILE = "run.json"
PACKAGES = ("ladder_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")
GIT_S = 20.0  # the most seconds that git may take
HOST_BYTES = 64  # of a host's name, as processes exchange it
log = logging.getLogger(__name__)

Start = dict[str, Any]


def record(
    out: Path, config: Config, mesh: jax.sharding.Mesh, step: int, peak: float | None
) -> None:
    """Adds an entry for a start at `step`. All processes of a run call this at once.

    peak: FLOP/s of all devices; None: unknown.
    Raises OSError where the file cannot be written.
    """
    hosts = host_names()
    if jax.process_index():
        return
    start = dict(
        time=now(),
        step=step,
        command=shlex.join(sys.argv),
        code=code(),
        versions={name: version(name) for name in PACKAGES},
        python=platform.python_version(),
        hosts=hosts,
        processes=jax.process_count(),
        devices=describe(mesh, peak),
        mesh=dict(mesh.shape),
        seed=config.train.seed,
        config=to_dict(config),
    )
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dict(starts=[*read(out), start]), indent=1) + "\n"
    files.write_text(out / FILE, without_credentials(text))


def read(out: str | Path) -> list[Start]:
    """The entries of a run's folder, oldest first; none where there is no such file.

    A file that is not as `record` writes it counts as none, with a warning.
    """
    path = Path(out) / FILE
    if not path.is_file():
        return []
    try:
        starts = json.loads(path.read_text(encoding="utf-8"))["starts"]
        if all(isinstance(s["config"], dict) and "time" in s for s in starts):
            return list(starts)
    except (ValueError, KeyError, TypeError):
        pass
    log.warning("%s cannot be read: it is left out", path)
    return []


def now() -> str:
    """The time in UTC, such as 2026-11-27T22:30:00+00:00."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def without_credentials(text: str) -> str:
    """`text` without the user name and password of addresses: s3://me:secret@host."""
    return re.sub(r"(://)[^/@\s\"']+@", r"\1***@", text)


def host_names() -> list[str]:
    """The name of each process's host, in the order of the processes."""
    name = socket.gethostname()
    if jax.process_count() == 1:
        return [name]
    own = np.zeros(HOST_BYTES, np.uint8)
    letters = np.frombuffer(name.encode()[:HOST_BYTES], np.uint8)
    own[: len(letters)] = letters
    rows = np.asarray(multihost_utils.process_allgather(own))
    return [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in rows]


def describe(mesh: jax.sharding.Mesh, peak: float | None) -> dict[str, Any]:
    """A mesh's devices: their kind, name in chips.CHIPS, number and peak in FLOP/s."""
    device = mesh.devices.flat[0]
    chip = chips.kind_of(device)
    return dict(
        kind=device.device_kind,
        chip=chip,
        target=target_of(list(mesh.devices.flat), chip),
        count=mesh.size,
        peak_flops=peak,
    )


def target_of(devices: list[Any], chip: str | None) -> str | None:
    """The planner's name of these devices, such as v5e:2x4; None: it has none."""
    sides = chips.CHIPS[chip].target_sides if chip else 0
    if not chip or not sides:
        return None
    if chips.CHIPS[chip].is_tpu:
        places = {tuple(device.coords)[:sides] for device in devices}
        shape = [len({place[side] for place in places}) for side in range(sides)]
        whole = int(np.prod(shape)) == len(places)
    else:
        nodes = len({device.process_index for device in devices})
        # Under Slurm, each GPU has a process: their nodes cannot be told from here.
        shape, whole = [nodes, len(devices) // nodes], nodes == 1
    return f"{chip}:{'x'.join(map(str, shape))}" if whole else None


def code() -> dict[str, str | None]:
    """The version of the code that runs.

    commit: that of its git checkout, None without one. changes: a digest of the
    checkout's local changes, None without changes. source: a digest of the package's
    Python files.
    """
    package = Path(__file__).parent
    found: dict[str, str | None] = dict(commit=None, changes=None)
    # The package may also be installed somewhere inside another checkout.
    if _git(package, "ls-files", "--", "*.py"):
        commit = _git(package, "rev-parse", "HEAD")
        status = _git(package, "status", "--porcelain")
        found["commit"] = commit.decode().strip() if commit else None
        if status:
            difference = _git(package, "diff", "HEAD", "--binary", "--no-ext-diff")
            found["changes"] = hashlib.sha256(status + (difference or b"")).hexdigest()
    return found | dict(source=source_digest())


def source_digest() -> str:
    """A hash of the package's Python files."""
    digest, package = hashlib.sha256(), Path(__file__).parent
    for path in sorted(package.rglob("*.py")):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(package)} {size}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _git(folder: Path, *words: str) -> bytes | None:
    """The output of a git command; None where git fails, is missing, or is slow."""
    try:
        return subprocess.run(
            ["git", "-C", str(folder), *words],
            capture_output=True,
            check=True,
            timeout=GIT_S,
            stdin=subprocess.DEVNULL,
            env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def find(path: str | Path) -> list[Start]:
    """The entries of the run that a path is in: its folder, checkpoints, or a step."""
    place = Path(path).expanduser().absolute()
    folders = [place, *place.parents][:3]
    return next((starts for folder in folders if (starts := read(folder))), [])


def lines(starts: list[Start]) -> list[str]:
    """The newest entry as lines for a terminal, and when the run started."""
    if not starts:
        return []
    last = starts[-1]
    made, devices = last["code"], last["devices"]
    when = starts[0]["time"]
    if len(starts) > 1:
        when += (
            f", {len(starts)} starts, the last {last['time']} at step {last['step']}"
        )
    commit = made["commit"] or f"no git; sources {made['source'][:12]}"
    changes = f" with changes {made['changes'][:12]}" if made["changes"] else ""
    versions = [f"{name} {text}" for name, text in last["versions"].items() if text]
    axes = " x ".join(f"{axis}={size}" for axis, size in last["mesh"].items())
    return [
        f"started       {when}",
        f"command       {last['command']}",
        f"code          {commit}{changes}",
        f"versions      {', '.join([*versions, 'Python ' + last['python']])}",
        f"ran on        {devices['count']} x {devices['kind']}, mesh {axes}, "
        f"{last['processes']} processes on {len(set(last['hosts']))} hosts, "
        f"seed {last['seed']}",
    ]
