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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.experimental import multihost_utils

from ladder_jax import attention, model, schedule, sharding
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
    to_dict,
)
from ladder_jax.data import corpus as corpora
from ladder_jax.data import tokenizer as tokenizers
from ladder_jax.data.batches import held_out_batches, train_iterator
from ladder_jax.generate import generate
from ladder_jax.hardware import chips, xla_options
from ladder_jax.interrupts import StopSignal
from ladder_jax.metrics import Metrics, plot, require_tensorboard
from ladder_jax.optimizer import learning_rate, make_optimizer
from ladder_jax.progress import (
    Measured,
    Output,
    Pace,
    Reports,
    Speed,
)
from ladder_jax.residual import choose
from ladder_jax.run_folder import Lease

# The arrays of a batch, each [B, T] (see data/corpus.py).
BATCH_FIELDS = ("tokens", "targets", "segments", "positions", "weights")
BATCH_SPECS = dict.fromkeys(BATCH_FIELDS, sharding.TOKENS)

Batch = Mapping[str, Any]  # of jax or NumPy arrays, by BATCH_FIELDS
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
    """A new state. Each device computes its own shards and never holds more than them.

    The values are the same on every mesh, except for rounding.
    """

    def init() -> State:
        parameters = model.init(config.model, jax.random.key(config.train.seed))
        return State(parameters, optimizer.init(parameters))

    shardings = state_shardings(config, mesh, optimizer)
    return jax.jit(init, out_shardings=shardings)()


def loss_and_gradients(
    config: Config, mesh: jax.sharding.Mesh, kernel: str | None = None
) -> Callable[..., Any]:
    """(model, batch) -> (mean loss in nats a token, gradients), over the whole batch.

    Args:
      config: the run's.
      mesh: of the global arrays that the function takes and returns.
      kernel: of attention. None: see attention.kernel_for.
    """
    platform = chips.platform(mesh)
    kernel = kernel or attention.kernel_for(
        platform, config.model, config.train.seq_len
    )
    # On a CPU, XLA converts a scan's whole stack of bfloat16 activations at every
    # layer. Unrolled layers have no such stack, but take longer to compile. An emulated
    # mesh is for trials, where a short compilation matters more.
    unroll = platform == "cpu" and mesh.size == 1
    reduction = choose.reduction_for(config.mesh.reduction, config.model, mesh)
    options: dict[str, Any] = dict(
        kernel=kernel,
        reduction=reduction,
        remat=config.train.remat,
        unroll=unroll,
        chunk=config.train.loss_chunk,
    )
    parts = config.train.grad_accum_steps

    def local(parameters: model.Transformer, batch: Batch) -> Any:
        weight = jnp.maximum(lax.psum(batch["weights"].sum(), sharding.BATCH_AXES), 1)
        objective = jax.value_and_grad(
            lambda m, part: model.loss(m, config.model, part, **options) / weight
        )
        if parts == 1:
            loss, gradients = objective(parameters, batch)
        else:
            loss, gradients = accumulate(objective, parameters, batch, parts)
        loss = lax.psum(loss, sharding.BATCH_AXES)
        return loss, sharding.sum_gradients(gradients, specs)

    specs = sharding.parameter_specs(model.abstract(config.model))
    return sharding.shard_map(
        local, mesh, (specs, BATCH_SPECS), (sharding.REPLICATED, specs)
    )


def accumulate(
    objective: Callable[..., Any],
    parameters: model.Transformer,
    batch: Batch,
    parts: int,
) -> Any:
    """Splits a batch into `parts`, and sums `objective` (loss, gradients) over them."""

    def add(total: Any, part: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, objective(parameters, part)), None

    batches = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)
    zeros = jnp.float32(0), jax.tree.map(jnp.zeros_like, parameters)
    return lax.scan(add, zeros, batches)[0]


def make_step(
    config: Config,
    mesh: jax.sharding.Mesh,
    optimizer: optax.GradientTransformationExtraArgs,
    kernel: str | None = None,
) -> Callable[..., Any]:
    """The compiled training step: (state, batch) -> (state, results).

    It donates the state. `results` are scalars: loss (before the step), gradient_norm
    (before clipping) and parameter_norm (after the step; it is finite only if a
    checkpoint of the new state is).
    """
    gradients_of = loss_and_gradients(config, mesh, kernel)
    specs = sharding.parameter_specs(model.abstract(config.model))
    norm_of = sharding.shard_map(
        lambda tree: sharding.norm(tree, specs), mesh, (specs,), sharding.REPLICATED
    )

    def step(state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        loss, gradients = gradients_of(state.model, batch)
        norm = norm_of(gradients)
        updates, optimizer_state = optimizer.update(
            gradients, state.optimizer, state.model, norm=norm
        )
        parameters = optax.apply_updates(state.model, updates)
        results = dict(
            loss=loss, gradient_norm=norm, parameter_norm=norm_of(parameters)
        )
        return State(parameters, optimizer_state), results

    shardings = state_shardings(config, mesh, optimizer)
    return jax.jit(
        step,
        in_shardings=(shardings, sharding.named_shardings(mesh, BATCH_SPECS)),
        out_shardings=(
            shardings,
            sharding.named_shardings(mesh, sharding.REPLICATED),
        ),
        donate_argnums=0,
        compiler_options=xla_options.options(mesh),
    )


def make_evaluation(config: Config, mesh: jax.sharding.Mesh) -> Callable[..., Any]:
    """(model, batch) -> (sum of losses in nats, sum of weights), compiled."""
    platform = chips.platform(mesh)
    options: dict[str, Any] = dict(
        kernel=attention.kernel_for(platform, config.model, config.train.seq_len),
        chunk=config.train.loss_chunk,
    )

    def local(parameters: model.Transformer, batch: Batch) -> Any:
        loss = model.loss(parameters, config.model, batch, **options)
        return lax.psum((loss, batch["weights"].sum()), sharding.BATCH_AXES)

    specs = sharding.parameter_specs(model.abstract(config.model))
    results = (sharding.REPLICATED, sharding.REPLICATED)
    return jax.jit(
        sharding.shard_map(local, mesh, (specs, BATCH_SPECS), results),
        compiler_options=xla_options.options(mesh),
    )


def flops_per_token(model_config: Model, length: int) -> int:
    """Model FLOPs of training on one token: 6 N + 12 L heads H T.

    N is the number of parameters without the input embedding, which is not multiplied
    (a tied embedding counts once, as the output's). Attention counts all T x T
    products, not the causal half; recomputation does not count. MFU is this number
    times tokens a second, over the devices' peak. Source: PaLM (arXiv 2204.02311),
    appendix B."""
    count = parameter_count(model.abstract(model_config))
    if not model_config.tie_embeddings:
        count -= model_config.vocab_size * model_config.dim
    width = model_config.heads * model_config.head_dim
    return 6 * count + 12 * model_config.layers * width * length


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

    mesh: jax.sharding.Mesh
    tokenizer: tokenizers.Tokenizer
    corpus: corpora.Corpus
    out: Path
    meta: dict[str, Any]  # JSON that goes into every checkpoint
    saved: bool  # whether there is a checkpoint to resume from


def train(config: Config, resume: bool = False) -> dict[str, Any]:
    """Trains until the last step, or until SIGTERM, Ctrl-C or SIGHUP, and then saves.

    Args:
      config: the run's.
      resume: whether to continue the run in train.out from its newest checkpoint, bit
        for bit as if it had not stopped. Without a checkpoint the run starts.
    Returns step, out, parameters, plot (a path or None), stopped (the signal's name or
      None), saved (whether there is a checkpoint); held_out_loss and
      held_out_bits_per_byte of the last evaluation; sample, if train.sample_tokens > 0.
    Raises ConfigError where the configuration, data or checkpoint does not fit, before
      it writes anything; FloatingPointError where a step is not finite (the last
      checkpoint stays good); OSError where a file cannot be written.
    """
    leader = jax.process_index() == 0
    steps, out = config.train.steps, Path(config.train.out).expanduser()
    summary: dict[str, Any] = {}
    # The stack closes its contexts in the opposite order.
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(Output(leader))
        say = output.say

        # ---- checks and data
        job = prepare(config, resume, say)
        mesh, corpus = job.mesh, job.corpus
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
        if job.saved:
            first, state = restore(config, job, optimizer, checkpoints, batches)
            say(f"resumed at step {first} of {steps} from {checkpoints.folder}")
        else:
            first, state = 0, init_state(config, mesh, optimizer)
            if resume:
                say(f"nothing to resume in {out}: starting at step 0")
        count = parameter_count(state.model)
        say(describe(config, mesh, count))

        # ---- programs and reports
        train_step = make_step(config, mesh, optimizer)
        evaluation = make_evaluation(config, mesh)
        rate = jax.jit(learning_rate(config.optimizer, steps))
        pace = stack.enter_context(Pace(first))
        metrics = None
        if leader:
            metrics = stack.enter_context(Metrics(out, config.train.tensorboard, first))
        reports = Reports(output, metrics, pace, speed_of(config, mesh))

        def report(measured: Measured) -> None:
            reports.step(measured, finite(measured, checkpoints))

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
            state, results = train_step(state, to_devices(mesh, next(batches)))
            # A small program of its own. The device runs it before the next step, since
            # the host queues it first.
            results["learning_rate"] = rate(np.int32(step))
            step += 1
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
                    first_ones = itertools.islice(held_out, config.train.eval_batches)
                    values = evaluate(evaluation, state, first_ones, job)
                    reports.evaluation(step, values)
                    summary |= values
                if saving:
                    start = time.perf_counter()
                    checkpoints.save(step, state._asdict(), batches, job.meta)
                    reports.save_s = time.perf_counter() - start
                pace.restart(step)
            elif due(step, config.train.log_every):
                unread = pace.measure(step, results)
        if stopped and step > first:
            if unread:
                report(unread)
            else:
                finite(Measured(step, results), checkpoints)
            checkpoints.save(step, state._asdict(), batches, job.meta)

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
    return summary


# ---------------------------------------------------------------- stages of the job


def prepare(config: Config, resume: bool, say: Say) -> Job:
    """Checks the whole configuration. The only thing that it writes is the token cache.

    Raises ConfigError for the first mistake.
    """
    mesh = sharding.make_mesh(config.mesh)
    tokenizer = tokenizers.load(config.data.tokenizer)
    check_vocabulary(config, mesh, tokenizer)
    rows = config.train.global_batch // config.train.grad_accum_steps
    sharding.check_fits(config.model, mesh, rows)
    sharding.data_shard(mesh)
    if config.train.tensorboard:
        require_tensorboard()
    out = Path(config.train.out).expanduser()
    check_writable(out, config.train.out)
    require_plain_name(out, "train.out")
    saved = saved_steps(out / "checkpoints")
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
    corpus = prepare_corpus(config.data, tokenizer)
    say(corpus.report)
    meta["corpus"] = [corpus.train.tokens, corpus.held_out.tokens]
    meta["documents"] = corpus.digest
    check_resumed(meta | before, meta, out)
    return Job(mesh, tokenizer, corpus, out, meta, bool(saved))


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
    "data": ("text_field", "held_out_fraction"),
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
        comparable = contents in saved and contents in now
        if comparable and saved[contents] != now[contents]:
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
) -> tuple[int, State]:
    """(step, state) of the newest checkpoint. Moves the iterator `batches` to the batch
    that follows it."""
    abstract = abstract_state(config, job.mesh, optimizer)._asdict()
    saved = job.meta["config"]
    step, arrays, _ = checkpoints.restore(abstract, batches, config=saved)
    return step, State(**arrays)


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
    evaluation: Callable[..., Any], state: State, batches: Iterable[Batch], job: Job
) -> dict[str, float]:
    """The mean loss over held-out `batches`, in nats a token and in bits per byte."""
    start = time.perf_counter()
    totals = [evaluation(state.model, to_devices(job.mesh, batch)) for batch in batches]
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
        stop_token_ids=(tokenizer.eos,),
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
