"""Checkpoints of a run (Orbax v1): all that training needs to resume, a folder a step.

    <folder>/<step>/model/       parameters by plain names, such as layers/attention/wq
                    optimizer/   optimizer state, named in the same way
                    meta/        JSON: configuration, tokenizer, versions, and the
                                 position of the data: batches taken by all processes

A step takes the same rows from the corpus whatever the number of processes, so that one
position serves any number of them.

Arrays load onto any mesh. Plain Orbax opens them too, as NumPy arrays on any machine:
see notebooks/checkpoint.ipynb.
"""

import contextlib
import gc
import hashlib
import importlib.metadata
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax
from etils import epath
from etils.epath import Path
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.tree_util import GetAttrKey, keystr, tree_leaves_with_path
from orbax.checkpoint import v1 as ocp

from ladder_jax import addresses, storage
from ladder_jax.config import ConfigError, require
from ladder_jax.orbax_output import silent, without_progress
from ladder_jax.run_folder import Lease
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
OLD_POSITION = "data"  # a part of checkpoints that older versions saved
READ_BYTES = 1 << 30  # of arrays that are read at one time
log = logging.getLogger(__name__)

Meta = dict[str, Any]
T = TypeVar("T")


class Damaged(Exception):
    """The checkpoint's files cannot be read. Readers then try an older checkpoint."""


class Checkpoints(contextlib.AbstractContextManager["Checkpoints"]):
    """The checkpoints of one run; other programs read with `load_model`, `read_meta`.

    The constructor makes the folder and removes the incomplete files of a killed save.
    Use the object in a `with`, or close it: a save that has not ended when the
    interpreter exits is lost. All processes of a run make the same calls.

    Args:
      folder: where the steps go, a path or a bucket's address.
      keep: how many of the newest checkpoints stay. An older one is removed once its
        successor is complete and its descriptions have been read back.
      lease: the lease on the run's folder, checked before each save; None: no check.
      failed: is called at once with the error of a save in the background, in a thread
        of Orbax's. `wait` raises it too, but where there are several processes Orbax
        first waits for the others for minutes.

    Raises ConfigError where Orbax cannot work in a folder of that name, and OSError
    where the folder cannot be made.
    """

    def __init__(
        self,
        folder: epath.PathLike,
        keep: int,
        lease: Lease | None = None,
        failed: Callable[[OSError], object] | None = None,
    ) -> None:
        self.folder = _absolute(folder)
        require_plain_name(self.folder)
        self.keep, self.lease = keep, lease
        # The last step saved or restored. The next save replaces the later steps.
        self._step: int | None = None
        # The last save, until it has been read back: its step, its arrays' shapes.
        self._unverified: tuple[int, dict[str, Any]] | None = None
        self._log_filter = contextlib.ExitStack()
        training, context = ocp.training, ocp.Context()
        registry = ocp.handlers.local_registry()
        # Without this line, Orbax would save the dict as a pytree of arrays.
        registry.add(ocp.handlers.JsonHandler, checkpointable_name="meta")
        context.checkpointables.registry = registry
        # If a background thread failed to make the folder, Orbax's other threads would
        # wait for the folder for minutes.
        context.asynchronous.create_directories_asynchronously = False
        context.array.saving.scoped_storage_options_creator = storage_options
        every_call = training.save_decision_policies.FixedIntervalPolicy(1)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with silent(Damaged):
                self._checkpointer = training.Checkpointer(
                    self.folder,
                    context=context,
                    cleanup_tmp_directories=True,
                    save_decision_policy=every_call,
                    preservation_policy=training.preservation_policies.PreserveAll(),
                )
        except OSError as error:
            raise _not_written(self.folder, error) from error
        # The steps that were here at the start, and those that this run saved.
        self._own_steps = set(self.steps())
        self._failed = failed
        told = None if failed is None else self._fail
        self._log_filter.enter_context(without_progress(told))

    def save(
        self, step: int, state: dict[str, Any], data_iterator: Any, meta: Meta
    ) -> None:
        """Copies everything to the host, and writes it in the background.

        It first waits for the previous save.

        Args:
          step: training steps so far. The step last saved or restored is not written
            again. Checkpoints of `step` and later steps are removed first: they are
            there only if the run was restored from an earlier step.
          state: dict of pytrees of arrays, such as dict(model=..., optimizer=...).
          data_iterator: a Grain DatasetIterator. Its state is that of every process:
            process 0 saves it. None: no position is saved.
          meta: dict of JSON values: config (`config.to_dict`), tokenizer (its JSON).

        Raises OSError when this save cannot start, the previous save failed, or another
        job writes here; ValueError when the folder held checkpoints already and none
        was restored.
        """
        if self.lease is not None:
            self.lease.check()
        self.wait()
        if step == self._step:
            return
        steps = self.steps()
        if foreign := sorted(set(steps) - self._own_steps):
            raise OSError(
                f"{self.folder} holds checkpoints of steps {foreign}, which another "
                "job wrote meanwhile: this job stops, and removes none of them"
            )
        # Orbax would take any folder whose name is a number for an old checkpoint.
        if steps and self._step is None:
            raise ValueError(
                f"{self.folder} holds checkpoints of another run, of steps {steps}: "
                "restore one of them to go on from it, or choose another folder"
            )
        items: dict[str, Any] = {
            name: unflatten_dict(named(tree), sep="/") for name, tree in state.items()
        }
        arrays = {name: _shapes(tree) for name, tree in state.items()}
        own = dict(format=FORMAT, ladder_jax=VERSION, parts=sorted(items))
        if data_iterator is not None:
            own["data"] = data_iterator.get_state()
        items["meta"] = own | meta
        try:
            for later_step in reversed([s for s in steps if s >= step]):
                self._checkpointer.delete(later_step)
            self._checkpointer.save_checkpointables_async(step, items)
        except Exception as error:
            raise _not_written(self.folder / str(step), error) from error
        self._step, self._unverified = step, (step, arrays)
        self._own_steps.add(step)

    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, ascending; some may be damaged."""
        return saved_steps(self.folder)

    def restore(
        self,
        abstract_state: dict[str, Any],
        data_iterator: Any = None,
        step: int | None = None,
        config: dict[str, Any] | None = None,
    ) -> tuple[int, dict[str, Any], Meta]:
        """Loads the newest checkpoint that can be read into `abstract_state`'s layout.

        It logs one line for a damaged checkpoint, and loads the one before it.

        Args:
          abstract_state: dict of pytrees, as saved; leaves have shape, dtype and
            sharding (jax.ShapeDtypeStruct).
          data_iterator: an iterator over the same dataset as the saved one; it is moved
            to the saved position. None: the position is not read.
          step: the only step to load; None: the newest.
          config: `config.to_dict` of this run. If the checkpoint does not fit, the
            message names the fields that differ.

        Returns (step, state, meta). Raises ValueError when there is no checkpoint, none
        can be read, or it is of another model or optimizer.
        """
        self.wait()
        path, (state, meta) = _newest(
            _candidates(self.folder, self.steps(), step),
            lambda path: _load(path, abstract_state, data_iterator, config),
        )
        self._step = int(path.name)
        return self._step, state, meta

    def wait(self) -> None:
        """Returns when the last save is complete and older ones are removed.

        Raises OSError if the save failed or cannot be read back. The run can then be
        restored from an older checkpoint.
        """
        try:
            self._checkpointer.wait()
            self._verify()
        except Exception as error:
            failed_step = self._step
            unverified_step = self._unverified[0] if self._unverified else None
            good_steps = [s for s in self.steps() if s != unverified_step]
            self._step, self._unverified = max(good_steps, default=None), None
            raise _not_written(self.folder / str(failed_step), error) from error
        self._remove_surplus()

    def _fail(self, error: Exception) -> None:
        """Passes the error of a save in the background on."""
        if self._failed is not None:
            self._failed(_not_written(self.folder / str(self._step), error))

    def _verify(self) -> None:
        """Reads the last save's descriptions back."""
        if self._unverified is None:
            return
        step, arrays = self._unverified
        # In its own thread: in the main thread asyncio, which Orbax uses, would turn
        # an interrupt into a description that cannot be read.
        with silent(Damaged), ThreadPoolExecutor(max_workers=1) as reader:
            reader.submit(_check_arrays, self.folder / str(step), arrays).result()
        self._unverified = None

    def _remove_surplus(self) -> None:
        """Removes all but the newest checkpoints of this run, up to its last step.

        This includes those of a job that was killed before it removed them.
        """
        if self._step is None:
            return
        last = self._step
        own_steps = [s for s in self.steps() if s in self._own_steps and s <= last]
        for surplus in own_steps[: -self.keep]:
            try:
                self._checkpointer.delete(surplus)
            except Exception as error:  # the run goes on: only disk space is lost
                path = self.folder / str(surplus)
                log.warning("checkpoint %s cannot be removed: %s", path, _line(error))

    def close(self) -> None:
        """Waits for the last save, and raises as `wait` does."""
        try:
            self.wait()
        finally:
            self._checkpointer.close()
            self._log_filter.close()

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        if error_type is not None:
            # Orbax forgets a save whose wait was interrupted, and completes it later:
            # to read it back now would hide the interrupt behind a false error. Older
            # checkpoints stay, since the last one was not read back.
            self._unverified = self._step = None
        self.close()


def storage_options(keys: tuple[Any, ...], value: Any) -> Any:
    """How Orbax stores an array: the matrices of each layer in chunks of their own.

    A reader of one layer (stored_arrays.py) then reads no others.
    """
    is_stack = keystr(keys[:1], simple=True) == "layers" and value.ndim >= 3
    options = ocp.options.ArrayOptions.Saving.StorageOptions
    return options(shard_axes=(0,)) if is_stack else None


def require_plain_name(folder: epath.PathLike, name: str = "folder") -> None:
    """Raises ConfigError where Orbax cannot save into `folder`, whose field is `name`.

    Orbax puts the folder's path into file patterns. A path with a pattern's special
    characters would make it miss parts of a save, or read those of another folder.
    """
    path = str(_absolute(folder))
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
    return _newest(_find(path, step), _meta)


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

    where, (meta, arrays) = _newest(_find(path, step), read)
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
    state, _ = _newest(
        _find(path, step),
        lambda path: _load(path, {"model": abstract_model}, cast=True),
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
        _check_arrays(path, {"model": _shapes(abstract_model)}, cast=True)
        with _reading("model"):
            return open_arrays(path / "model")

    return _newest(_find(path, step), read)


def fingerprint(folder: Path) -> str:
    """A digest that another save's folder does not have, even of equal arrays.

    It is that of the small files which name the parameters' files: their names are
    random.
    """
    digest = hashlib.sha256()
    for file in ("model/manifest.ocdbt", "meta/data.json"):
        digest.update((folder / file).read_bytes())
    return digest.hexdigest()


def saved_steps(folder: epath.PathLike) -> list[int]:
    """The steps of all complete checkpoints in `folder`, ascending.

    The list is empty if there is no such folder.
    """
    with silent(Damaged):
        names = ocp.path.step.standard_name_format()
        return sorted(entry.step for entry in names.find_all(_absolute(folder)))


# ---------------------------------------------------------------- paths


def _absolute(path: epath.PathLike) -> Path:
    if not addresses.is_address(path):
        return Path(addresses.local_path(path, "path").resolve())
    return epath.Path(path)


def _find(path: epath.PathLike, step: int | None) -> list[Path]:
    """Folders of the checkpoints that a reader's `path` may mean, newest first.

    One at the address of a store is copied to this machine first.
    """
    if addresses.is_address(path):
        path = storage.fetch_checkpoint(str(path), step, log.warning)
    path = _absolute(path)
    if "\\" in str(path):
        raise ConfigError(f"{path} cannot be read: Orbax takes no path with \\")
    if (path / "meta").is_dir():
        if path.name.isdigit():
            return _candidates(path.parent, [int(path.name)], step)
        return [path]
    for folder in (path, path / "checkpoints"):
        steps = saved_steps(folder)
        if any((folder / str(s) / "meta").is_dir() for s in steps):
            return _candidates(folder, steps, step)
    raise ConfigError(
        f"{path} {'holds no checkpoint' if path.exists() else 'does not exist'}: "
        "a run's folder, its checkpoints folder or the folder of one step is accepted"
    )


def _candidates(folder: Path, steps: Sequence[int], step: int | None) -> list[Path]:
    """The folders to try, newest first: that of `step`, or all."""
    if not steps or step not in (None, *steps):
        of_step = "" if step is None else f" of step {step}, only {steps}"
        raise ConfigError(f"{folder} holds no checkpoint{of_step}")
    wanted = sorted(steps, reverse=True) if step is None else [step]
    return [folder / str(number) for number in wanted]


def _newest(paths: Sequence[Path], read: Callable[[Path], T]) -> tuple[Path, T]:
    """(path, read(path)) of the first of `paths` that is not damaged."""
    for path in paths:
        try:
            with silent(Damaged):
                return path, read(path)
        except Damaged as error:
            reason = f"checkpoint {path} is damaged: {error}"
        if path != paths[-1]:
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

    `error` refers to Orbax's tasks, which `silent` must be able to collect. So no
    function that `Damaged` passes through may have a variable that refers to `error`.
    """
    error = _cause(error)
    machine_errors = (MemoryError, PermissionError, jax.errors.JaxRuntimeError)
    if isinstance(error, machine_errors):
        return error
    return Damaged(f"{part}: {_line(error)}")


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


def _shapes(tree: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """A pytree's arrays by name: shape, dtype and sharding."""
    return {
        array: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_sharding(x))
        for array, x in named(tree).items()
    }


def _sharding(x: Any) -> jax.sharding.Sharding:
    """The sharding of `x`; if it has none, that of this process's first device."""
    sharding = getattr(x, "sharding", None)
    return sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _check_arrays(
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
            saved = ocp.metadata(path, checkpointable_name=name).metadata
            if saved is None:  # Orbax logs the reason and returns None
                raise ValueError("the description of the arrays cannot be read")
        if problem := _misfit(flatten_dict(saved, sep="/"), wanted, cast):
            raise ValueError(
                f"{path} is a checkpoint of another model or optimizer: "
                f"{name}/{problem}" + _differences(meta.get("config"), config)
            )
    return meta


def _load(
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
    wanted = {name: _shapes(tree) for name, tree in abstract_state.items()}
    meta = _check_arrays(path, wanted, config, cast)
    position = None if data_iterator is None else _position(path, meta)
    nested = {name: unflatten_dict(flat, sep="/") for name, flat in wanted.items()}
    with _reading("arrays"):
        loaded = _read_arrays(path, nested, _largest_shard(wanted))
    if position is not None:
        try:
            data_iterator.set_state(position)
        except Exception as error:
            raise ValueError(
                f"the data iterator does not fit the position in {path}: {_line(error)}"
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


def named(tree: Any) -> dict[str, Any]:
    """Leaves of a pytree by their path, such as layers/attention/wq.

    The `.value` at the end of a Flax variable's path is left out.
    """
    leaves = tree_leaves_with_path(tree)
    named = {}
    for path, leaf in leaves:
        if path[-1] == GetAttrKey("value"):
            path = path[:-1]
        named[keystr(path, simple=True, separator="/")] = leaf
    assert len(named) == len(leaves), "two leaves have the same name"
    return named


def _misfit(saved: dict[str, Any], wanted: dict[str, Any], cast: bool) -> str | None:
    """A message about the first array that differs between `saved` and `wanted`.

    `saved` are the checkpoint's arrays. None where all fit. With `cast`, floating-point
    dtypes may differ.
    """
    is_float = lambda x: jax.numpy.issubdtype(x.dtype, jax.numpy.floating)
    for array in sorted(wanted.keys() | saved.keys()):
        if array not in saved:
            return f"{array} is not in the checkpoint"
        if array not in wanted:
            return f"{array} is in the checkpoint, but not here"
        there, here = saved[array], wanted[array]
        if jax.numpy.issubdtype(here.dtype, jax.dtypes.prng_key):  # saved as integers
            here = jax.eval_shape(jax.random.key_data, here)
        if there.shape != here.shape:
            return (
                f"{array} has shape {there.shape} in the checkpoint, {here.shape} here"
            )
        may_cast = cast and is_float(there) and is_float(here)
        if there.dtype != here.dtype and not may_cast:
            return f"{array} is {there.dtype} in the checkpoint, {here.dtype} here"
    return None


def _differences(saved: dict[str, Any] | None, now: dict[str, Any] | None) -> str:
    """The fields of SECTIONS that differ, in brackets, to end a message; or ""."""

    def flat(config: dict[str, Any] | None) -> dict[str, Any]:
        sections = {name: (config or {}).get(name, {}) for name in SECTIONS}
        return flatten_dict(sections, sep=".")

    there, here = flat(saved), flat(now)
    fields = [
        f"{name}={there[name]!r} in the checkpoint, {here[name]!r} here"
        for name in there.keys() & here.keys()
        if there[name] != here[name]
    ]
    return f" ({'; '.join(sorted(fields))})" if fields else ""


SECTIONS = ("model", "optimizer")  # the config's sections that decide on the arrays


def _line(error: BaseException) -> str:
    """An error's message on one line, without TensorStore's source locations."""
    text = str(error).split(" [source locations=")[0]
    return " ".join(text.split())[:300] or type(error).__name__


def _not_written(path: Path, error: Exception) -> OSError:
    return OSError(
        f"checkpoint {path} could not be written: {_line(error)}; "
        "those before it are as they were"
    )
