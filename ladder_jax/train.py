"""The training job, from start to end: mesh, data, model, optimizer, step, loop.

A run lives in `train.out`: metrics.jsonl, checkpoints/<step>/, loss.png, and tensorboard/ and profile/ where asked for.
"""

import contextlib
import functools
import itertools
import math
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.experimental import multihost_utils
from tqdm import tqdm

from ladder_jax import attention, model, schedule, sharding
from ladder_jax import config as configuration
from ladder_jax.checkpoint import (
    Checkpoints,
    read_meta,
    require_plain_name,
    saved_steps,
)
from ladder_jax.config import ConfigError
from ladder_jax.data import tokenizer
from ladder_jax.data.batches import held_out_batches, train_iterator
from ladder_jax.data.corpus import prepare
from ladder_jax.generate import generate
from ladder_jax.hardware import chips, xla_options
from ladder_jax.metrics import Metrics, plot, require_tensorboard
from ladder_jax.optimizer import learning_rate, make_optimizer
from ladder_jax.residual import choose
from ladder_jax.run_folder import Lease

BATCH_FIELDS = (
    "tokens",
    "targets",
    "segments",
    "positions",
    "weights",
)  # what data.py gives, each [B, T]


# ---------------------------------------------------------------- state and step


class State(NamedTuple):
    """All that a step changes."""

    model: model.Transformer
    optimizer: Any


def abstract_state(config, mesh, optimizer):
    """The state's shapes, dtypes and shardings on `mesh`; nothing is allocated."""
    parameters = model.abstract(config.model)
    shapes = State(parameters, jax.eval_shape(optimizer.init, parameters))
    specs = sharding.parameter_specs(parameters)
    is_model = lambda x: isinstance(x, model.Transformer)
    specs = jax.tree.map(
        lambda x: specs if is_model(x) else sharding.REPLICATED,
        shapes,
        is_leaf=is_model,
    )
    return sharding.abstract(shapes, mesh, specs)


def init_state(config, mesh, optimizer):
    """A fresh state, made where it will live: no device holds more than its shards. The same on every mesh, but for
    the last bits."""

    def make():
        parameters = model.init(config.model, jax.random.key(config.train.seed))
        return State(parameters, optimizer.init(parameters))

    shardings = jax.tree.map(
        lambda x: x.sharding, abstract_state(config, mesh, optimizer)
    )
    return jax.jit(make, out_shardings=shardings)()


def loss_and_gradients(config, mesh, kernel=None):
    """(model, batch) -> (mean loss in nats a token, gradients): both over the whole batch, global arrays.

    `kernel` of attention: by default, what suits the platform.
    """
    kernel = kernel or attention.kernel_for(
        chips.platform(mesh), config.model, config.train.seq_len
    )
    # XLA on CPUs converts a scan's whole stack of bfloat16 activations at every layer; unrolled, there is no stack.
    # On an emulated mesh, which is for trying things out, time to compile counts for more.
    unroll = chips.platform(mesh) == "cpu" and mesh.size == 1
    reduction = choose.reduction_for(config.mesh.reduction, config.model, mesh)
    options = dict(
        kernel=kernel,
        reduction=reduction,
        remat=config.train.remat,
        unroll=unroll,
        chunk=config.train.loss_chunk,
    )

    def local(parameters, batch):
        weight = jnp.maximum(lax.psum(batch["weights"].sum(), sharding.BATCH_AXES), 1)
        objective = jax.value_and_grad(
            lambda m, part: model.loss(m, config.model, part, **options) / weight
        )
        count = config.train.grad_accum_steps
        if count == 1:
            loss, gradients = objective(parameters, batch)
        else:
            parts = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), batch)
            add = lambda total, part: (
                jax.tree.map(jnp.add, total, objective(parameters, part)),
                None,
            )
            zeros = jnp.float32(0), jax.tree.map(jnp.zeros_like, parameters)
            (loss, gradients), _ = lax.scan(add, zeros, parts)
        return lax.psum(loss, sharding.BATCH_AXES), sharding.sum_gradients(
            gradients, specs
        )

    parameters = model.abstract(config.model)
    specs = sharding.parameter_specs(parameters)
    return sharding.shard_map(
        local,
        mesh,
        (specs, dict.fromkeys(BATCH_FIELDS, sharding.TOKENS)),
        (sharding.REPLICATED, specs),
    )


def make_step(config, mesh, optimizer, kernel=None):
    """The compiled training step: (state, batch) -> (state, results). The state is donated.

    results: loss (before the step), gradient_norm (before clipping), parameter_norm (after the step; it says whether
    what would be saved is finite).
    """
    gradients_of = loss_and_gradients(config, mesh, kernel)
    specs = sharding.parameter_specs(model.abstract(config.model))
    norm_of = sharding.shard_map(
        lambda tree: sharding.norm(tree, specs), mesh, (specs,), sharding.REPLICATED
    )

    def step(state, batch):
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

    shardings = jax.tree.map(
        lambda x: x.sharding, abstract_state(config, mesh, optimizer)
    )
    tokens = sharding.named_shardings(
        mesh, dict.fromkeys(BATCH_FIELDS, sharding.TOKENS)
    )
    replicated = sharding.named_shardings(mesh, sharding.REPLICATED)
    return jax.jit(
        step,
        in_shardings=(shardings, tokens),
        out_shardings=(shardings, replicated),
        donate_argnums=0,
        compiler_options=xla_options.options(mesh),
    )


def make_evaluation(config, mesh):
    """(model, batch) -> (sum of losses in nats, sum of weights) over the batch, compiled."""
    kernel = attention.kernel_for(
        chips.platform(mesh), config.model, config.train.seq_len
    )

    def local(parameters, batch):
        loss = model.loss(
            parameters,
            config.model,
            batch,
            kernel=kernel,
            chunk=config.train.loss_chunk,
        )
        return lax.psum((loss, batch["weights"].sum()), sharding.BATCH_AXES)

    parameters = model.abstract(config.model)
    specs = sharding.parameter_specs(parameters)
    return jax.jit(
        sharding.shard_map(
            local,
            mesh,
            (specs, dict.fromkeys(BATCH_FIELDS, sharding.TOKENS)),
            (sharding.REPLICATED, sharding.REPLICATED),
        ),
        compiler_options=xla_options.options(mesh),
    )


def flops_per_token(config, length):
    """Model FLOPs of training on one token, PaLM's count (arXiv 2204.02311, appendix B): 6 N + 12 L heads H T.

    N is the number of parameters without the input embedding, which is looked up, not multiplied (a tied one is, as
    the output's). Attention is counted in full, not halved for causality; recomputation is not counted. The model's
    FLOPs utilisation, MFU, is this times tokens a second, over the devices' peak (chips.py).
    """
    sizes = jax.tree.map(lambda x: x.size, model.abstract(config))
    count = sum(jax.tree.leaves(sizes)) - (
        0 if config.tie_embeddings else config.vocab_size * config.dim
    )
    return 6 * count + 12 * config.layers * config.heads * config.head_dim * length


# ---------------------------------------------------------------- the job

FROZEN = {
    "model": None,
    "data": ("text_field", "held_out_fraction"),
    "train": ("global_batch", "seq_len", "seed"),
}  # what a resumed run may not change


def check_resumed(saved, now):
    """Raises ConfigError where going on with `now` would not continue the run that saved `saved` (both: meta)."""

    def same(
        name, before, after, advice="keep it, or start a new run in another train.out"
    ):
        if before != after:
            raise ConfigError(
                f"{name} was {before!r} in the run to resume and is {after!r} now: {advice}"
            )

    before, after = (configuration.from_dict(meta["config"]) for meta in (saved, now))
    for section, names in FROZEN.items():
        old, new = getattr(before, section), getattr(after, section)
        for name in names or configuration.to_dict(new):
            same(f"{section}.{name}", getattr(old, name), getattr(new, name))
    if schedule.parse(after.model.residual, after.model.layers).local:
        same(
            "mesh.tensor",
            saved["tensor"],
            now["tensor"],
            f"a {after.model.residual} model keeps it for life",
        )
    # The files may have moved. An old checkpoint has no digest of the documents.
    for field, contents in (
        ("tokenizer", "tokenizer"),
        ("source", "corpus"),
        ("source", "documents"),
    ):
        comparable = contents in saved and contents in now
        if comparable and saved[contents] != now[contents]:
            raise ConfigError(
                f"data.{field}={getattr(after.data, field)!r} has other contents now than in the run to "
                "resume: restore them, or start a new run in another train.out"
            )


def train(config, resume=False):
    """Runs the job of `config` (config.Config) to its end, or until SIGTERM or Ctrl-C, and returns a summary (dict).

    Without `resume` the run must be new. With it, the run in train.out goes on from its newest checkpoint, bit for bit
    as if it had not stopped; where there is none yet, it starts.

    Raises ConfigError where the configuration, data or checkpoint does not fit, before anything is written;
    FloatingPointError on a step that is not finite (the last checkpoint stays good); OSError where a write fails.
    """
    leader = jax.process_index() == 0

    def say(text):
        if leader:
            tqdm.write(text, file=sys.stdout)  # above the progress bar
            sys.stdout.flush()  # line by line, also into a pipe

    # ---- everything that can be wrong, before anything is written
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_fits(
        config.model, mesh, config.train.global_batch // config.train.grad_accum_steps
    )
    shard, shards = sharding.data_shard(mesh)
    tokens = tokenizer.load(config.data.tokenizer)
    if tokens.size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size={config.model.vocab_size} is smaller than the {tokens.size} tokens of "
            f"data.tokenizer={config.data.tokenizer!r}: it must be at least that"
        )
    if config.train.tensorboard:
        require_tensorboard()
    out = Path(config.train.out).expanduser()
    parent = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise ConfigError(
            f"train.out={config.train.out!r} is not accepted: {parent} is not a folder that can be "
            "written to"
        )
    require_plain_name(out, "train.out")
    saved = saved_steps(out / "checkpoints")
    if saved and not resume:
        raise ConfigError(
            f"{out} already holds a run, at step {saved[-1]}: "
            "continue it with --resume, or choose another --train.out"
        )
    meta = dict(
        config=configuration.to_dict(config),
        tensor=mesh.shape[sharding.TENSOR],
        tokenizer=tokens.to_json(),
    )
    before = read_meta(out) if saved else meta
    check_resumed(before, meta)
    corpus = _prepare(config.data, tokens)
    say(corpus.report)
    meta["corpus"] = [corpus.train.tokens, corpus.held_out.tokens]
    meta["documents"] = corpus.digest
    check_resumed(meta | before, meta)

    # ---- data
    split = dict(
        batch=config.train.global_batch // shards,
        length=config.train.seq_len,
        process_index=shard,
        process_count=shards,
    )
    batches = train_iterator(corpus, seed=config.train.seed, **split)
    held_out = held_out_batches(corpus, **split)
    placed = functools.partial(_place, sharding.named_shardings(mesh, sharding.TOKENS))

    with (
        contextlib.ExitStack() as opened
    ):  # closed in the opposite order, whatever happens
        stop = opened.enter_context(_Stop(config.train.log_every))
        lease = opened.enter_context(Lease(out)) if leader else None
        checkpoints = opened.enter_context(
            Checkpoints(out / "checkpoints", config.train.keep_checkpoints, lease)
        )
        if checkpoints.steps() and not saved:
            raise ConfigError(
                f"another job wrote checkpoints to train.out={str(out)!r} while this "
                "one started: go on from them with --resume, or choose another folder"
            )

        # ---- state, new or resumed
        optimizer = make_optimizer(config.optimizer, config.train.steps)
        if saved:
            wanted = abstract_state(config, mesh, optimizer)._asdict()
            first, restored, _ = checkpoints.restore(
                wanted, batches, config=meta["config"]
            )
            state = State(**restored)
            say(
                f"resumed at step {first} of {config.train.steps} from {checkpoints.folder}"
            )
        else:
            first, state = 0, init_state(config, mesh, optimizer)
            if resume:
                say(f"nothing to resume in {out}: starting at step 0")
        count = sum(x.size for x in jax.tree.leaves(state.model))
        say(
            f"{count:,} parameters, {config.model.residual} residual, {config.model.dtype}, mesh "
            + " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
            + f" of {mesh.devices.flat[0].device_kind}"
        )

        # ---- programs, and what is known of their speed
        step_function = make_step(config, mesh, optimizer)
        evaluation = make_evaluation(config, mesh)
        rate = learning_rate(config.optimizer, config.train.steps)
        rates = jax.device_get(jax.jit(jax.vmap(rate))(jnp.arange(config.train.steps)))
        flops = flops_per_token(config.model, config.train.seq_len)
        peak = (
            config.train.peak_tflops * 1e12
            if config.train.peak_tflops
            else chips.peak_flops(mesh.devices.flat[0], config.model.dtype)
        )
        pace = _Pace(first)

        # ---- reports
        metrics = (
            opened.enter_context(Metrics(out, config.train.tensorboard, first))
            if leader
            else None
        )

        def record(step, text, values):
            say(f"step {step}/{config.train.steps}  {text}")
            if leader:
                metrics.write(step, **values)

        def checked(step, results):
            """A step's results as numbers, once they are there. Stops the run where one is not finite."""
            values = {name: float(value) for name, value in results.items()}
            if not all(map(math.isfinite, values.values())):
                checkpoints.wait()
                good = checkpoints.steps()
                raise FloatingPointError(
                    f"step {step} is not finite ({', '.join(f'{name} {value}' for name, value in values.items())}): "
                    + (
                        f"stopped; the checkpoint of step {good[-1]} is good"
                        if good
                        else "stopped, before any checkpoint"
                    )
                    + ". Try a lower optimizer.learning_rate or more optimizer.warmup_steps"
                )
            return values

        def report(step, results):
            values = checked(step, results) | dict(learning_rate=float(rates[step - 1]))
            text = (
                f"loss {values['loss']:.4f}  grad norm {values['gradient_norm']:.3f}  "
                f"lr {values['learning_rate']:.2e}"
            )
            if seconds := pace.lap(step):
                values["tokens_per_s"] = (
                    config.train.global_batch * config.train.seq_len / seconds
                )
                text += f"  {values['tokens_per_s']:,.0f} tok/s"
                if peak:
                    values["mfu"] = values["tokens_per_s"] * flops / (peak * mesh.size)
                    text += f"  MFU {values['mfu']:.1%}"
                text += f"  {_duration(seconds * (config.train.steps - step))} left"
            record(step, text, values)

        def evaluate(step):
            first_ones = itertools.islice(held_out, config.train.eval_batches)
            totals = [evaluation(state.model, placed(batch)) for batch in first_ones]
            loss, weight = np.sum(jax.device_get(totals), axis=0)
            values = dict(
                held_out_loss=float(loss / weight),
                held_out_bits_per_byte=float(
                    corpus.held_out.bits_per_byte(loss / weight)
                ),
            )
            record(
                step,
                f"held-out loss {values['held_out_loss']:.4f}, "
                f"{values['held_out_bits_per_byte']:.3f} bits per byte",
                values,
            )
            return values

        # ---- loop
        due = lambda step, every: step % every == 0 or step == config.train.steps
        profile = opened.enter_context(
            _Profile(out / "profile", first + 2, config.train.profile_steps, say)
        )
        progress = opened.enter_context(
            tqdm(
                total=config.train.steps,
                initial=first,
                unit="step",
                disable=not (leader and sys.stderr.isatty()),
            )
        )
        step, stopped, unread, summary = first, None, None, {}
        while step < config.train.steps and not (stopped := stop.asked(step)):
            profile.at(step, state)
            state, results = step_function(state, placed(next(batches)))
            step += 1
            progress.update()
            if unread:  # the device works on this step while the last one is reported
                unread = report(*unread)
            if (
                step == first + 1
            ):  # the first step compiles: its time says nothing of the others'
                jax.block_until_ready(results)
                pace.reset(step)
            evaluating, saving = (
                due(step, config.train.eval_every),
                due(step, config.train.save_every),
            )
            if evaluating or saving:
                report(step, results)
                if evaluating:
                    summary = evaluate(step)
                if saving:
                    checkpoints.save(step, state._asdict(), batches, meta)
                pace.reset(step)
            elif due(step, config.train.log_every):
                unread = step, results
        if stopped and step > first:
            report(*unread) if unread else checked(step, results)
            checkpoints.save(step, state._asdict(), batches, meta)  # unless it just was

    # ---- what came of it
    picture = (
        plot(out, f"{config.model.residual}, {count:,} parameters") if leader else None
    )
    summary |= dict(
        step=step,
        out=str(out),
        parameters=count,
        plot=picture and str(picture),
        stopped=stopped and stopped.name,
    )
    if not stopped and config.train.sample_tokens:
        prompt = tokens.prompt("")
        ids = generate(
            state.model,
            config.model,
            mesh,
            prompt,
            max_tokens=config.train.sample_tokens,
            temperature=0.8,
            seed=config.train.seed,
            stop_token_ids=(tokens.eos,),
            vocabulary=tokens.size,
        )
        summary["sample"] = tokens.decode(list(ids))
        say(f"---- the model writes:\n{summary['sample']}\n----")
    return summary


def _prepare(config, tokens):
    """The corpus. One process tokenises it, the others open what it wrote."""
    together = jax.process_count() > 1
    if together and jax.process_index():
        multihost_utils.sync_global_devices("corpus")
    corpus = prepare(config, tokens)
    if together and not jax.process_index():
        multihost_utils.sync_global_devices("corpus")
    return corpus


def _place(shardings, batch):
    """A batch of this process's rows as global arrays."""
    return {
        name: jax.make_array_from_process_local_data(shardings, batch[name])
        for name in BATCH_FIELDS
    }


def _duration(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    return (
        f"{minutes // 60}h{minutes % 60:02}m"
        if minutes >= 60
        else f"{minutes}m{seconds:02}s"
    )


class _Pace:
    """Seconds a step, between reports."""

    def __init__(self, step):
        self.reset(step)

    def reset(self, step):
        self.step, self.time = step, time.perf_counter()

    def lap(self, step):
        """Seconds a step since the last lap or reset, or None if no step was taken since."""
        steps, seconds = step - self.step, time.perf_counter() - self.time
        self.reset(step)
        return seconds / steps if steps else None


class _Profile(contextlib.AbstractContextManager):
    """A trace of `count` steps after the step `first`, or of as many as there are; none for 0."""

    def __init__(self, folder, first, count, say):
        self.folder, self.steps, self.say, self.running = (
            folder,
            range(first, first + count),
            say,
            False,
        )

    def at(self, step, state):
        """Call before each step."""
        if self.running != (step in self.steps):
            jax.block_until_ready(state)
            self._stop() if self.running else jax.profiler.start_trace(str(self.folder))
            self.running = not self.running

    def _stop(self):
        jax.profiler.stop_trace()
        self.say(f"profile from step {self.steps.start + 1} on: {self.folder}")

    def __exit__(self, *_):
        if self.running:
            self._stop()


class _Stop(contextlib.AbstractContextManager):
    """Turns SIGTERM and Ctrl-C into a request to stop after the step under way; a second one acts at once."""

    def __init__(self, every):
        self.every, self.signal, self._before = every, None, {}

    def __enter__(self):
        if (
            threading.current_thread() is threading.main_thread()
        ):  # elsewhere signals cannot be caught
            self._before = {
                number: signal.signal(number, self._ask)
                for number in (signal.SIGTERM, signal.SIGINT)
            }
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number, _):
        self.signal = signal.Signals(number)
        self.__exit__()
        text = (
            f"\n{self.signal.name}: saving after this step; once more to stop at once\n"
        )
        os.write(
            2, text.encode()
        )  # print may be what was interrupted, and cannot be entered twice

    def asked(self, step):
        """The signal to stop for, or None. Several processes agree on it, every so many steps."""
        if jax.process_count() == 1:
            return self.signal
        if step % self.every:
            return None
        sent = multihost_utils.process_allgather(np.array(self.signal or 0)).max()
        return signal.Signals(sent) if sent else None
