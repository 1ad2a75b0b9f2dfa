"""Reads checkpoints (Orbax v1): all that training needs to resume, a folder a step.

    <folder>/<step>/model/       parameters by plain names, such as layers/attention/wq
                    optimizer/   optimizer state, named in the same way
                    meta/        JSON: configuration, tokenizer, versions, and the
                                 position of the data: batches taken by all processes

A step takes the same rows from the corpus whatever the number of processes, so that one
position serves any number of them.

saving.py writes them. Arrays load onto any mesh. Plain Orbax opens them too, as NumPy
arrays on any machine: see notebooks/checkpoint.ipynb.
"""

import contextlib
import gc
import hashlib
import importlib.metadata
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
from etils import epath
from etils.epath import Path
from flax.traverse_util import flatten_dict, unflatten_dict
from orbax.checkpoint import v1 as ocp

from ladder_jax import addresses, storage
from ladder_jax.checkpoint_arrays import differences, misfit, shapes
from ladder_jax.config import ConfigError, require
from ladder_jax.interrupts import check_interrupted
from ladder_jax.orbax_output import silent
from ladder_jax.stored_arrays import StoredArray, open_arrays

# The version of the file format. It rises when older versions of ladder_jax cannot read
# new checkpoints.
FORMAT = 1
VERSION = next(
    (
        package.version
        for package in importlib.metadata.distributions(name="ladder_jax")
    ),
    "not installed",
)
PATTERNS = "*?[\\"  # the special characters of file patterns: `require_plain_name`
META = "/".join(storage.META)  # the file of a checkpoint's JSON
OLD_POSITION = "data"  # a part of checkpoints that older versions saved
READ_BYTES = 1 << 30  # of arrays that are read at one time
log = logging.getLogger(__name__)

Meta = dict[str, Any]
T = TypeVar("T")


class Damaged(Exception):
    """The checkpoint's files cannot be read. Readers then try an older checkpoint."""


def require_plain_name(folder: epath.PathLike, name: str = "folder") -> None:
    """Raises ConfigError where Orbax cannot save into `folder`, whose field is `name`.

    Orbax puts the folder's path into file patterns. A path with a pattern's special
    characters would make it miss parts of a save, or read those of another folder.
    """
    path = str(absolute(folder))
    accepted = f"a path without any of {' '.join(PATTERNS)} ({path})"
    require(not set(path) & set(PATTERNS), name, str(folder), accepted)


def read_meta(path: epath.PathLike, step: int | None = None) -> Meta:
    """Reads a checkpoint's JSON, without its arrays.

    Returns a dict with format, ladder_jax, parts, config and tokenizer. `path`, `step`
    and the ValueError are those of `load_model`.
    """
    return find(path, step)[1]


def find(path: epath.PathLike, step: int | None = None) -> tuple[Path, Meta]:
    """(the folder, the JSON) of the newest checkpoint that can be read.

    `path`, `step` and the ValueError are those of `load_model`.
    """
    return newest(_find(path, step), _meta)


def read_arrays(
    path: epath.PathLike, step: int | None = None
) -> tuple[int | None, Meta, dict[str, dict[str, Any]]]:
    """Describes a checkpoint's arrays, without reading them.

    Returns (step, meta, arrays): {part: {name: metadata}}, where metadata has shape,
    dtype and sharding_metadata, that of the run that saved it. The step is None where
    the folder's name is no number. `path`, `step` and the ValueError are those of
    `load_model`.
    """

    def read(path: Path) -> tuple[Meta, dict[str, dict[str, Any]]]:
        meta, arrays = _meta(path), {}
        for part in meta["parts"]:
            if part == OLD_POSITION:  # no array
                continue
            with _reading(part):
                saved = ocp.metadata(path, checkpointable_name=part).metadata
                if saved is None:  # Orbax logs the reason and returns None
                    raise ValueError("the description of the arrays cannot be read")
                arrays[part] = flatten_dict(saved, sep="/")
        return meta, arrays

    where, (meta, arrays) = newest(_find(path, step), read)
    return int(where.name) if where.name.isdigit() else None, meta, arrays


def load_model(
    path: epath.PathLike, abstract_model: Any, step: int | None = None
) -> Any:
    """Loads only the parameters of the newest checkpoint that can be read.

    Args:
      path: a run's folder, its checkpoints folder, or the folder of one step.
      abstract_model: the model with leaves that have shape, dtype and sharding
        (jax.ShapeDtypeStruct; without a sharding: on the first device), on any mesh.
        Floating-point parameters are cast to these dtypes.
      step: the only step to load; None: the newest.

    Raises ValueError when there is no such checkpoint, none can be read, or it is of
    another model.
    """
    state, _ = newest(
        _find(path, step),
        lambda path: load(path, {"model": abstract_model}, cast=True),
    )[1]
    return state["model"]


def open_model(
    path: epath.PathLike, abstract_model: Any, step: int | None = None
) -> tuple[Path, dict[str, StoredArray]]:
    """Opens the parameters that `load_model` would load, and reads none of them.

    Returns (the checkpoint's folder, its arrays by names such as layers/mlp/gate).
    `path`, `step` and the ValueError are those of `load_model`; shardings do not
    matter.
    """

    def read(path: Path) -> dict[str, StoredArray]:
        check_arrays(path, {"model": shapes(abstract_model)}, cast=True)
        with _reading("model"):
            return open_arrays(path / "model")

    return newest(_find(path, step), read)


def fingerprint(folder: Path) -> str:
    """A digest that another save's folder does not have, even of equal arrays.

    It is that of the small files which name the parameters' files: their names are
    random.
    """
    digest = hashlib.sha256()
    for file in ("model/manifest.ocdbt", META):
        digest.update((folder / file).read_bytes())
    return digest.hexdigest()


def saved_steps(folder: epath.PathLike) -> list[int]:
    """The steps of all complete checkpoints in `folder`, ascending.

    The list is empty if there is no such folder.
    """
    with silent(Damaged):
        names = ocp.path.step.standard_name_format()
        return sorted(entry.step for entry in names.find_all(absolute(folder)))


# ---------------------------------------------------------------- paths


def absolute(path: epath.PathLike) -> Path:
    if not addresses.is_address(path):
        return Path(addresses.local_path(path, "path").resolve())
    return epath.Path(path)


def _find(path: epath.PathLike, step: int | None) -> Sequence[epath.PathLike]:
    """Folders of the checkpoints that a reader's `path` may mean, newest first.

    Of those at the address of a store, each is copied to this machine when its turn
    comes.
    """
    if addresses.is_address(path):
        return storage.fetch_checkpoints(str(path), step, log.warning)
    path = absolute(path)
    if "\\" in str(path):
        raise ConfigError(f"{path} cannot be read: Orbax takes no path with \\")
    if (path / "meta").is_dir():
        if path.name.isdigit():
            return candidates(path.parent, [int(path.name)], step)
        return [path]
    for folder in (path, path / "checkpoints"):
        steps = saved_steps(folder)
        if any((folder / str(s) / "meta").is_dir() for s in steps):
            return candidates(folder, steps, step)
    raise ConfigError(
        f"{path} {'holds no checkpoint' if path.exists() else 'does not exist'}: "
        "a run's folder, its checkpoints folder or the folder of one step is accepted"
    )


def candidates(folder: Path, steps: Sequence[int], step: int | None) -> list[Path]:
    """The folders to try, newest first: that of `step`, or all."""
    if not steps or step not in (None, *steps):
        of_step = "" if step is None else f" of step {step}, only {steps}"
        raise ConfigError(f"{folder} holds no checkpoint{of_step}")
    wanted = sorted(steps, reverse=True) if step is None else [step]
    return [folder / str(number) for number in wanted]


def newest(
    paths: Sequence[epath.PathLike], read: Callable[[Path], T]
) -> tuple[Path, T]:
    """(path, read(path)) of the first of `paths` that is not damaged."""
    for number, where in enumerate(paths):
        path = epath.Path(where)
        try:
            with silent(Damaged, KeyboardInterrupt):
                return path, read(path)
        except Damaged as error:
            reason = f"checkpoint {path} is damaged: {error}"
        if number + 1 < len(paths):
            log.warning("%s; taking the one before it", reason)
    if len(paths) > 1:
        reason += f"; none of {len(paths)} checkpoints can be read"
    raise ValueError(reason)


# ---------------------------------------------------------------- reading


@contextlib.contextmanager
def _reading(part: str) -> Iterator[None]:
    """Turns an error of a read into `Damaged`, unless the machine is its cause."""
    try:
        yield
    except Exception as error:
        raise _read_error(error, part) from None


def _read_error(error: BaseException, part: str) -> BaseException:
    """The error to raise for `error`: `Damaged`, or `error`'s cause (out of memory).

    Raises KeyboardInterrupt where Ctrl-C is the cause: the checkpoint is not damaged.

    `error` refers to Orbax's tasks, which `silent` must be able to collect. So no
    function that `Damaged` passes through may have a variable that refers to `error`.
    """
    check_interrupted(error)
    error = _cause(error)
    machine_errors = (MemoryError, PermissionError, jax.errors.JaxRuntimeError)
    if isinstance(error, machine_errors):
        return error
    return Damaged(f"{part}: {one_line(error)}")


def _meta(path: Path) -> Meta:
    """A checkpoint's meta; ValueError where its format is newer than FORMAT."""
    with _reading("meta"):
        with _alone():
            meta = ocp.load_checkpointables(path, {"meta": None})["meta"]
        version = meta["format"]
    if version > FORMAT:
        raise ValueError(
            f"{path} has format {version}, of ladder_jax {meta['ladder_jax']}: "
            f"ladder_jax {VERSION} reads up to {FORMAT}"
        )
    return meta


def has_meta(path: epath.PathLike) -> bool:
    """Whether the files that describe a checkpoint, of one step, hold JSON objects.

    It asks neither Orbax nor JAX, which would wait for the other processes.
    """
    try:
        files = [epath.Path(path) / name for name in ("_CHECKPOINT_METADATA", META)]
        return all(isinstance(json.loads(x.read_text()), dict) for x in files)
    except (OSError, ValueError):
        return False


def _alone() -> contextlib.AbstractContextManager[Any]:
    """Orbax then reads in this process alone, and waits for no other.

    Otherwise a process that finds no checkpoint, or a damaged one, would leave the
    others waiting for minutes.
    """
    if jax.process_count() == 1:
        return contextlib.nullcontext()
    own = jax.process_index()
    return ocp.Context(
        multiprocessing_options=ocp.options.MultiprocessingOptions(
            primary_host=own,
            active_processes={own},
            barrier_sync_key_prefix=f"process_{own}",
        )
    )


def check_arrays(
    path: Path,
    arrays: dict[str, dict[str, jax.ShapeDtypeStruct]],
    config: dict[str, Any] | None = None,
    cast: bool = False,
) -> Meta:
    """Compares a checkpoint's descriptions with `arrays`; reads no arrays.

    Returns the checkpoint's meta. Raises Damaged where a description cannot be read,
    ValueError where a part of `arrays` is missing or differs.
    """
    meta = _meta(path)
    for name, wanted in arrays.items():
        if name not in meta["parts"]:
            raise ValueError(f"{path} holds no {name}, only {', '.join(meta['parts'])}")
        with _reading(name):
            saved = _description(path, name)
        if problem := misfit(flatten_dict(saved, sep="/"), wanted, cast):
            raise ValueError(
                f"{path} is a checkpoint of another model or optimizer: "
                f"{name}/{problem}" + differences(meta.get("config"), config)
            )
    return meta


def _description(path: Path, name: str) -> Any:
    """What Orbax says of the arrays of a part. ValueError where it can say nothing.

    Orbax logs the reason and returns None. An interrupt can be the reason, so it is
    asked twice.
    """
    for _ in range(2):
        saved = ocp.metadata(path, checkpointable_name=name).metadata
        if saved is not None:
            return saved
    raise ValueError("the description of the arrays cannot be read")


def load(
    path: Path,
    abstract_state: dict[str, Any],
    data_iterator: Any = None,
    config: dict[str, Any] | None = None,
    cast: bool = False,
) -> tuple[dict[str, Any], Meta]:
    """(state, meta) of one step.

    It compares descriptions before it reads arrays, so that a checkpoint of another
    model does not count as damaged.
    """
    wanted = {name: shapes(tree) for name, tree in abstract_state.items()}
    meta = check_arrays(path, wanted, config, cast)
    position = None if data_iterator is None else _position(path, meta)
    nested = {name: unflatten_dict(flat, sep="/") for name, flat in wanted.items()}
    with _reading("arrays"):
        loaded = _read_arrays(path, nested, _largest_shard(wanted))
    if position is not None:
        try:
            data_iterator.set_state(position)
        except Exception as error:
            raise ValueError(
                f"the data iterator does not fit the position in {path}: "
                f"{one_line(error)}"
            ) from error
    state = {}
    for name, tree in abstract_state.items():
        arrays = flatten_dict(loaded[name], sep="/")
        leaves = [arrays[array] for array in wanted[name]]
        state[name] = jax.tree.unflatten(jax.tree.structure(tree), leaves)
    return state, meta


def _largest_shard(arrays: dict[str, dict[str, jax.ShapeDtypeStruct]]) -> int:
    """The bytes of the largest shard of any array, as float32."""
    shapes = [
        x.sharding.shard_shape(x.shape)
        for part in arrays.values()
        for x in part.values()
        if x.sharding is not None
    ]
    return max((4 * math.prod(shape) for shape in shapes), default=0)


def _read_arrays(path: Path, nested: dict[str, Any], largest: int) -> dict[str, Any]:
    """Reads arrays onto their devices, with at most READ_BYTES on their way.

    Without a limit, Orbax reads all arrays at once, and the host holds the whole model.

    largest: bytes of the largest shard: as much as two of them is always read.
    """
    limit: int | None = max(READ_BYTES, 2 * largest + 1)
    while True:
        memory = ocp.options.MemoryOptions(read_concurrent_bytes=limit)
        try:
            with ocp.Context(memory_options=memory):
                return ocp.load_checkpointables(path, nested)
        except Exception as error:
            check_interrupted(error)
            # A shard here may need whole chunks of a run with fewer shards.
            if limit is None or "Requested more bytes" not in str(_cause(error)):
                raise
        gc.collect()  # while `silent` drops what Orbax's unfinished tasks print
        limit = limit * 4 if limit < 64 * largest else None


def _cause(error: BaseException) -> BaseException:
    """The first cause of an error: Orbax wraps errors in its own."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _position(path: Path, meta: Meta) -> Any:
    """The position of the data, for any number of processes.

    An older checkpoint has a file of it for each process, all with the same position.
    """
    if OLD_POSITION not in meta["parts"]:
        if "data" not in meta:
            raise ValueError(f"{path} holds no position of the data")
        return meta["data"]
    with _reading(OLD_POSITION):
        files = sorted((path / OLD_POSITION).glob("process_*"))
        positions = [json.loads(file.read_text()) for file in files]
        if not positions:
            raise FileNotFoundError(f"no file in {path / OLD_POSITION}")
    if any(position != positions[0] for position in positions):
        raise ValueError(f"{path} has other positions of the data in each process")
    return positions[0]


def one_line(error: BaseException) -> str:
    """An error's message on one line, without TensorStore's source locations."""
    text = str(error).split(" [source locations=")[0]
    return " ".join(text.split())[:300] or type(error).__name__
