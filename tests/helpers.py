"""Small models, meshes, parameters, engines and processes for several test files."""

import contextlib
import dataclasses
import functools
import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from ladder_jax import config, generate, model, sharding
from ladder_jax.data.tokenizer import ByteTokenizer
from ladder_jax.hardware import chips, compile_cache, cost, xla_options
from ladder_jax.saving import Checkpoints
from ladder_jax.serve.engine import Engine

ROOT = Path(__file__).parents[1]
# Options with which XLA:CPU compiles in a sixth of the time, to slower programs. jax
# 0.12 does not have the second one any more.
FAST: dict[str, Any] = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 11):
    FAST |= {"xla_cpu_use_fusion_emitters": False}
FAST_FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in FAST.items())
COMMAND = [sys.executable, "-c", "from ladder_jax.cli import main; main()"]


@contextlib.contextmanager
def own_compile_cache() -> Iterator[None]:
    """Inside, JAX has no compile cache; afterwards its settings are as before."""
    names = [
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    ]
    before = {name: getattr(jax.config, name) for name in names}
    compile_cache.use("none")
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compile_cache.reset()


@contextlib.contextmanager
def fast_compilation() -> Iterator[None]:
    """Inside, XLA:CPU compiles the package's programs, and those of tests, with FAST.

    Their results may differ in the last bit. Programs that JAX has compiled before stay
    as they are.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=FAST))
        patch.setitem(xla_options.OPTIONS, "cpu", xla_options.OPTIONS["cpu"] | FAST)
        yield


# ---------------------------------------------------------------- models, meshes

BIASES = dict(qkv_bias=True, out_bias=True, mlp_bias=True)  # fields of config.Model


def small_model(residual: str = "standard", **fields: Any) -> config.Model:
    """A float32 model that 8 tensor shards divide; `fields` replace its own.

    16 query heads share 8 key-value heads.
    """
    sizes = dict(dim=16, layers=2, heads=16, kv_heads=8, head_dim=4, ffn_dim=16)
    own = dict(vocab_size=32, **sizes, dtype="float32")
    return config.Model(residual=residual, **own | fields)


@functools.cache
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
    """Random parameters on `mesh`; without one, NumPy arrays. None is zero.

    NumPy arrays reach the devices of a mesh without a compiled program for each shape.
    Norms are around 1 and all others around 0, with a standard deviation of `scale`.
    """
    abstract = model.abstract(model_config)
    random = np.random.default_rng(seed)

    def draw(name: str, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        normal = scale * random.normal(size=leaf.shape)
        return np.float32(name.endswith("norm") + normal)

    values = jax.tree.map(draw, sharding.parameter_names(abstract), abstract)
    if mesh is None:
        return values
    specs = sharding.parameter_specs(abstract)
    return jax.device_put(values, sharding.named_shardings(mesh, specs))


@functools.cache
def initial_parameters(
    model_config: config.Model, mesh: jax.sharding.Mesh
) -> model.Transformer:
    """What `model.init` draws from key 0, on `mesh`."""
    specs = sharding.parameter_specs(model.abstract(model_config))
    init = functools.partial(model.init, model_config)
    shardings = sharding.named_shardings(mesh, specs)
    return jax.jit(init, out_shardings=shardings)(jax.random.key(0))


def slice_of(kind: str, *sides: int) -> cost.Network:
    """The network of a TPU slice: devices in the order in which JAX lists them."""
    places = [tuple(reversed(place)) for place in np.ndindex(sides[::-1])]
    return cost.Network(chips.CHIPS[kind], places)


# ---------------------------------------------------------------- engines

ENGINE_MODEL = config.Model(
    vocab_size=264,
    dim=32,
    layers=2,
    heads=8,
    kv_heads=8,
    head_dim=4,
    ffn_dim=48,
    residual="ladder",
    dtype="float32",
    max_length=64,
    init_std=0.3,
)
ENGINE_OPTIONS = config.Decode(
    slots=3,
    staging=2,
    steps_per_call=4,
    burst_ms=0,  # so that no test depends on the clock
    prefill_budget=16,
    max_length=64,
    fit_shapes=False,
    max_logprobs=3,
    max_stop_ids=2,
    max_logit_bias=2,
    kv_layout="pages",
)


def make_engine(
    model_config: config.Model = ENGINE_MODEL, tensor: int = 1, **options: Any
) -> Engine:
    """An engine with `initial_parameters`.

    `options` are arguments of `Engine` and fields of `config.Decode`; the latter
    replace those of ENGINE_OPTIONS.
    """
    names = [field.name for field in dataclasses.fields(config.Decode)]
    fields = {name: options.pop(name) for name in names if name in options}
    mesh = make_mesh(tensor=tensor)
    return Engine(
        initial_parameters(model_config, mesh),
        model_config,
        mesh,
        options=dataclasses.replace(ENGINE_OPTIONS, **fields),
        **options,
    )


def write_engine_checkpoint(folder: Path, **fields: Any) -> Path:
    """Writes a run with `initial_parameters` of ENGINE_MODEL; returns its folder.

    It reads bytes. `fields` replace those of the model.
    """
    model_config = dataclasses.replace(ENGINE_MODEL, **fields)
    parameters = initial_parameters(model_config, make_mesh())
    train = config.Train(seq_len=model_config.max_length)
    meta = dict(
        config=config.to_dict(config.Config(model_config, train=train)),
        tensor=1,
        tokenizer=ByteTokenizer().to_json(),
    )
    with Checkpoints(folder / "checkpoints", 1) as run:
        run.save(1, dict(model=parameters), None, meta)
    return folder


@functools.cache
def _longest_tokens(
    model_config: config.Model, tensor: int, prompt: tuple[int, ...], options: str
) -> list[int]:
    """As many tokens as fit, so that few shapes are compiled. `options`: JSON text.

    A request with fewer max_tokens has the beginning of them.
    """
    mesh = make_mesh(tensor=tensor)
    tokens = generate.generate(
        initial_parameters(model_config, mesh),
        model_config,
        mesh,
        prompt,
        max_tokens=model_config.max_length - len(prompt),
        **json.loads(options),
    )
    return list(tokens)


def tokens_alone(
    prompt: Iterable[int],
    model_config: config.Model = ENGINE_MODEL,
    tensor: int = 1,
    stop_token_ids: Sequence[int] = (),
    max_tokens: int = 16,
    **options: Any,
) -> list[int]:
    """The tokens that `generate` gives for one request, which an engine must match."""
    text = json.dumps(options, sort_keys=True)  # for the key of the cache
    tokens = _longest_tokens(model_config, tensor, tuple(prompt), text)[:max_tokens]
    stops = [i for i, token in enumerate(tokens) if token in stop_token_ids]
    return tokens[: stops[0]] if stops else tokens


def make_requests(
    count: int, seed: int = 0, longest: int = 40
) -> list[tuple[list[int], dict[str, Any]]]:
    """(prompt, options) of `count` requests, which sample in six different ways."""
    rng = np.random.default_rng(seed)
    kinds: list[dict[str, Any]] = [
        dict(),
        dict(temperature=1.0),
        dict(temperature=0.8, top_k=7),
        dict(temperature=1.1, top_p=0.7),
        dict(repetition_penalty=1.4, presence_penalty=0.3, frequency_penalty=0.2),
        dict(temperature=1.0, min_p=0.1, logit_bias={5: 4.0, 9: -3.0}),
    ]
    requests = []
    for i in range(count):
        prompt = rng.integers(0, 264, rng.integers(1, longest)).tolist()
        options = dict(max_tokens=int(rng.integers(1, 25)), seed=i)
        requests.append((prompt, kinds[i % len(kinds)] | options))
    return requests


# ---------------------------------------------------------------- text


def text_after(tok: Any, prompt: Sequence[int], ids: Sequence[int]) -> str:
    """What `ids` add to the text of `prompt`, by decoding the bytes of both at once.

    If the prompt ends inside a character and `ids` do not go on with it, its U+FFFD
    belongs to the prompt's text.
    """
    data, previous, length = b"", None, 0
    for i, token in enumerate([*prompt, *ids]):
        new = tok.token_bytes(token, previous)
        if new is not None:
            data, previous = data + new, token
        if i < len(prompt):
            length = len(data)
    endings = [data[max(length - n, 0) : length] for n in (3, 2, 1)]
    half = next((ending for ending in endings if begins_character(ending)), b"")
    before = data[: length - len(half)].decode("utf-8", "replace")
    text = data.decode("utf-8", "replace").removeprefix(before)
    goes_on = length < len(data) and begins_character(
        half + data[length : length + 1], whole=True
    )
    return text[1:] if half and not goes_on else text


def begins_character(data: bytes, whole: bool = False) -> bool:
    """Whether these bytes begin a character of UTF-8. `whole`: or are one."""
    endings = [b"", b"\x80", b"\xbf", b"\x80\x80", b"\xbf\x80", b"\x80" * 3]
    endings.append(b"\xbf\x80\x80")
    for ending in endings[0 if whole else 1 :]:
        try:
            if data and len((data + ending).decode()) == 1:
                return True
        except UnicodeDecodeError:
            pass
    return False


# ---------------------------------------------------------------- processes


def write_files(folder: Path, contents: Mapping[str, str | bytes]) -> Path:
    """Writes files, {name: content}, into a folder; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(
            content if isinstance(content, bytes) else content.encode()
        )
    return folder


def write_rows(path: Path, rows: Iterable[Any]) -> Path:
    """Writes rows as JSON Lines; returns the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def free_address() -> str:
    """A localhost:PORT that no process listens on."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def code_environment(devices: int | None = None, fast: bool = True) -> dict[str, str]:
    """The environment of a process that imports ladder_jax and has CPUs as `devices`.

    None: JAX's default, one device. fast: whether XLA compiles with FAST.
    """
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    flags = [FAST_FLAGS] if fast else []
    if devices is not None:
        flags.append(f"--xla_force_host_platform_device_count={devices}")
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "XLA_FLAGS": " ".join(flags),
    }


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
