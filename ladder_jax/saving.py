"""Saves and restores the checkpoints of a run: all that training needs to resume.

`Checkpoints` writes a folder a step, in the background, and keeps the newest.
checkpoint.py says what is in it, and reads it for everyone else.
"""

import contextlib
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from etils import epath
from etils.epath import Path
from flax.traverse_util import unflatten_dict
from jax.tree_util import keystr
from orbax.checkpoint import v1 as ocp

from ladder_jax import checkpoint
from ladder_jax.checkpoint import FORMAT, VERSION, Damaged, Meta, one_line
from ladder_jax.checkpoint_arrays import named, shapes
from ladder_jax.orbax_output import silent, without_progress
from ladder_jax.run_folder import Lease

log = logging.getLogger(__name__)


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

    Attributes:
      elsewhere: checkpoints that are not in `folder`: {step: brings it there}.

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
        self.folder = checkpoint.absolute(folder)
        checkpoint.require_plain_name(self.folder)
        self.keep, self.lease = keep, lease
        self.elsewhere: dict[int, Callable[[], object]] = {}
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
        arrays = {name: shapes(tree) for name, tree in state.items()}
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
        return checkpoint.saved_steps(self.folder)

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

        Those of `elsewhere` that are newer than what can be read are brought first.

        Returns (step, state, meta). Raises ValueError when there is no checkpoint, none
        can be read, or it is of another model or optimizer.
        """
        self.wait()

        def load(path: Path) -> tuple[dict[str, Any], Meta]:
            if bring := self.elsewhere.pop(int(path.name), None):
                bring()
                self._own_steps.add(int(path.name))
            return checkpoint.load(path, abstract_state, data_iterator, config)

        steps = sorted({*self.steps(), *self.elsewhere})
        path, (state, meta) = checkpoint.newest(
            checkpoint.candidates(self.folder, steps, step), load
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
            reader.submit(
                checkpoint.check_arrays, self.folder / str(step), arrays
            ).result()
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
                log.warning(
                    "checkpoint %s cannot be removed: %s", path, one_line(error)
                )

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


def _not_written(path: Path, error: Exception) -> OSError:
    return OSError(
        f"checkpoint {path} could not be written: {one_line(error)}; "
        "those before it are as they were"
    )
