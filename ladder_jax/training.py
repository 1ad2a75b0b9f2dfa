"""Runs the training job from start to end: mesh, data, model, optimizer, step, loop.

A run lives in the folder `train.out`: run.json, metrics.jsonl, checkpoints/<step>/,
loss.png, and tensorboard/ and profile/ where the configuration turns them on.
"""

import contextlib
import dataclasses
import itertools
import json
import signal
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple, NotRequired, TypedDict, cast

import jax
import numpy as np
import optax

from ladder_jax import (
    agreement,
    crossing,
    identity,
    mirror,
    model,
    rollback,
    sharding,
)
from ladder_jax.addresses import is_address
from ladder_jax.config import Config, ConfigError, require
from ladder_jax.data.batches import held_out_batches, train_iterator
from ladder_jax.generate import generate
from ladder_jax.hardware import chips
from ladder_jax.hardware import group as groups
from ladder_jax.hardware.watchdog import STEP_TIMEOUT, Watchdog
from ladder_jax.metrics import Metrics, plot
from ladder_jax.objective import (
    BATCH_FIELDS,
    Batch,
)
from ladder_jax.optimizer import learning_rate, make_optimizer
from ladder_jax.preparation import Job, prepare
from ladder_jax.profiling import Profile
from ladder_jax.progress import Measured, Output, Pace, Reports, Speed
from ladder_jax.rollback import BadStep
from ladder_jax.run_folder import Lease
from ladder_jax.saving import Checkpoints
from ladder_jax.say import Say
from ladder_jax.step_inputs import StepInputs
from ladder_jax.stop_signal import StopSignal
from ladder_jax.train_programs import (
    State,
    flops_per_token,
    init_state,
    make_evaluation,
    make_step,
    parameter_count,
    run_long_steps_in_turn,
)


class Summary(TypedDict):
    """What a run did: the numbers of its last reports, and where its files are."""

    step: int  # the last one
    out: str  # the run's folder, or its address, which `load` takes
    parameters: int
    plot: str | None  # the path of loss.png; None without matplotlib
    stopped: str | None  # the name of the signal that stopped it
    saved: bool  # whether there is a checkpoint
    rollbacks: int  # how often it went back to a checkpoint
    loss: NotRequired[float]  # of the last reported step, nats a token
    skipped_steps: NotRequired[int]  # with train.skip_steps: how many were left out
    # Of the last evaluation: nats a token, bits per byte, seconds.
    held_out_loss: NotRequired[float]
    held_out_bits_per_byte: NotRequired[float]
    evaluation_s: NotRequired[float]
    # With an annealed delay: how fresh it is, and the loss of the blended model.
    freshness: NotRequired[float]
    blended_held_out_loss: NotRequired[float]
    sample: NotRequired[str]  # if train.sample_tokens > 0


def train(
    config: Config, resume: bool = False, step_timeout: float = STEP_TIMEOUT
) -> Summary:
    """Trains until the last step, or until SIGTERM, Ctrl-C or SIGHUP, and then saves.

    Args:
      config: the run's.
      resume: whether to continue the run in train.out from its newest checkpoint, bit
        for bit as if it had not stopped. Without a checkpoint the run starts.
      step_timeout: seconds after which a step that does not end ends the process, with
        status 75. 0: never.

    On a CPU, where steps are long and this is the process's first use of JAX, all its
    programs then run in turn: a call returns when the program has ended. That keeps
    memory small, and stays so after this returns.

    Returns the final metrics and where the run's files are, as a dict (`Summary`).

    Raises ConfigError where the configuration, data or checkpoint does not fit, before
    it writes anything; FloatingPointError where steps are bad and the run cannot go
    back to a checkpoint any more (rollback.py; the last checkpoint stays good); OSError
    where a file cannot be written.
    """
    require(isinstance(config, Config), "config", config, "a ladder_jax.Config")
    run_long_steps_in_turn(config)
    with mirror.of_run(config.train, jax.process_index() == 0) as copy:
        return _train(config, resume, step_timeout, copy)


def _train(
    config: Config, resume: bool, step_timeout: float, copy: mirror.Mirror | None
) -> Summary:
    """`train`, in a folder of this machine, which `copy` copies to train.out."""
    # The stack closes its contexts in the opposite order.
    with (
        groups.of_this_run() as group,
        contextlib.ExitStack() as stack,
        groups.telling(group),
    ):
        output = stack.enter_context(Output(jax.process_index() == 0))
        stop, options = StopSignal(group), config.train

        # ---- checks, data and folder
        if group is not None:
            stack.enter_context(stop)
            agreement.start(group, config, resume)
        if is_address(options.out):
            start_copy(copy, group, resume, output.say)
        job = prepare(config, resume, output.say)
        batches, held_out = make_batches(job)
        if group is None:
            stack.enter_context(stop)
        else:
            values = agreement.contents(job.config, job.meta)
            group.together("the data", lambda: values, dict)
        watchdog = stack.enter_context(groups.watchdog(group, step_timeout))
        checkpoints = open_checkpoints(job, stack)
        if is_address(options.out):
            checkpoints.elsewhere = in_store(copy, group)

        # ---- state, programs and reports
        optimizer = make_optimizer(job.config.optimizer, options.steps)
        first, state, meta = begin(
            job, optimizer, checkpoints, batches, resume, output.say
        )
        output.say(describe(job.config, job.mesh, parameter_count(state.model)))
        if hosts := crossing.describe(job.mesh):
            output.say(hosts)
        inputs = StepInputs(job.config, job.mesh, job.parent, meta.get("anneal"))
        programs = make_programs(job, optimizer, inputs)
        speed = speed_of(job.config, job.mesh)
        identity.record(job.out, job.config, job.mesh, first, speed.peak)
        rollbacks = meta.get("rollbacks", 0)
        reports = open_reports(job, output, first, rollbacks, speed, stack)
        run = Run(
            job,
            optimizer,
            first,
            state,
            batches,
            held_out,
            inputs,
            programs,
            checkpoints,
            reports,
            rollbacks,
            copy,
        )
        if first == 0:
            run.measure_blend()

        stopped = _loop(run, first, output, stop, watchdog, stack)
    return summarize(run, stopped)


def _loop(
    run: "Run",
    first: int,
    output: Output,
    stop: StopSignal,
    watchdog: Watchdog,
    stack: contextlib.ExitStack,
) -> signal.Signals | None:
    """Takes the steps from `first` on; returns the signal that stops them, if any."""
    options = run.job.config.train
    folder = run.job.out / "profile"
    profile = stack.enter_context(
        Profile(folder, first + 2, options.profile_steps, output.say)
    )
    output.show_steps(first, options.steps)
    stopped, taken = None, 0  # steps; a rollback lowers run.step alone
    while run.step < options.steps and not (stopped := stop.requested(taken)):
        taken += 1
        profile.before_step(run.step, run.state)
        try:
            run.take_step()
            output.advance()
            run.report_unread()  # of the last step, while the device runs this one
            if run.step == first + 1:  # it took long because XLA compiled it
                jax.block_until_ready(run.results)
                run.reports.pace.restart(run.step)
                stop.started()
            watchdog.step(run.step)
            run.evaluate_save_or_report()
        except BadStep as bad:
            run.go_back(bad)
    if stopped and run.step > first:
        run.save_early()
    return stopped


class Programs(NamedTuple):
    """The functions of the loop. XLA compiles each when it first runs."""

    steps: dict[bool, Callable[..., Any]]  # by whether a step takes a freshness
    evaluation: Callable[..., Any]
    blended_evaluation: Callable[..., Any] | None  # with a freshness; None: no step has
    # (the number of a step, from 0; State.watch) -> its rate
    learning_rate: Callable[..., Any]


@dataclasses.dataclass
class Run:
    """A run in its loop: what a step changes, and what is done after it."""

    job: Job
    optimizer: optax.GradientTransformation
    step: int  # how many steps are complete
    state: State  # after them
    batches: Any  # the iterator over the batches of the steps to come
    held_out: Iterable[Batch]
    inputs: StepInputs
    programs: Programs
    checkpoints: Checkpoints
    reports: Reports
    rollbacks: int = 0  # how often it went back to a checkpoint
    copy: mirror.Mirror | None = None  # of its folder, in a store
    results: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    unread: Measured | None = None  # a step to report, which the device may still run
    summary: dict[str, Any] = dataclasses.field(default_factory=dict)

    def take_step(self) -> None:
        """Starts a training step, and does not wait for its end."""
        batch = to_devices(self.job.mesh, next(self.batches))
        train_step = self.programs.steps[self.inputs.annealing]
        inputs = self.inputs.for_step(self.step)
        # A small program of its own, which the device runs before the step.
        rate = self.programs.learning_rate(np.int32(self.step), self.state.watch)
        self.state, self.results = train_step(self.state, batch, *inputs)
        self.results["learning_rate"] = rate
        self.step += 1
        self.inputs.after_step()

    def evaluate_save_or_report(self) -> None:
        """Does what is due after a step. A step that only reports is not waited for."""
        options = self.job.config.train
        evaluating = self._due(options.eval_every)
        saving = self._due(options.save_every)
        if evaluating or saving:
            self._report(self._measured())
            if evaluating:
                self._evaluate()
            if saving:
                start = time.perf_counter()
                self._save()
                self.reports.save_s = time.perf_counter() - start
            self.reports.pace.restart(self.step)
        elif self._due(options.log_every):
            self.unread = self._measured()

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.job.config.train.steps

    def _measured(self) -> Measured:
        return self.reports.pace.measure(self.step, self.results)

    def report_unread(self) -> None:
        """Reports the step that was not waited for, if there is one."""
        if self.unread:
            self._report(self.unread)
            self.unread = None

    def _report(self, measured: Measured) -> None:
        values = rollback.check(measured, self.job.config.train)
        shown = ("loss", "skipped_steps")
        self.summary |= {name: values[name] for name in shown if name in values}
        self.reports.step(measured, values)

    def _evaluate(self) -> None:
        batches = self._first_held_out()
        values = evaluate(self.programs.evaluation, self.state, batches, self.job)
        values |= self.measure_blend()
        self.reports.evaluation(self.step, values)
        self.summary |= values

    def measure_blend(self) -> dict[str, float]:
        """Measures the blended model, on which the annealed delay waits.

        An empty dict where no delay is annealed.
        """
        blended = self.programs.blended_evaluation
        if blended is None or not self.inputs.annealing:
            return {}
        fresh = self.inputs.freshness(self.step)
        batches = self._first_held_out()
        values = evaluate(blended, self.state, batches, self.job, fresh)
        self.inputs.see(values["held_out_loss"])
        return dict(
            freshness=float(fresh["freshness"]),
            blended_held_out_loss=values["held_out_loss"],
        )

    def _first_held_out(self) -> Iterable[Batch]:
        return itertools.islice(self.held_out, self.job.config.train.eval_batches)

    def save_early(self) -> None:
        """Saves a run that was stopped, once its last step is known to be good."""
        try:
            if self.unread:
                self.report_unread()
            else:
                last = Measured(self.step, self.results)
                rollback.check(last, self.job.config.train)
        except BadStep as bad:
            raise self._end(bad) from None
        self._save()

    def _save(self) -> None:
        if self.copy is not None:
            self.copy.check()
        meta = self.job.meta | self.inputs.state()
        if self.rollbacks:
            meta |= dict(rollbacks=self.rollbacks)
        if self.state.watch is not None:
            meta |= dict(watch=self.state.watch.state())
        self.checkpoints.save(self.step, self.state.saved(), self.batches, meta)

    def go_back(self, bad: BadStep) -> None:
        """Goes back to the newest checkpoint. The iterator stays where it is.

        Raises FloatingPointError if there is none, or train.rollbacks are used up.
        """
        self.checkpoints.wait()
        most = self.job.config.train.rollbacks
        if not self.checkpoints.steps() or self.rollbacks >= most:
            raise self._end(bad)
        left, self.unread, self.results = self.step, None, {}
        del self.state  # the devices may not have memory for two
        self.step, self.state, meta = rollback.restore(
            self.job, self.optimizer, self.checkpoints
        )
        self.inputs.restore(meta.get("anneal"))
        self.rollbacks += 1
        self.reports.go_back(self.step, left - self.step, self.rollbacks, most, bad)

    def _end(self, bad: BadStep) -> FloatingPointError:
        self.checkpoints.wait()
        text = rollback.last_words(bad, self.checkpoints, self.rollbacks)
        return FloatingPointError(text)


# ---------------------------------------------------------------- stages of the job


def start_copy(
    copy: mirror.Mirror | None, group: groups.Group | None, resume: bool, say: Say
) -> None:
    """Process 0 copies what train.out, an address, has; the others wait for it."""

    def begin() -> None:
        if copy is not None:
            copy.begin(resume, say)

    if group is None:
        begin()
    else:
        group.first("a copy of train.out", begin)


def in_store(
    copy: mirror.Mirror | None, group: groups.Group | None
) -> dict[int, Callable[[], object]]:
    """The checkpoints at train.out, an address, that were not copied: {step: copies it,
    in process 0, while the others wait}.
    """

    def bring(step: int) -> None:
        if copy is not None:
            copy.bring(step)

    def bring_together(step: int) -> None:
        if group is None:
            bring(step)
        else:
            group.first(f"a copy of step {step} of train.out", lambda: bring(step))

    others = copy.others() if copy is not None else []
    if group is not None:
        text = group.from_first("train.out's checkpoints", lambda: json.dumps(others))
        others = json.loads(text)
    return {step: partial(bring_together, step) for step in others}


def make_batches(job: Job) -> tuple[Any, Iterable[Batch]]:
    """(the iterator over training batches, held-out batches), of this process's rows.

    Checkpoints store the position of the iterator.
    """
    options = job.config.train
    shard, shards = sharding.data_shard(job.mesh)
    split: dict[str, int] = dict(
        batch=options.global_batch // shards,
        length=options.seq_len,
        process_index=shard,
        process_count=shards,
    )
    batches = train_iterator(job.corpus, seed=options.seed, **split)
    return batches, held_out_batches(job.corpus, **split)


def open_checkpoints(job: Job, stack: contextlib.ExitStack) -> Checkpoints:
    """The run's checkpoints; `stack` closes them. One process has the folder's lease.

    Raises ConfigError where another job wrote some since `prepare`.
    """
    is_leader = jax.process_index() == 0
    lease = stack.enter_context(Lease(job.out)) if is_leader else None
    keep, failed = job.config.train.keep_checkpoints, None
    if (group := groups.current()) is not None:
        failed = group.fail
        if lease is not None:
            group.at_end.append(lease.__exit__)
    checkpoints = Checkpoints(job.out / "checkpoints", keep, lease, failed)
    stack.enter_context(checkpoints)
    if checkpoints.steps() and not job.saved:
        raise ConfigError(
            f"another job wrote checkpoints to train.out={str(job.out)!r} while this "
            "one started: continue it with --resume, or choose another folder"
        )
    return checkpoints


def begin(
    job: Job,
    optimizer: optax.GradientTransformation,
    checkpoints: Checkpoints,
    batches: Any,
    resume: bool,
    say: Say,
) -> tuple[int, State, dict[str, Any]]:
    """(step, state, meta) to go on from: the newest checkpoint's, or new ones.

    Moves the iterator `batches` to the batch that follows the checkpoint.
    """
    if job.saved:
        step, state, meta = rollback.restore(job, optimizer, checkpoints, batches)
        steps = job.config.train.steps
        say(f"resumed at step {step} of {steps} from {checkpoints.folder}")
        return step, state, meta
    state = init_state(job.config, job.mesh, optimizer)
    if resume:
        say(f"nothing to resume in {job.out}: starting at step 0")
    return 0, state, job.meta


def make_programs(
    job: Job, optimizer: optax.GradientTransformationExtraArgs, inputs: StepInputs
) -> Programs:
    """The functions of the loop; see `Programs`."""
    config, mesh = job.config, job.mesh
    steps = {
        annealing: make_step(config, mesh, optimizer, None, inputs.extras(annealing))
        for annealing in {inputs.anneal is not None, False}
    }
    blended = None if inputs.anneal is None else make_evaluation(config, mesh, True)
    schedule = learning_rate(config.optimizer, config.train.steps)

    def rate(step: jax.Array, watch: Any) -> jax.Array:
        # The optimizer has not counted the steps that were left out.
        return schedule(step if watch is None else step - watch.skipped)

    return Programs(steps, make_evaluation(config, mesh), blended, jax.jit(rate))


def open_reports(
    job: Job,
    output: Output,
    first: int,
    rollbacks: int,
    speed: Speed,
    stack: contextlib.ExitStack,
) -> Reports:
    """Reports to `output`, and to the files of metrics, which one process writes."""
    pace = stack.enter_context(Pace(first))
    metrics = None
    if output.leader:
        board = job.config.train.tensorboard
        metrics = stack.enter_context(Metrics(job.out, board, first, rollbacks))
    return Reports(output, metrics, pace, speed)


def describe(config: Config, mesh: jax.sharding.Mesh, count: int) -> str:
    """A line of text about a run's model and mesh."""
    sizes = " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    kind = mesh.devices.flat[0].device_kind
    return (
        f"{count:,} parameters, {config.model.residual} residual, "
        f"{config.model.dtype}, mesh {sizes} of {kind}"
    )


def speed_of(config: Config, mesh: jax.sharding.Mesh) -> Speed:
    """What a run's tokens a second and MFU are computed from."""
    options = config.train
    if options.peak_tflops:
        peak: float | None = options.peak_tflops * 1e12
    else:
        peak = chips.peak_flops(mesh.devices.flat[0], config.model.dtype)
    return Speed(
        tokens=options.global_batch * options.seq_len,
        steps=options.steps,
        flops=flops_per_token(config.model, options.seq_len),
        peak=peak and peak * mesh.size,
    )


def to_devices(mesh: jax.sharding.Mesh, batch: Batch) -> dict[str, jax.Array]:
    """A batch of this process's rows as global arrays."""
    shardings = sharding.named_shardings(mesh, sharding.TOKENS)
    return {
        name: jax.make_array_from_process_local_data(shardings, batch[name])
        for name in BATCH_FIELDS
    }


def evaluate(
    evaluation: Callable[..., Any],
    state: State,
    batches: Iterable[Batch],
    job: Job,
    *inputs: dict[str, Any],
) -> dict[str, float]:
    """The mean loss over held-out `batches`, in nats a token and in bits per byte.

    `inputs`: the last argument of `evaluation`, if it takes a freshness.
    """
    start = time.perf_counter()
    totals = [
        evaluation(state.model, to_devices(job.mesh, batch), *inputs)
        for batch in batches
    ]
    loss, weight = np.sum(jax.device_get(totals), axis=0)
    return dict(
        held_out_loss=float(loss / weight),
        held_out_bits_per_byte=float(job.corpus.held_out.bits_per_byte(loss / weight)),
        evaluation_s=time.perf_counter() - start,
    )


def summarize(run: Run, stopped: signal.Signals | None) -> Summary:
    """What `train` returns; draws the plot of a run that has ended and samples text."""
    job, options = run.job, run.job.config.train
    output, count = run.reports.output, parameter_count(run.state.model)
    summary: dict[str, Any] = run.summary | dict(
        step=run.step,
        out=options.out if is_address(options.out) else str(job.out),
        parameters=count,
        plot=None,
        stopped=stopped.name if stopped else None,
        saved=job.saved or run.step > 0,
        rollbacks=run.rollbacks,
    )
    if output.leader:
        picture = plot(job.out, f"{job.config.model.residual}, {count:,} parameters")
        summary["plot"] = picture and str(picture)
    if not stopped and options.sample_tokens:
        summary["sample"] = sample(job.config, job, run.state.model)
        output.say(f"---- the model writes:\n{summary['sample']}\n----")
    return cast(Summary, summary)


def sample(config: Config, job: Job, parameters: model.Transformer) -> str:
    """Text that the trained model generates, from the beginning of a document."""
    tokenizer = job.tokenizer
    ids = generate(
        parameters,
        config.model,
        job.mesh,
        tokenizer.prompt(""),
        max_tokens=config.train.sample_tokens,
        temperature=0.8,
        seed=config.train.seed,
        stop_token_ids=tokenizer.eos_ids,
        vocabulary=tokenizer.size,
    )
    return tokenizer.decode(list(ids))
