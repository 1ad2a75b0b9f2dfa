"""Runs the training job from start to end: mesh, data, model, optimizer, step, loop.

A run lives in the folder `train.out`: metrics.jsonl, checkpoints/<step>/, loss.png, and
tensorboard/ and profile/ where the configuration turns them on.
"""

import contextlib
import itertools
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict, cast

import jax
import numpy as np
import optax
from jax import lax
from jax.experimental import multihost_utils

from ladder_jax import attention, initial, model, schedule, sharding
from ladder_jax.checkpoint import (
    Checkpoints,
    read_meta,
    require_plain_name,
    saved_steps,
)
from ladder_jax.config import (
    Config,
    ConfigError,
    Data,
    Model,
    from_meta,
    require,
    to_dict,
)
from ladder_jax.data import corpus as corpora
from ladder_jax.data import tokenizer as tokenizers
from ladder_jax.data.batches import held_out_batches, train_iterator
from ladder_jax.generate import generate
from ladder_jax.hardware import chips, xla_options
from ladder_jax.interrupts import StopSignal
from ladder_jax.metrics import Metrics, plot, require_tensorboard
from ladder_jax.objective import (
    BATCH_FIELDS,
    BATCH_SPECS,
    NO_EXTRAS,
    Batch,
    Extras,
    loss_and_gradients,
)
from ladder_jax.optimizer import learning_rate, make_optimizer
from ladder_jax.progress import (
    Measured,
    Output,
    Pace,
    Reports,
    Speed,
)
from ladder_jax.run_folder import Lease
from ladder_jax.step_inputs import StepInputs

Say = Callable[[str], None]


# ---------------------------------------------------------------- state and step


class State(NamedTuple):
    """The arrays that a training step updates."""

    model: model.Transformer
    optimizer: Any


def abstract_state(
    config: Config, mesh: jax.sharding.Mesh, optimizer: optax.GradientTransformation
) -> State:
    """The state's shapes, dtypes and shardings on `mesh`; allocates nothing."""
    parameters = model.abstract(config.model)
    shapes = State(parameters, jax.eval_shape(optimizer.init, parameters))
    parameter_specs = sharding.parameter_specs(parameters)

    def is_model(node: object) -> bool:
        return isinstance(node, model.Transformer)

    # The optimizer's moments are shaped, and sharded, as the parameters.
    specs = jax.tree.map(
        lambda node: parameter_specs if is_model(node) else sharding.REPLICATED,
        shapes,
        is_leaf=is_model,
    )
    return sharding.abstract(shapes, mesh, specs)


def state_shardings(
    config: Config, mesh: jax.sharding.Mesh, optimizer: optax.GradientTransformation
) -> Any:
    """The state's tree of shardings on `mesh`."""
    return jax.tree.map(lambda x: x.sharding, abstract_state(config, mesh, optimizer))


def init_state(
    config: Config, mesh: jax.sharding.Mesh, optimizer: optax.GradientTransformation
) -> State:
    """A new state, with random parameters or those of train.init_from.

    Each device computes or loads its own shards and never holds more than them. Random
    values are the same on every mesh, except for rounding.
    """
    shardings = state_shardings(config, mesh, optimizer)
    if config.train.init_from:
        parameters = initial.load_weights(config, mesh)
        init_optimizer = jax.jit(optimizer.init, out_shardings=shardings.optimizer)
        return State(parameters, init_optimizer(parameters))

    def init() -> State:
        parameters = model.init(config.model, jax.random.key(config.train.seed))
        return State(parameters, optimizer.init(parameters))

    return jax.jit(init, out_shardings=shardings)()


def make_step(
    config: Config,
    mesh: jax.sharding.Mesh,
    optimizer: optax.GradientTransformationExtraArgs,
    kernel: str | None = None,
    extras: Extras = NO_EXTRAS,
) -> Callable[..., Any]:
    """The compiled training step: (state, batch) -> (state, results).

    It donates the state. `results` are scalars: loss (before the step), gradient_norm
    (before clipping) and parameter_norm (after the step; it is finite only if a
    checkpoint of the new state is); with a parent also divergence and cross_entropy,
    which make up the loss. With `extras` its third argument is a dict of their arrays.
    """
    gradients_of = loss_and_gradients(config, mesh, kernel, extras)
    specs = sharding.parameter_specs(model.abstract(config.model))
    norm_of = sharding.shard_map(
        lambda tree: sharding.norm(tree, specs), mesh, (specs,), sharding.REPLICATED
    )

    def step(
        state: State, batch: Batch, *inputs: Any
    ) -> tuple[State, dict[str, jax.Array]]:
        losses, gradients = gradients_of(state.model, batch, *inputs)
        norm = norm_of(gradients)
        updates, optimizer_state = optimizer.update(
            gradients, state.optimizer, state.model, norm=norm
        )
        parameters = optax.apply_updates(state.model, updates)
        results = losses | dict(gradient_norm=norm, parameter_norm=norm_of(parameters))
        return State(parameters, optimizer_state), results

    shardings = state_shardings(config, mesh, optimizer)
    inputs = (BATCH_SPECS, *extras.specs())
    return jax.jit(
        step,
        in_shardings=(shardings, *sharding.named_shardings(mesh, inputs)),
        out_shardings=(
            shardings,
            sharding.named_shardings(mesh, sharding.REPLICATED),
        ),
        donate_argnums=0,
        compiler_options=xla_options.options(mesh),
    )


def make_evaluation(
    config: Config, mesh: jax.sharding.Mesh, freshness: bool = False
) -> Callable[..., Any]:
    """(model, batch) -> (sum of losses in nats, sum of weights), compiled.

    With `freshness` its third argument is a dict with that array (objective.Extras).
    """
    platform = chips.platform(mesh)
    options: dict[str, Any] = dict(
        kernel=attention.kernel_for(platform, config.model, config.train.seq_len),
        chunk=config.train.loss_chunk,
    )

    def local(parameters: model.Transformer, batch: Batch, *inputs: Any) -> Any:
        fresh = dict(*inputs)
        loss = model.loss(parameters, config.model, batch, **options, **fresh)
        return lax.psum((loss, batch["weights"].sum()), sharding.BATCH_AXES)

    specs = sharding.parameter_specs(model.abstract(config.model))
    inputs = Extras(freshness=freshness).specs()
    results = (sharding.REPLICATED, sharding.REPLICATED)
    return jax.jit(
        sharding.shard_map(local, mesh, (specs, BATCH_SPECS, *inputs), results),
        compiler_options=xla_options.options(mesh),
    )


def flops_per_token(model_config: Model, length: int) -> int:
    """Model FLOPs of training on one token: 6 N + 12 L heads H T.

    In layers with a sliding window it stands for T if it is less.

    N is the number of parameters without the input embedding, which is not multiplied
    (a tied embedding counts once, as the output's). Attention counts all T x T
    products, not the causal half; recomputation does not count. MFU is this number
    times tokens a second, over the devices' peak. Source: PaLM (arXiv 2204.02311),
    appendix B."""
    count = parameter_count(model.abstract(model_config))
    if not model_config.tie_embeddings:
        count -= model_config.vocab_size * model_config.dim
    width = model_config.heads * model_config.head_dim
    seen = model_config.layers * length
    if model_config.sliding_window is not None:
        blocks = [b for layer in model_config.residual_schedule().layers for b in layer]
        windows = sum(block.window for block in blocks)
        seen -= windows * max(length - model_config.sliding_window, 0)
    return 6 * count + 12 * seen * width


def flops_per_step(config: Config) -> int:
    """Model FLOPs of a training step; JAX need not have started."""
    tokens = config.train.global_batch * config.train.seq_len
    return tokens * flops_per_token(config.model, config.train.seq_len)


def parameter_count(tree: Any) -> int:
    """The number of elements of all arrays in `tree`."""
    return sum(x.size for x in jax.tree.leaves(tree))


# ---------------------------------------------------------------- the job


class Job(NamedTuple):
    """A run after `prepare` has checked its configuration, data and folder."""

    config: Config  # with the model of train.init_from
    parent: Model | None  # the shape of distill.parent
    mesh: jax.sharding.Mesh
    tokenizer: tokenizers.Tokenizer
    corpus: corpora.Corpus
    out: Path
    meta: dict[str, Any]  # JSON that goes into every checkpoint
    saved: bool  # whether there is a checkpoint to resume from


class Summary(TypedDict):
    """What a run did: the numbers of its last reports, and where its files are."""

    step: int  # the last one
    out: str  # the run's folder, which `load` takes
    parameters: int
    plot: str | None  # the path of loss.png; None without matplotlib
    stopped: str | None  # the name of the signal that stopped it
    saved: bool  # whether there is a checkpoint
    loss: NotRequired[float]  # of the last reported step, nats a token
    # Of the last evaluation: nats a token, bits per byte, seconds.
    held_out_loss: NotRequired[float]
    held_out_bits_per_byte: NotRequired[float]
    evaluation_s: NotRequired[float]
    # With an annealed delay: how fresh it is, and the loss of the blended model.
    freshness: NotRequired[float]
    blended_held_out_loss: NotRequired[float]
    sample: NotRequired[str]  # if train.sample_tokens > 0


def train(config: Config, resume: bool = False) -> Summary:
    """Trains until the last step, or until SIGTERM, Ctrl-C or SIGHUP, and then saves.

    Args:
      config: the run's.
      resume: whether to continue the run in train.out from its newest checkpoint, bit
        for bit as if it had not stopped. Without a checkpoint the run starts.

    Returns the final metrics and the run's folder, as a dict (`Summary`).

    Raises ConfigError where the configuration, data or checkpoint does not fit, before
    it writes anything; FloatingPointError where a step is not finite (the last
    checkpoint stays good); OSError where a file cannot be written.
    """
    require(isinstance(config, Config), "config", config, "a ladder_jax.Config")
    leader = jax.process_index() == 0
    steps, out = config.train.steps, Path(config.train.out).expanduser()
    summary: dict[str, Any] = {}
    # The stack closes its contexts in the opposite order.
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(Output(leader))
        say = output.say

        # ---- checks and data
        job = prepare(config, resume, say)
        config, mesh, corpus = job.config, job.mesh, job.corpus
        shard, shards = sharding.data_shard(mesh)
        split = dict(
            batch=config.train.global_batch // shards,
            length=config.train.seq_len,
            process_index=shard,
            process_count=shards,
        )
        batches = train_iterator(corpus, seed=config.train.seed, **split)
        held_out = held_out_batches(corpus, **split)

        # ---- state, new or resumed
        stop = stack.enter_context(StopSignal(config.train.log_every))
        lease = stack.enter_context(Lease(out)) if leader else None
        checkpoints = stack.enter_context(
            Checkpoints(out / "checkpoints", config.train.keep_checkpoints, lease)
        )
        if checkpoints.steps() and not job.saved:
            raise ConfigError(
                f"another job wrote checkpoints to train.out={str(out)!r} while this "
                "one started: continue it with --resume, or choose another folder"
            )
        optimizer = make_optimizer(config.optimizer, steps)
        meta = job.meta
        if job.saved:
            first, state, meta = restore(config, job, optimizer, checkpoints, batches)
            say(f"resumed at step {first} of {steps} from {checkpoints.folder}")
        else:
            first, state = 0, init_state(config, mesh, optimizer)
            if resume:
                say(f"nothing to resume in {out}: starting at step 0")
        count = parameter_count(state.model)
        say(describe(config, mesh, count))

        # ---- programs and reports
        inputs = StepInputs(config, mesh, job.parent, meta.get("anneal"))
        # By whether a step takes a freshness. XLA compiles each when it first runs.
        train_steps = {
            annealing: make_step(
                config, mesh, optimizer, None, inputs.extras(annealing)
            )
            for annealing in {inputs.annealing, False}
        }
        evaluation = make_evaluation(config, mesh)
        blended = make_evaluation(config, mesh, True) if inputs.annealing else None
        rate = jax.jit(learning_rate(config.optimizer, steps))
        pace = stack.enter_context(Pace(first))
        metrics = None
        if leader:
            metrics = stack.enter_context(Metrics(out, config.train.tensorboard, first))
        reports = Reports(output, metrics, pace, speed_of(config, mesh))

        def report(measured: Measured) -> None:
            values = finite(measured, checkpoints)
            summary["loss"] = values["loss"]
            reports.step(measured, values)

        def first_held_out() -> Iterable[Batch]:
            return itertools.islice(held_out, config.train.eval_batches)

        def anneal(step: int) -> dict[str, float]:
            """Measures the blended model, on which the annealed delay waits."""
            if blended is None or not inputs.annealing:
                return {}
            fresh = inputs.freshness(step)
            values = evaluate(blended, state, first_held_out(), job, fresh)
            inputs.see(values["held_out_loss"])
            return dict(
                freshness=float(fresh["freshness"]),
                blended_held_out_loss=values["held_out_loss"],
            )

        if first == 0:
            anneal(0)

        # ---- loop
        def due(step: int, every: int) -> bool:
            return step % every == 0 or step == steps

        profile = stack.enter_context(
            Profile(out / "profile", first + 2, config.train.profile_steps, say)
        )
        output.show_steps(first, steps)
        step, stopped, unread = first, None, None
        while step < steps and not (stopped := stop.requested(step)):
            profile.before_step(step, state)
            batch = to_devices(mesh, next(batches))
            train_step = train_steps[inputs.annealing]
            state, results = train_step(state, batch, *inputs.for_step(step))
            # A small program of its own. The device runs it before the next step, since
            # the host queues it first.
            results["learning_rate"] = rate(np.int32(step))
            step += 1
            inputs.after_step()
            output.advance()
            if unread:  # the host reports the last step while the device runs this one
                report(unread)
                unread = None
            if step == first + 1:  # this step took long because XLA compiled it
                jax.block_until_ready(results)
                pace.restart(step)
            evaluating = due(step, config.train.eval_every)
            saving = due(step, config.train.save_every)
            if evaluating or saving:
                report(pace.measure(step, results))
                if evaluating:
                    values = evaluate(evaluation, state, first_held_out(), job)
                    values |= anneal(step)
                    reports.evaluation(step, values)
                    summary |= values
                if saving:
                    start = time.perf_counter()
                    meta = job.meta | inputs.state()
                    checkpoints.save(step, state._asdict(), batches, meta)
                    reports.save_s = time.perf_counter() - start
                pace.restart(step)
            elif due(step, config.train.log_every):
                unread = pace.measure(step, results)
        if stopped and step > first:
            if unread:
                report(unread)
            else:
                finite(Measured(step, results), checkpoints)
            meta = job.meta | inputs.state()
            checkpoints.save(step, state._asdict(), batches, meta)

    summary |= dict(
        step=step,
        out=str(out),
        parameters=count,
        plot=None,
        stopped=stopped.name if stopped else None,
        saved=job.saved or step > 0,
    )
    if leader:
        picture = plot(out, f"{config.model.residual}, {count:,} parameters")
        summary["plot"] = picture and str(picture)
    if not stopped and config.train.sample_tokens:
        summary["sample"] = sample(config, job, state.model)
        say(f"---- the model writes:\n{summary['sample']}\n----")
    return cast(Summary, summary)


# ---------------------------------------------------------------- stages of the job


def prepare(config: Config, resume: bool, say: Say) -> Job:
    """Checks the whole configuration. The only thing that it writes is the token cache.

    Raises ConfigError for the first mistake.
    """
    mesh = sharding.make_mesh(config.mesh)
    out = Path(config.train.out).expanduser()
    saved = saved_steps(out / "checkpoints")
    config, tokenizer, origin = initial.resolve(config, out, bool(saved and resume))
    check_anneal(config)
    check_vocabulary(config, mesh, tokenizer)
    rows = config.train.global_batch // config.train.grad_accum_steps
    sharding.check_fits(config.model, mesh, rows)
    sharding.data_shard(mesh)
    if config.train.tensorboard:
        require_tensorboard()
    check_writable(out, config.train.out)
    require_plain_name(out, "train.out")
    if saved and not resume:
        raise ConfigError(
            f"{out} already holds a run, at step {saved[-1]}: "
            "continue it with --resume, or choose another --train.out"
        )
    meta = dict(
        config=to_dict(config),
        tensor=mesh.shape[sharding.TENSOR],
        tokenizer=tokenizer.to_json(),
    )
    before = read_meta(out) if saved else meta
    check_resumed(before, meta, out)
    parent = initial.parent_model(config, mesh, tokenizer)
    corpus = prepare_corpus(config.data, tokenizer).cut(config.train.seq_len)
    for line in (origin, corpus.report):
        if line:
            say(line)
    meta["corpus"] = [corpus.train.tokens, corpus.held_out.tokens]
    meta["documents"] = corpus.digest
    check_resumed(meta | before, meta, out)
    return Job(config, parent, mesh, tokenizer, corpus, out, meta, bool(saved))


def check_anneal(config: Config) -> None:
    """Raises ConfigError where distill.anneal_steps has no delay to anneal."""
    notation, layers = config.model.residual, config.model.layers
    blocks = [b for layer in schedule.parse(notation, layers).layers for b in layer]
    if config.distill.anneal_steps and not any(block.delay for block in blocks):
        raise ConfigError(
            f"distill.anneal_steps={config.distill.anneal_steps} is not accepted with "
            f"model.residual={notation!r}, which has no delay: it must be 0"
        )


def check_vocabulary(
    config: Config, mesh: jax.sharding.Mesh, tokenizer: tokenizers.Tokenizer
) -> None:
    """Raises ConfigError where model.vocab_size does not fit tokenizer or mesh."""
    size, tensor = config.model.vocab_size, mesh.shape[sharding.TENSOR]
    if size < tokenizer.size:
        raise ConfigError(
            f"model.vocab_size={size} is smaller than the {tokenizer.size} tokens of "
            f"data.tokenizer={config.data.tokenizer!r}: it must be at least that"
        )
    if size % tensor:
        # No text contains the ids from the tokenizer's size on: the model learns not to
        # predict them, and sampling never draws them.
        raise ConfigError(
            f"model.vocab_size={size} does not divide by mesh.tensor={tensor}: use "
            f"--model.vocab-size {size + -size % tensor}, which pads the embedding "
            "with ids that the tokenizer does not use"
        )


def check_writable(out: Path, value: str) -> None:
    """Raises ConfigError where train.out=`value`, the folder `out`, is not writable."""
    parent = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise ConfigError(
            f"train.out={value!r} is not accepted: {parent} is not a folder that can "
            "be written to"
        )


# The fields that a resumed run may not change. None: every field of the section.
FROZEN: dict[str, tuple[str, ...] | None] = {
    "model": None,
    "data": ("format", "text_field", "train_on", "held_out_fraction"),
    "train": ("global_batch", "seq_len", "seed"),
}


def check_resumed(
    saved: Mapping[str, Any], now: Mapping[str, Any], where: object = "the run"
) -> None:
    """Raises ConfigError where a resumed run would differ from the saved run.

    Args:
      saved: a checkpoint's meta (checkpoint.read_meta).
      now: the meta that this run would save.
      where: names the checkpoint.
    """

    def same(name: str, old: object, new: object, advice: str) -> None:
        if old != new:
            raise ConfigError(
                f"{name} was {old!r} in the run to resume and is {new!r} now: {advice}"
            )

    before, after = from_meta(saved, where), from_meta(now, where)
    advice = "keep it, or start a new run in another train.out"
    for section, names in FROZEN.items():
        old, new = getattr(before, section), getattr(after, section)
        for name in names or to_dict(new):
            same(f"{section}.{name}", getattr(old, name), getattr(new, name), advice)
    residual = after.model.residual
    if schedule.parse(residual, after.model.layers).local:
        advice = f"a {residual} model keeps it for life"
        same("mesh.tensor", saved["tensor"], now["tensor"], advice)
    # The files may have moved. An old checkpoint has no digest of the documents.
    for field, contents in (
        ("tokenizer", "tokenizer"),
        ("source", "corpus"),
        ("source", "documents"),
    ):
        if contents not in saved or contents not in now:
            continue
        old, new = saved[contents], now[contents]
        if contents == "tokenizer":  # what belongs to prompts alone may change
            old, new = (tokenizers.from_json(x).documents_json() for x in (old, new))
        if old != new:
            value = getattr(after.data, field)
            raise ConfigError(
                f"data.{field}={value!r} has other contents now than in the run to "
                "resume: restore them, or start a new run in another train.out"
            )


def prepare_corpus(
    data_config: Data, tokenizer: tokenizers.Tokenizer
) -> corpora.Corpus:
    """The corpus. Process 0 tokenises it; then the others read its token cache."""
    several = jax.process_count() > 1
    if several and jax.process_index():
        multihost_utils.sync_global_devices("corpus")
    corpus = corpora.prepare(data_config, tokenizer)
    if several and not jax.process_index():
        multihost_utils.sync_global_devices("corpus")
    return corpus


def restore(
    config: Config,
    job: Job,
    optimizer: optax.GradientTransformation,
    checkpoints: Checkpoints,
    batches: Any,
) -> tuple[int, State, dict[str, Any]]:
    """(step, state, meta) of the newest checkpoint. Moves the iterator `batches` to the
    batch that follows it."""
    abstract = abstract_state(config, job.mesh, optimizer)._asdict()
    saved = job.meta["config"]
    step, arrays, meta = checkpoints.restore(abstract, batches, config=saved)
    return step, State(**arrays), meta


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


def finite(measured: Measured, checkpoints: Checkpoints) -> dict[str, float]:
    """Waits for the results of a step, and returns them as numbers.

    Raises FloatingPointError where one is not finite.
    """
    values = {name: float(value) for name, value in measured.results.items()}
    if all(map(math.isfinite, values.values())):
        return values
    checkpoints.wait()
    saved = checkpoints.steps()
    state = "stopped, before any checkpoint"
    if saved:
        state = f"stopped; the checkpoint of step {saved[-1]} is good"
    values.pop("learning_rate")
    numbers = ", ".join(f"{name} {value}" for name, value in values.items())
    raise FloatingPointError(
        f"step {measured.step} is not finite ({numbers}): {state}. Try a lower "
        "optimizer.learning_rate or more optimizer.warmup_steps"
    )


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


class Profile(contextlib.AbstractContextManager):
    """Writes a profiler's trace of `count` steps after step `first`. 0: no trace."""

    def __init__(self, folder: Path, first: int, count: int, say: Say) -> None:
        self.folder, self.say = folder, say
        self.steps = range(first, first + count)
        self.running = False

    def before_step(self, step: int, state: State) -> None:
        """Starts the trace before its first step, and ends it after its last one.

        Call it before every step: `step` steps are complete.
        """
        if self.running == (step in self.steps):
            return
        jax.block_until_ready(state)
        if self.running:
            self._stop()
        else:
            jax.profiler.start_trace(str(self.folder))
            self.running = True

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self.running = False
        self.say(f"profile from step {self.steps.start + 1} on: {self.folder}")

    def __exit__(self, *_: object) -> None:
        if self.running:
            self._stop()
