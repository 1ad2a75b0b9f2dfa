"""What the processes of a run compare before it starts, and again with its data.

A run whose processes differ in a setting, in the code or in the data would train a
wrong model without an error: each process computes its own part of one program.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import platform
import time
import uuid
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax import lax
from jax.sharding import PartitionSpec as P

from ladder_jax import identity, mirror, sharding
from ladder_jax.addresses import is_address, local_path
from ladder_jax.checkpoint import saved_steps
from ladder_jax.config import Config, ConfigError, to_dict
from ladder_jax.data import sources
from ladder_jax.data.formats import Tally
from ladder_jax.hardware.distributed import version
from ladder_jax.hardware.group import Group

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
# Environment variables that change what XLA compiles or how it communicates.
VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NCCL_ALGO", "NCCL_PROTO")
# Words of XLA_FLAGS that may differ: where XLA writes what it has compiled.
OWN_WORDS = ("--xla_dump",)
# Seconds until a network file system shows another host's new file.
FILE_PATIENCE = 10.0


def settings(config: Config, resume: bool) -> dict[str, str]:
    """What must be the same in all processes before anything is read, by name."""
    values = {
        f"{section}.{name}": repr(value)
        for section, fields in to_dict(config).items()
        for name, value in fields.items()
    }
    values["--resume"] = repr(resume)
    values["Python"] = platform.python_version()
    values |= {name: version(name) or "not installed" for name in PACKAGES}
    values["the code of ladder_jax"] = identity.source_digest()[:12]
    for name in VARIABLES:
        words = os.environ.get(name, "").split()
        kept = [word for word in words if not word.startswith(OWN_WORDS)]
        values[name] = " ".join(kept) or "not set"
    devices = jax.local_devices()
    kinds = sorted({device.device_kind for device in devices})
    values["the devices"] = f"{len(devices)} x {', '.join(kinds)}"
    return values


def start(group: Group, config: Config, resume: bool) -> None:
    """Returns once all processes have the same settings and files, share the folders of
    the run, and have computed a sum together.

    Raises ConfigError, the same line in all processes.
    """
    group.together("settings", lambda: settings(config, resume), dict)
    group.together("data.source", lambda: source_files(config.data.source), dict)
    field = "train.work_dir" if is_address(config.train.out) else "train.out"
    check_shared(group, epath.Path(mirror.work_folder(config.train)), field)
    cache = epath.Path(local_path(config.data.token_cache, "data.token_cache"))
    try:
        check_shared(group, cache, "data.token_cache")
    except ConfigError as error:  # the run would be right, but slow to start
        if group.number == 0:
            group.say(f"warning: {error}: each host makes the tokens for itself")
    mesh = group.together("mesh", lambda: sharding.make_mesh(config.mesh))
    connect(group, mesh)


def source_files(source: str) -> dict[str, str]:
    """How many files and bytes this process sees in data.source, if it is a path."""
    if is_address(source):
        return {}
    if "://" in source:  # file://
        source = str(local_path(source, "data.source"))
    files = sources.files(source, Tally())
    size = sum(sources.size_and_time(file)[0] for file in files)
    return {"data.source": f"{len(files)} files of {size:,} bytes"}


def contents(config: Config, meta: Mapping[str, object]) -> dict[str, str]:
    """What must be the same in all processes once the data is read, by name.

    meta: that of the run's checkpoints.
    """
    text = json.dumps(meta["tokenizer"], sort_keys=True)
    out = mirror.work_folder(config.train)
    return {
        "data.tokenizer's contents": hashlib.sha256(text.encode()).hexdigest()[:12],
        "data.source's contents": str(meta["documents"]),
        "train.out's checkpoints": str(saved_steps(out / "checkpoints")),
        "the model": json.dumps(dataclasses.asdict(config.model), sort_keys=True),
    }


def check_shared(group: Group, folder: epath.Path, field: str) -> None:
    """Checks that `folder`, which `field` names, is one folder for all processes.

    Process 0 writes a file there, and the others must see it.
    """
    # A name that no host has looked up before.
    token = group.from_first("a name", lambda: uuid.uuid4().hex)
    file = folder / f".seen-by-all-{token}"
    made: list[epath.Path] = []

    def write() -> None:
        if group.number == 0:
            paths = (folder, *folder.parents)
            made.extend(itertools.takewhile(lambda path: not path.exists(), paths))
            try:
                folder.mkdir(parents=True, exist_ok=True)
                file.write_text(group.who)
            except OSError as error:
                reason = error.strerror or error
                raise ConfigError(
                    f"{field}={str(folder)!r} cannot be written ({reason})"
                ) from None

    def see() -> None:
        if not _appears(file):
            raise ConfigError(
                f"{field}={str(folder)!r} is not the folder that process 0 has: it "
                "must be on a file system that all hosts share"
            )

    try:
        group.together(f"a file in {field}", write)
        group.together(f"the same file in {field}", see)
    finally:
        if group.number == 0:
            _remove(file, made)


def _appears(path: epath.Path) -> bool:
    end = time.monotonic() + FILE_PATIENCE
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.5)
    return True


def _remove(file: epath.Path, made: list[epath.Path]) -> None:
    """Removes the file, and the folders that were made for it."""
    try:
        file.unlink(missing_ok=True)
        for folder in made:
            folder.rmdir()
    except OSError:  # another process has put something there
        pass


def connect(group: Group, mesh: jax.sharding.Mesh) -> None:
    """Sums a number over every set of mesh axes, once all processes are ready for it.

    Gloo, the library of collectives between CPUs, waits 30 s for the others in the
    first collective of a set of devices, and then fails. Later ones wait for ever.
    """
    axes = [axis for axis, size in mesh.shape.items() if size > 1]
    sets = [
        some
        for count in range(1, len(axes) + 1)
        for some in itertools.combinations(axes, count)
    ]

    def program(some: tuple[str, ...]) -> Any:
        def local(x: jax.Array) -> jax.Array:
            return lax.psum(x + lax.axis_index(some), some)

        summed = sharding.shard_map(local, mesh, (sharding.REPLICATED,), P())
        return jax.jit(summed).lower(np.float32(0)).compile()

    programs = [program(some) for some in sets]
    group.wait_for_all("the first sum over all devices")
    for run in programs:
        jax.block_until_ready(run(np.float32(0)))
