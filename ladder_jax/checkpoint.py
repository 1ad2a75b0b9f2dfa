"""Checkpoints of a run (Orbax v1): everything that training needs to go on, in one folder a step.

    <folder>/<step>/model/       parameters by their plain names, such as layers/attention/wq
                    optimizer/   optimizer state, named in the same way
                    data/        position of the data iterator, one JSON file a process
                    meta/        JSON: configuration, tokenizer, versions

Arrays load onto any mesh. Plain Orbax opens them too, as NumPy arrays on any machine: see notebooks/checkpoint.ipynb.
"""

import contextlib
import gc
import importlib.metadata
import json
import logging
import sys
import warnings

import jax
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.tree_util import GetAttrKey, keystr, tree_leaves_with_path
from orbax.checkpoint import v1 as ocp

FORMAT = 1  # of what is written here: raised when an older ladder_jax could not read it
VERSION = next(
    (found.version for found in importlib.metadata.distributions(name="ladder_jax")),
    "not installed",
)
log = logging.getLogger(__name__)


class Damaged(Exception):
    """A checkpoint that cannot be read; the one before it is tried."""


class Checkpoints(contextlib.AbstractContextManager):
    """The checkpoints of one run, which alone may open them so; other programs use `load_model` and `read_meta`.

    Opening makes the folder and removes what a killed save left in it. Use it in a `with`, or close it: a save
    still under way when the interpreter exits is lost. All processes of a run make the same calls.

    Args:
        folder: where the steps go, a path or a bucket's address.
        keep: how many of the newest checkpoints stay; an older one goes once its successor is complete.
    Raises OSError when the folder cannot be made.
    """

    def __init__(self, folder, keep):
        self.folder = _absolute(folder)
        self._step = None  # last step saved or restored: any above it are of a past that the run has left
        training, context = ocp.training, ocp.Context()
        context.checkpointables.registry = ocp.handlers.local_registry()
        context.checkpointables.registry.add(
            ocp.handlers.JsonHandler, checkpointable_name="meta"
        )  # not as a pytree
        # Made in the background, a folder that cannot be made leaves Orbax's threads waiting for it for minutes.
        context.asynchronous.create_directories_asynchronously = False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with _quiet():
                self._checkpointer = training.Checkpointer(
                    self.folder,
                    context=context,
                    cleanup_tmp_directories=True,
                    save_decision_policy=training.save_decision_policies.FixedIntervalPolicy(
                        1
                    ),  # whenever asked
                    preservation_policy=training.preservation_policies.LatestN(keep),
                )
        except OSError as error:
            raise _not_written(self.folder, error) from error

    def save(self, step, state, data_iterator, meta):
        """Copies everything to the host, then writes it in the background; first waits for the save before this one.

        Args:
            step: steps taken so far. A step just saved or restored is not written again. Once an earlier step has
                been restored, checkpoints from `step` on are replaced: they belong to a run that went another way.
            state: dict of pytrees of arrays, such as dict(model=..., optimizer=...).
            data_iterator: a Grain DatasetIterator, whose position each process saves; None: none is saved.
            meta: dict of JSON values: config (`config.to_dict`), tokenizer (its JSON text).
        Raises OSError when this save cannot start or the one before it failed; ValueError when the folder held
        checkpoints already and none was restored.
        """
        self.wait()
        if step == self._step:
            return
        steps = self.steps()
        if (
            steps and self._step is None
        ):  # else Orbax would take them, and any folder named by a number, for old
            raise ValueError(
                f"{self.folder} holds checkpoints of another run, of steps {steps}: restore one of them "
                "to go on from it, or choose another folder"
            )
        items = {
            name: unflatten_dict(_named(tree), sep="/") for name, tree in state.items()
        }
        if data_iterator is not None:
            items["data"] = data_iterator
        items["meta"] = {
            "format": FORMAT,
            "ladder_jax": VERSION,
            "parts": sorted(items),
            **meta,
        }
        try:
            for other in reversed([s for s in steps if s >= step]):
                self._checkpointer.delete(other)
            self._checkpointer.save_checkpointables_async(step, items)
        except Exception as error:
            raise _not_written(self.folder / str(step), error) from error
        self._step = step

    def steps(self):
        """The steps of all complete checkpoints, ascending; whether one can be read shows when it is."""
        return saved_steps(self.folder)

    def restore(self, abstract_state, data_iterator=None, step=None, config=None):
        """Loads the newest checkpoint that can be read (or that of `step`) into the layout of `abstract_state`.

        Args:
            abstract_state: dict of pytrees, as saved; leaves have shape, dtype and sharding (jax.ShapeDtypeStruct).
            data_iterator: made as the saved one was; it is moved to the saved position. None: the position is unread.
            step: that one and no other.
            config: `config.to_dict` of now: if the checkpoint does not fit, the fields that differ are named.
        Returns (step, state, meta). A damaged checkpoint is reported in one line and the one before it is taken.
        Raises ValueError when there is none, none can be read, or it is one of another model or optimizer.
        """
        self.wait()
        path, (state, meta) = _newest(
            _choose(self.folder, self.steps(), step),
            lambda path: _load(path, abstract_state, data_iterator, config),
        )
        self._step = int(path.name)
        return self._step, state, meta

    def wait(self):
        """Returns when the last save is complete. Raises OSError if it failed: that checkpoint does not exist then."""
        try:
            self._checkpointer.wait()
        except Exception as error:
            failed, self._step = self._step, max(self.steps(), default=None)
            raise _not_written(self.folder / str(failed), error) from error

    def close(self):
        """Waits for the last save, and raises as `wait` does."""
        try:
            self.wait()
        finally:
            self._checkpointer.close()

    def __exit__(self, *_):
        self.close()


def read_meta(path, step=None):
    """The JSON saved with the arrays, which stay unread: dict with format, ladder_jax, parts, config, tokenizer.

    `path`, `step` and the ValueError are those of `load_model`.
    """
    return _newest(_find(path, step), _meta)[1]


def load_model(path, abstract_model, step=None):
    """The parameters alone, from the newest checkpoint that can be read (or that of `step`), on any mesh.

    Args:
        path: a run's folder, its checkpoints folder, or the folder of one step.
        abstract_model: the model with leaves that have shape, dtype and sharding (jax.ShapeDtypeStruct; without a
            sharding: on the first device). Floating-point parameters are cast to the dtype asked for.
    Raises ValueError when there is no such checkpoint, none can be read, or it is one of another model.
    """
    return _newest(
        _find(path, step),
        lambda path: _load(path, {"model": abstract_model}, cast=True),
    )[1][0]["model"]


def _absolute(path):
    path = epath.Path(path).expanduser()
    return (
        path if "://" in str(path) else path.resolve()
    )  # a bucket's address is whole as it is


def _find(path, step):
    """Folders of the checkpoints that a reader's `path` may mean, newest first."""
    path = _absolute(path)
    if (path / "meta").is_dir():
        return (
            _choose(path.parent, [int(path.name)], step)
            if path.name.isdigit()
            else [path]
        )
    for folder in (path, path / "checkpoints"):
        steps = saved_steps(folder)
        if any((folder / str(s) / "meta").is_dir() for s in steps):
            return _choose(folder, steps, step)
    raise ValueError(
        f"{path} {'holds no checkpoint' if path.exists() else 'does not exist'}: a run's folder, its "
        "checkpoints folder or the folder of one step is accepted"
    )


def saved_steps(folder):
    """The steps of all complete checkpoints in `folder`, ascending; none where there is no such folder."""
    with _quiet():
        return sorted(
            found.step
            for found in ocp.path.step.standard_name_format().find_all(
                _absolute(folder)
            )
        )


def _choose(folder, steps, step):
    if not steps or step not in (None, *steps):
        raise ValueError(
            f"{folder} holds no checkpoint{'' if step is None else f' of step {step}, only {steps}'}"
        )
    return [folder / str(s) for s in (reversed(steps) if step is None else [step])]


def _newest(paths, read):
    """(path, read(path)) of the first of `paths` that is not damaged."""
    for path in paths:
        try:
            with _quiet():
                return path, read(path)
        except Damaged as error:
            reason = f"checkpoint {path} is damaged: {error}"
        if path != paths[-1]:
            log.warning("%s; taking the one before it", reason)
    raise ValueError(
        reason
        if len(paths) == 1
        else f"{reason}; none of {len(paths)} checkpoints can be read"
    )


@contextlib.contextmanager
def _reading(part):
    """Turns a failure to read into `Damaged`, unless the files are not to blame for it."""
    try:
        yield
    except Exception as error:
        while (
            error.__cause__ is not None
        ):  # Orbax wraps what happened in what it was trying
            error = error.__cause__
        if isinstance(
            error, (MemoryError, PermissionError, jax.errors.JaxRuntimeError)
        ):
            raise error from None
        raise Damaged(f"{part}: {_line(error)}") from None


def _meta(path):
    with _reading("meta"):
        meta = ocp.load_checkpointables(path, {"meta": None})["meta"]
        version = meta["format"]
    if version > FORMAT:
        raise ValueError(
            f"{path} has format {version}, of ladder_jax {meta['ladder_jax']}: "
            f"ladder_jax {VERSION} reads up to {FORMAT}"
        )
    return meta


def _load(path, abstract_state, data_iterator=None, config=None, cast=False):
    """(state, meta) of one step. Descriptions are compared before arrays are read: another model is not damage."""
    meta, wanted = _meta(path), {}
    for name in [*abstract_state, *(["data"] if data_iterator is not None else [])]:
        if name not in meta["parts"]:
            raise ValueError(f"{path} holds no {name}, only {', '.join(meta['parts'])}")
    for name, tree in abstract_state.items():
        with _reading(name):
            saved = ocp.metadata(path, checkpointable_name=name).metadata
            if saved is None:  # Orbax has logged why, in many lines
                raise ValueError("the description of the arrays cannot be read")
        wanted[name] = {
            array: jax.ShapeDtypeStruct(
                x.shape,
                x.dtype,
                sharding=getattr(x, "sharding", None)
                or jax.sharding.SingleDeviceSharding(jax.devices()[0]),
            )
            for array, x in _named(tree).items()
        }
        if problem := _misfit(flatten_dict(saved, sep="/"), wanted[name], cast):
            raise ValueError(
                f"{path} is a checkpoint of another model or optimizer: {name}/{problem}"
                + _differences(meta.get("config"), config)
            )
    with _reading("arrays"):
        loaded = ocp.load_checkpointables(
            path, {n: unflatten_dict(flat, sep="/") for n, flat in wanted.items()}
        )
    loaded = {name: flatten_dict(tree, sep="/") for name, tree in loaded.items()}
    if data_iterator is not None:
        _move(data_iterator, path)
    return {
        name: jax.tree.unflatten(
            jax.tree.structure(tree), [loaded[name][array] for array in wanted[name]]
        )
        for name, tree in abstract_state.items()
    }, meta


def _move(data_iterator, path):
    """Sets the iterator to the position that this process saved (Grain names the files)."""
    name = f"process_{jax.process_index()}-of-{jax.process_count()}.json"
    with _reading("data"):
        files = sorted(file.name for file in (path / "data").glob("process_*"))
        position = (
            json.loads((path / "data" / name).read_text())
            if name in files or not files
            else None
        )
    if position is None:
        raise ValueError(
            f"{path} has data positions {files}, not {name}: resume with as many processes as saved them"
        )
    try:
        data_iterator.set_state(position)
    except Exception as error:
        raise ValueError(
            f"the data iterator does not fit the position in {path}: {_line(error)}"
        ) from error


def _named(tree):
    """Leaves of a pytree by their path, such as layers/attention/wq: no `.value` of Flax variables, no containers."""
    leaves = tree_leaves_with_path(tree)
    named = {
        keystr(
            path[:-1] if path[-1] == GetAttrKey("value") else path,
            simple=True,
            separator="/",
        ): leaf
        for path, leaf in leaves
    }
    assert len(named) == len(leaves), "two leaves have the same name"
    return named


def _misfit(saved, wanted, cast):
    """Says which array differs between the checkpoint (`saved`) and this program (`wanted`), and how; None if none."""
    for array in sorted(wanted.keys() | saved.keys()):
        if array not in saved:
            return f"{array} is not in the checkpoint"
        if array not in wanted:
            return f"{array} is in the checkpoint, but not here"
        there, here = saved[array], wanted[array]
        if jax.numpy.issubdtype(here.dtype, jax.dtypes.prng_key):
            here = jax.eval_shape(jax.random.key_data, here)
        if there.shape != here.shape:
            return (
                f"{array} has shape {there.shape} in the checkpoint, {here.shape} here"
            )
        floats = all(
            jax.numpy.issubdtype(x.dtype, jax.numpy.floating) for x in (there, here)
        )
        if there.dtype != here.dtype and not (cast and floats):
            return f"{array} is {there.dtype} in the checkpoint, {here.dtype} here"


def _differences(saved, config):
    """Fields of the model and the optimizer that differ between two configurations, as the end of a message."""
    there, here = (
        flatten_dict({s: (c or {}).get(s, {}) for s in ("model", "optimizer")}, sep=".")
        for c in (saved, config)
    )
    fields = [
        f"{name}={there[name]!r} in the checkpoint, {here[name]!r} here"
        for name in there.keys() & here.keys()
        if there[name] != here[name]
    ]
    return f" ({'; '.join(sorted(fields))})" if fields else ""


def _line(error):
    """An error's message, on one line and without the source locations that TensorStore appends."""
    return (
        " ".join(str(error).split(" [source locations=")[0].split())[:300]
        or type(error).__name__
    )


def _not_written(path, error):
    return OSError(
        f"checkpoint {path} could not be written: {_line(error)}; those before it are as they were"
    )


def _is_news(record):
    """Not so Orbax's progress reports, nor its tracebacks of failures: these are raised here, once."""
    return "orbax" not in record.pathname or record.levelno == logging.WARNING


logging.getLogger("absl").addFilter(_is_news)


@contextlib.contextmanager
def _quiet():
    """Silences what Orbax prints of a damaged checkpoint: many lines, some only when its tasks are collected."""
    loggers, nothing = (
        [logging.getLogger(name) for name in (None, "absl", "asyncio")],
        lambda *_: None,
    )
    hooks = sys.unraisablehook, sys.excepthook
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sys.unraisablehook = sys.excepthook = nothing
        for logger in loggers:
            logger.addFilter(nothing)
        try:
            yield
        except Damaged as error:
            error.__context__ = None  # it holds the tasks
            gc.collect()
            raise
        finally:
            sys.unraisablehook, sys.excepthook = hooks
            for logger in loggers:
                logger.removeFilter(nothing)
