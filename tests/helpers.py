"""What several test files need: meshes, parameters, and processes that form one run."""

import math
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ladder_jax import config, model, sharding


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1) -> jax.sharding.Mesh:
    """A mesh of the first data x fsdp x tensor devices."""
    sizes = data, fsdp, tensor
    return sharding.make_mesh(config.Mesh(*sizes), jax.devices()[: math.prod(sizes)])


def random_parameters(
    model_config: config.Model,
    mesh: jax.sharding.Mesh | None = None,
    scale: float = 0.3,
    seed: int = 0,
) -> model.Transformer:
    """Random parameters on `mesh` (None: on the first device). None of them is zero.

    Norms are around 1 and all others around 0, with a standard deviation of `scale`.
    """
    abstract = model.abstract(model_config)
    random = np.random.default_rng(seed)

    def draw(name: str, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        normal = scale * random.normal(size=leaf.shape)
        return np.float32(name.endswith("norm") + normal)

    values = jax.tree.map(draw, sharding.parameter_names(abstract), abstract)
    if mesh is None:
        return jax.device_put(values, jax.devices()[0])
    specs = sharding.parameter_specs(abstract)
    return jax.device_put(values, sharding.named_shardings(mesh, specs))


def free_address() -> str:
    """A localhost:PORT that no process listens on."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def run_together(
    commands: Sequence[Sequence[object]],
    environment: Mapping[str, str],
    act: Callable[[list[subprocess.Popen]], None] = lambda children: None,
    **options: Any,
) -> list[tuple[str, str, int]]:
    """(stdout, stderr, status) of each of `commands`, which run at the same time.

    `act` gets the processes once they are started. All are dead when this returns.
    """
    children = [
        subprocess.Popen(
            list(map(str, command)),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )
        for command in commands
    ]
    try:
        act(children)
        return [
            (*child.communicate(timeout=400), child.returncode) for child in children
        ]
    finally:
        for child in children:
            child.kill()
