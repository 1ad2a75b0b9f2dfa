"""Goes back to a checkpoint when a run's steps are bad, and on with other data.

A bad step is not finite, or follows train.skip_steps bad ones in a row (skipping.py).
The run then has the arrays of its newest checkpoint, and the iterator stays where it
is: the batches since that checkpoint are not read again. All decisions are from numbers
that every process has, at steps that the configuration names. So a run that is started
again, or resumed, decides the same.
"""

import math
from typing import Any

import optax

from ladder_jax.config import Train
from ladder_jax.preparation import Job
from ladder_jax.progress import Measured
from ladder_jax.saving import Checkpoints
from ladder_jax.train_programs import State, abstract_state, watched


class BadStep(Exception):
    """The message names the step and says what is bad about it."""


def check(measured: Measured, options: Train) -> dict[str, float]:
    """Waits for the results of a step, and returns them as finite numbers.

    The loss and the gradient norm of a step that was left out are not among them if
    they are not finite. Raises BadStep if the run cannot go on from this step.
    """
    values = {name: value.item() for name, value in measured.results.items()}
    in_a_row = values.pop("bad_in_a_row", 0)
    finite = {name: value for name, value in values.items() if math.isfinite(value)}
    shown = sorted(values.keys() - {"learning_rate", "skipped_steps"})
    numbers = ", ".join(f"{name} {values[name]:.6g}" for name in shown)
    if in_a_row and in_a_row >= options.skip_steps:
        raise BadStep(
            f"step {measured.step} follows {in_a_row} bad steps in a row ({numbers})"
        )
    if len(finite) < len(values) and (not in_a_row or "parameter_norm" not in finite):
        raise BadStep(f"step {measured.step} is not finite ({numbers})")
    return finite


def restore(
    job: Job,
    optimizer: optax.GradientTransformation,
    checkpoints: Checkpoints,
    batches: Any = None,
) -> tuple[int, State, dict[str, Any]]:
    """(step, state, meta) of the newest checkpoint that can be read.

    Moves the iterator `batches` to the batch that follows the checkpoint. None: a
    rollback, which moves no iterator, and after which no step is bad yet.
    """
    abstract = abstract_state(job.config, job.mesh, optimizer).saved()
    saved = job.meta["config"]
    step, arrays, meta = checkpoints.restore(abstract, batches, config=saved)
    watch = meta.get("watch") or {}
    if batches is None:
        watch = watch | dict(in_a_row=0)
    return step, watched(State(**arrays), job.config, job.mesh, watch), meta


def last_words(bad: BadStep, checkpoints: Checkpoints, count: int) -> str:
    """The message of a run that ends with a bad step after `count` rollbacks."""
    saved = checkpoints.steps()
    after = f" after {count} rollbacks (train.rollbacks)" if count else ""
    state = f"stopped{after}, before any checkpoint"
    if saved:
        state = f"stopped{after}; the checkpoint of step {saved[-1]} is good"
    return (
        f"{bad}: {state}. Try a lower optimizer.learning_rate or more "
        "optimizer.warmup_steps"
    )
