"""The training job, from start to end: mesh, data, model, optimizer, step, loop.

A run lives in `train.out`: metrics.jsonl, checkpoints/<step>/, loss.png, and tensorboard/ and profile/ where asked for.
"""
import functools
import itertools
import math
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

from ladder_jax import attention, chips, data, model, sharding, tokenizer
from ladder_jax import config as configuration
from ladder_jax.checkpoint import Checkpoints, read_meta
from ladder_jax.config import ConfigError
from ladder_jax.generate import generate
from ladder_jax.metrics import Metrics, plot

BATCH = ("tokens", "targets", "segments", "positions", "weights")       # what data.py gives, each [B, T]


# ---------------------------------------------------------------- optimizer

def learning_rate(config, steps):
    """The learning rate as a function of the step (config: config.Optimizer; steps: of the whole run)."""
    peak, warmup = config.learning_rate, min(config.warmup_steps, steps)
    decay = {"cosine": steps - warmup, "wsd": steps // 5, "constant": 0}[config.schedule]
    if config.decay_steps is not None and config.schedule != "constant":
        decay = config.decay_steps
    decay = max(min(decay, steps - warmup), 0)
    if config.schedule == "cosine":
        tail = optax.cosine_decay_schedule(peak, max(decay, 1), config.final_fraction)
        parts, bounds = [tail], [warmup]
    else:
        tail = optax.linear_schedule(peak, peak * (config.final_fraction if decay else 1), max(decay, 1))
        parts, bounds = [optax.constant_schedule(peak), tail], [warmup, steps - decay]
    # the first step already learns: warm-up takes values 1/w, 2/w, ... 1
    return optax.join_schedules([lambda step: peak * (step + 1) / max(warmup, 1), *parts], bounds)


def make_optimizer(config, steps):
    """AdamW (arXiv 1711.05101) with decay of matrices alone, after clipping by the global norm."""
    def decayed(parameters):
        names = sharding.parameter_names(parameters)
        return jax.tree.map(lambda name: not name.endswith(("norm", "bq", "bk", "bv")), names)
    adamw = optax.adamw(learning_rate(config, steps), config.beta1, config.beta2, config.eps,
                        weight_decay=config.weight_decay, mask=decayed)
    return adamw if config.clip_norm is None else optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


# ---------------------------------------------------------------- state and step

class State(NamedTuple):
    """All that a step changes."""
    model: model.Transformer
    optimizer: Any


def abstract_state(config, mesh, optimizer):
    """The state's shapes, dtypes and shardings on `mesh`; nothing is allocated."""
    parameters = jax.eval_shape(functools.partial(model.init, config.model), jax.random.key(0))
    shapes = State(parameters, jax.eval_shape(optimizer.init, parameters))
    specs = sharding.parameter_specs(parameters)
    is_model = lambda x: isinstance(x, model.Transformer)
    specs = jax.tree.map(lambda x: specs if is_model(x) else sharding.REPLICATED, shapes, is_leaf=is_model)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes,
                        sharding.named(mesh, specs))


def init_state(config, mesh, optimizer):
    """A fresh state, made where it will live: no device holds more than its shards. The same on every mesh."""
    def make():
        parameters = model.init(config.model, jax.random.key(config.train.seed))
        return State(parameters, optimizer.init(parameters))
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(config, mesh, optimizer))
    return jax.jit(make, out_shardings=shardings)()


def loss_and_gradients(config, mesh):
    """(model, batch) -> (mean loss in nats a token, gradients): both over the whole batch, global arrays."""
    kernel = attention.kernel_for(mesh.devices.flat[0].platform, config.model, config.train.length)
    options = dict(kernel=kernel, remat=config.train.remat, chunk=config.train.loss_chunk)

    def local(parameters, batch):
        weight = jnp.maximum(lax.psum(batch["weights"].sum(), sharding.BATCH), 1)
        objective = jax.value_and_grad(lambda m, part: model.loss(m, config.model, part, **options) / weight)
        count = config.train.accumulate
        if count == 1:
            loss, gradients = objective(parameters, batch)
        else:
            parts = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), batch)
            add = lambda total, part: (jax.tree.map(jnp.add, total, objective(parameters, part)), None)
            zeros = jnp.float32(0), jax.tree.map(jnp.zeros_like, parameters)
            (loss, gradients), _ = lax.scan(add, zeros, parts)
        return lax.psum(loss, sharding.BATCH), sharding.sum_gradients(gradients, specs)

    parameters = jax.eval_shape(functools.partial(model.init, config.model), jax.random.key(0))
    specs = sharding.parameter_specs(parameters)
    return sharding.shard_map(local, mesh, (specs, dict.fromkeys(BATCH, sharding.TOKENS)), (sharding.REPLICATED, specs))


def make_step(config, mesh, optimizer):
    """The compiled training step: (state, batch) -> (state, dict(loss, gradient_norm)). The state is donated."""
    gradients_of = loss_and_gradients(config, mesh)

    def step(state, batch):
        loss, gradients = gradients_of(state.model, batch)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.model)
        report = dict(loss=loss, gradient_norm=optax.global_norm(gradients))
        return State(optax.apply_updates(state.model, updates), optimizer_state), report

    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(config, mesh, optimizer))
    tokens = sharding.named(mesh, dict.fromkeys(BATCH, sharding.TOKENS))
    replicated = sharding.named(mesh, sharding.REPLICATED)
    return jax.jit(step, in_shardings=(shardings, tokens), out_shardings=(shardings, replicated), donate_argnums=0)


def make_evaluation(config, mesh):
    """(model, batch) -> (sum of losses in nats, sum of weights) over the batch, compiled."""
    kernel = attention.kernel_for(mesh.devices.flat[0].platform, config.model, config.train.length)

    def local(parameters, batch):
        loss = model.loss(parameters, config.model, batch, kernel=kernel, chunk=config.train.loss_chunk)
        return lax.psum((loss, batch["weights"].sum()), sharding.BATCH)
    parameters = jax.eval_shape(functools.partial(model.init, config.model), jax.random.key(0))
    specs = sharding.parameter_specs(parameters)
    return jax.jit(sharding.shard_map(local, mesh, (specs, dict.fromkeys(BATCH, sharding.TOKENS)),
                                      (sharding.REPLICATED, sharding.REPLICATED)))


def flops_per_token(config, length):
    """Model FLOPs of training on one token, PaLM's count (arXiv 2204.02311, appendix B): 6 N + 12 L N_heads H T.

    N is the number of parameters in matrix products (all but the input embedding, which is looked up); attention is
    counted in full, not halved for causality. Recomputation is not counted.
    """
    sizes = jax.tree.map(lambda x: x.size, jax.eval_shape(functools.partial(model.init, config), jax.random.key(0)))
    count = sum(jax.tree.leaves(sizes)) - (0 if config.tie_embeddings else config.vocab_size * config.dim)
    return 6 * count + 12 * config.layers * config.heads * config.head_dim * length


# ---------------------------------------------------------------- the job

FROZEN = {"model": None, "data": ("source", "text_field", "tokenizer", "held_out"),
          "train": ("batch", "length", "accumulate", "seed")}       # what a resumed run may not change


def check_resumed(saved, config):
    """Raises ConfigError where resuming with `config` would not continue the run whose config was `saved` (dicts)."""
    for section, names in FROZEN.items():
        for name in names or config[section]:
            if saved[section].get(name) != config[section][name]:
                raise ConfigError(f"{section}.{name} was {saved[section].get(name)!r} in the run to resume and is "
                                  f"{config[section][name]!r} now: keep it, or start a new run in another train.out")


def train(config, resume=False):
    """Runs the job of `config` (config.Config) to its end, or until SIGTERM or Ctrl-C, and returns a summary (dict).

    Raises ConfigError where the configuration, data or checkpoint does not fit; FloatingPointError on a loss or a
    gradient that is not finite (the last checkpoint stays good).
    """
    # ---- mesh and data
    mesh = sharding.make_mesh(config.mesh)
    sharding.check(config.model, mesh, config.train.batch // config.train.accumulate)
    out, leader = Path(config.train.out), jax.process_index() == 0
    say = (lambda text: tqdm.write(text, file=sys.stdout)) if leader else (lambda text: None)
    tokens = tokenizer.load(config.data.tokenizer)
    if tokens.size > config.model.vocab_size:
        raise ConfigError(f"model.vocab_size={config.model.vocab_size} is smaller than the {tokens.size} tokens of "
                          f"data.tokenizer={config.data.tokenizer!r}: it must be at least that")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"train.out={config.train.out!r} cannot be written: {error.strerror}") from None
    checkpoints = Checkpoints(out / "checkpoints", config.train.keep)
    if checkpoints.steps() and not resume:
        raise ConfigError(f"{out} already holds a run, at step {checkpoints.steps()[-1]}: "
                          "continue it with --resume, or choose another --train.out")
    if jax.process_count() > 1 and not leader:
        multihost_utils.sync_global_devices("corpus")       # one process tokenises, the others open what it wrote
    corpus = data.prepare(config.data, tokens)
    if jax.process_count() > 1 and leader:
        multihost_utils.sync_global_devices("corpus")
    say(corpus.report)
    shard, shards = sharding.data_shard(mesh)
    split = dict(batch=config.train.batch // shards, length=config.train.length,
                 process_index=shard, process_count=shards)
    batches = data.train_iterator(corpus, seed=config.train.seed, **split)
    held_out = data.held_out_batches(corpus, **split)
    placed = functools.partial(_place, sharding.named(mesh, sharding.TOKENS))

    # ---- state, new or resumed
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    meta = dict(config=configuration.to_dict(config), tensor=mesh.shape[sharding.TENSOR], tokenizer=tokens.to_json())
    first = 0
    if resume and checkpoints.steps():
        wanted = abstract_state(config, mesh, optimizer)._asdict()
        check_resumed(read_meta(checkpoints.folder)["config"], meta["config"])
        first, restored, _ = checkpoints.restore(wanted, batches, config=meta["config"])
        state = State(**restored)
        say(f"resumed at step {first} of {config.train.steps} from {checkpoints.folder}")
    else:
        if resume:
            say(f"nothing to resume in {out}: starting at step 0")
        state = init_state(config, mesh, optimizer)
    metrics = Metrics(out, config.train.tensorboard, first) if leader else None
    step_function = make_step(config, mesh, optimizer)
    evaluation = make_evaluation(config, mesh)
    rate = learning_rate(config.optimizer, config.train.steps)
    flops = flops_per_token(config.model, config.train.length)
    peak = (config.train.peak_tflops * 1e12 if config.train.peak_tflops else
            chips.peak_flops(mesh.devices.flat[0], config.model.dtype))
    count = sum(x.size for x in jax.tree.leaves(state.model))
    say(f"{count:,} parameters, {config.model.residual} residual, {config.model.dtype}, mesh "
        + " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items()) + f" of {mesh.devices.flat[0].device_kind}")

    # ---- loop
    pace = _Pace(first)

    def report(step, values):
        """Waits for a step's results, writes them, and stops the run where they are not finite."""
        loss, norm = (float(values[name]) for name in ("loss", "gradient_norm"))
        row = dict(loss=loss, gradient_norm=norm, learning_rate=float(rate(step - 1)))
        text = f"step {step}/{config.train.steps}  loss {loss:.4f}  grad norm {norm:.3f}  lr {row['learning_rate']:.2e}"
        if seconds := pace.lap(step):
            row["tokens_per_s"] = config.train.batch * config.train.length / seconds
            text += f"  {row['tokens_per_s']:,.0f} tok/s"
            if peak:
                row["mfu"] = row["tokens_per_s"] * flops / (peak * mesh.size)
                text += f"  MFU {row['mfu']:.1%}"
            text += f"  {_duration(seconds * (config.train.steps - step))} left"
        say(text)
        if leader:
            metrics.write(step, **row)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            good = checkpoints.steps()
            raise FloatingPointError(f"step {step}: loss {loss}, gradient norm {norm}: stopped; " + (
                f"the checkpoint of step {good[-1]} is good" if good else "no checkpoint was made before it")
                + ": try a lower optimizer.learning_rate or more optimizer.warmup_steps")

    def evaluate(step):
        first_ones = itertools.islice(held_out, config.train.eval_batches)
        totals = [evaluation(state.model, placed(batch)) for batch in first_ones]
        loss, weight = np.sum(jax.device_get(totals), axis=0)
        values = dict(held_out_loss=float(loss / weight),
                      held_out_bits_per_byte=float(corpus.held_out.bits_per_byte(loss / weight)))
        say(f"step {step}/{config.train.steps}  held-out loss {values['held_out_loss']:.4f}, "
            f"{values['held_out_bits_per_byte']:.3f} bits per byte")
        if leader:
            metrics.write(step, **values)
        return values

    due = lambda step, every: step % every == 0 or step == config.train.steps
    trace = range(first + 2, first + 2 + config.train.profile_steps)       # the steps to profile
    step, unread, summary = first, None, {}
    progress = tqdm(total=config.train.steps, initial=first, unit="step", disable=not (leader and sys.stderr.isatty()))
    with checkpoints, _Stop(config.train.log_every) as stop, progress:
        while step < config.train.steps and not stop.asked(step):
            if trace and step == trace.start:
                jax.block_until_ready(state)
                jax.profiler.start_trace(str(out / "profile"))
            state, values = step_function(state, placed(next(batches)))
            step += 1
            progress.update()
            if unread:                      # the device works on this step while the last one is reported
                unread = report(*unread)
            if step == first + 1:           # the first step compiles: its time says nothing of the others'
                jax.block_until_ready(values)
                pace.reset(step)
            if trace and step == trace.stop:
                jax.block_until_ready(state)
                jax.profiler.stop_trace()
                say(f"profile of steps {trace.start + 1} to {step}: {out / 'profile'}")
            evaluating, saving = due(step, config.train.eval_every), due(step, config.train.save_every)
            if evaluating or saving:
                report(step, values)
                if evaluating:
                    summary = evaluate(step)
                if saving:
                    checkpoints.save(step, state._asdict(), batches, meta)
                pace.reset(step)
            elif due(step, config.train.log_every):
                unread = step, values
        if stop.signal and step > first and not due(step, config.train.save_every):
            report(step, values)
            checkpoints.save(step, state._asdict(), batches, meta)
    if leader:
        metrics.close()

    # ---- what came of it
    picture = plot(out, f"{config.model.residual}, {count:,} parameters") if leader else None
    summary |= dict(step=step, out=str(out), parameters=count, plot=picture and str(picture),
                    stopped=stop.signal and stop.signal.name)
    if not stop.signal and config.train.sample_tokens:
        prompt = tokens.prompt("")
        ids = generate(state.model, config.model, mesh, prompt, max_tokens=config.train.sample_tokens, temperature=0.8,
                       seed=config.train.seed, stop=(tokens.eos,), vocabulary=tokens.size)
        summary["sample"] = tokens.decode(list(ids))
        say(f"---- the model writes:\n{summary['sample']}\n----")
    return summary


def _place(shardings, batch):
    """A batch of this process's rows as global arrays."""
    return {name: jax.make_array_from_process_local_data(shardings, batch[name]) for name in BATCH}


def _duration(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}h{minutes % 60:02}m" if minutes >= 60 else f"{minutes}m{seconds:02}s"


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


class _Stop:
    """Turns SIGTERM and Ctrl-C into a request to stop after the step under way; a second one acts at once."""

    def __init__(self, every):
        self.every, self.signal, self._before = every, None, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():       # elsewhere signals cannot be caught
            self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        self._restore()

    def _ask(self, number, _):
        self.signal = signal.Signals(number)
        self._restore()
        print(f"\n{self.signal.name}: saving after this step; once more to stop at once", file=sys.stderr)

    def _restore(self):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def asked(self, step):
        """Whether to stop now. With several processes they agree, every so many steps."""
        if jax.process_count() == 1:
            return self.signal is not None
        return step % self.every == 0 and multihost_utils.process_allgather(np.array(self.signal is not None)).any()
