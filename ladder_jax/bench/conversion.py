"""The conversion study: how far a little training brings a converted model back.

    python -m ladder_jax.bench.conversion PARENT

It makes some layers of a pretrained parent ladder, and trains: on the text alone (sft),
toward the parent (distill), and toward the parent with an annealed delay (anneal). The
control is the parent itself, trained on the same batches. Held-out loss is measured on
text of the same kind and of another kind, at several budgets of tokens.

One run gives all budgets: the learning rate is constant after its warm-up. All runs are
one compiled program a loss, the ladder model with a freshness for every block
(residual/annealing.py); so the layers, the delay and the rate are data.

It writes rows.csv row by row, and table.md and plot.png at the end. The same command
goes on where it was stopped.
"""

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from ladder_jax import attention, checkpoint, distill, objective, sharding, training
from ladder_jax import model as models
from ladder_jax.arguments import POSITIONAL, parse
from ladder_jax.bench import conversion_report as reports
from ladder_jax.bench import conversion_text
from ladder_jax.config import (
    Config,
    Data,
    Distill,
    Mesh,
    Model,
    Optimizer,
    Train,
    from_meta,
    require,
)
from ladder_jax.convert import damage
from ladder_jax.convert.ladderize import notation_of
from ladder_jax.data import corpus as corpora
from ladder_jax.data.batches import held_out_batches, train_iterator
from ladder_jax.data.tokenizer import from_json
from ladder_jax.hardware import chips, xla_options
from ladder_jax.initial import load_parent
from ladder_jax.optimizer import make_optimizer

METHODS = ("sft", "distill", "anneal")
MEASURED = ("documentation", "notices")  # kinds of text; training uses the first


@dataclass(frozen=True)
class Arguments:
    """Converts a pretrained model in several ways, trains it a little in several ways,
    and measures how far that brings it back."""

    parent: str = field(metadata=POSITIONAL)
    """The checkpoint of a pretrained standard model."""
    out: str = "runs/conversion"
    """The folder of texts, rows.csv, table.md and plot.png."""
    budgets: tuple[float, ...] = (0, 1e5, 3e5, 1e6, 3e6)
    """Tokens of training after which the loss is measured."""
    layers: tuple[str, ...] = ("last:15", "auto:15", "all", "last:10")
    """The layers that are made ladder: last:K, auto:K or all."""
    methods: tuple[str, ...] = METHODS
    """The ways to train: sft, distill, anneal."""
    seeds: int = 2
    """Runs of each kind, which differ in the order of the text."""
    batch: int = 32
    """Sequences in a step."""
    length: int = 512
    """Tokens of a sequence."""
    long_budgets: tuple[float, ...] = ()
    """Larger budgets, for runs of the control, of the first layers and of all layers
    with distill, and of all layers with anneal."""
    rates: tuple[float, ...] = (3e-4,)
    """Learning rates. The first is used for everything, the others for the first seed
    of the control, and of the first layers and all layers with distill."""
    warmup: int = 10
    """Steps in which the learning rate rises."""
    anneal: float = 0.3
    """The share of a run in which the delay is annealed."""
    cross_entropy: float = 0.1
    """The weight of the cross-entropy beside the divergence."""
    measured_tokens: int = 32768
    """Tokens of each held-out text."""
    dtype: str = "auto"
    """The dtype of computation. auto: float32 on CPUs, bfloat16 elsewhere."""
    minutes: float | None = None
    """Stop after this time; the most valuable runs come first."""
    save: bool = False
    """Save the state at each budget, so that a stopped run goes on from there."""
    chunk: int = 4096
    """Tokens whose logits exist at one time."""
    kernel: str | None = None
    """The kernel of attention: xla, cudnn or splash. None: see attention.kernel_for."""

    def __post_init__(self) -> None:
        for method in self.methods:
            require(method in METHODS, "methods", method, f"of {', '.join(METHODS)}")
        require(len(self.budgets) > 1, "budgets", self.budgets, "two or more")


class Run(NamedTuple):
    """One training run of the study."""

    layers: str  # "none": the control
    method: str
    seed: int
    rate: float
    total: int  # tokens


def runs(arguments: Arguments) -> list[Run]:
    """All runs, the most valuable first."""
    rate, *others = arguments.rates
    first = arguments.layers[0]
    control = ("none", "sft")
    # The first layers with every method; then distillation of the others, and so on.
    kinds = [control, *((first, method) for method in arguments.methods)]
    for method in sorted(arguments.methods, key=["distill", "anneal", "sft"].index):
        kinds += [(layers, method) for layers in arguments.layers[1:]]
    total = whole_steps(arguments, max(arguments.budgets))
    plan = [Run(*kind, 0, rate, total) for kind in kinds]
    picked = [control, (first, "distill"), ("all", "distill"), ("all", "anneal")]
    picked = [kind for kind in picked if kind in kinds]
    plan += [Run(*kind, 0, other, total) for other in others for kind in picked[:3]]
    if arguments.long_budgets:
        longest = whole_steps(arguments, max(arguments.long_budgets))
        plan += [Run(*kind, 0, rate, longest) for kind in picked]
    for seed in range(1, arguments.seeds):
        plan += [Run(*kind, seed, rate, total) for kind in kinds]
    return plan


def whole_steps(arguments: Arguments, tokens: float) -> int:
    """`tokens`, rounded to whole steps."""
    per_step = arguments.batch * arguments.length
    return round(tokens / per_step) * per_step


# ---------------------------------------------------------------- the programs


class Rated(NamedTuple):
    """The state of an optimizer whose learning rate is data."""

    inner: Any
    rate: jax.Array


def with_rate(
    inner: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """`inner`, of learning rate 1, whose updates are multiplied by a rate in its state.

    So runs with other rates share a compiled step.
    """

    def init(parameters: Any) -> Rated:
        return Rated(inner.init(parameters), jnp.float32(1))

    def update(
        gradients: Any, state: Rated, parameters: Any = None, **options: Any
    ) -> tuple[Any, Rated]:
        updates, new = inner.update(gradients, state.inner, parameters, **options)
        updates = jax.tree.map(lambda x: state.rate * x, updates)
        return updates, Rated(new, state.rate)

    return optax.GradientTransformationExtraArgs(init, update)


class Study:
    """The parent, the texts and the compiled programs of all runs."""

    def __init__(self, arguments: Arguments, out: Path) -> None:
        self.arguments = arguments
        meta = checkpoint.read_meta(arguments.parent)
        shape = from_meta(meta, arguments.parent).model
        require(
            shape.residual == "standard",
            "parent",
            arguments.parent,
            f"a checkpoint with the residual standard, not {shape.residual}",
        )
        self.mesh = sharding.make_mesh(Mesh())
        dtype = arguments.dtype
        if dtype == "auto":
            is_cpu = self.mesh.devices.flat[0].platform == "cpu"
            dtype = "float32" if is_cpu else "bfloat16"
        self.parent: Model = dataclasses.replace(shape, dtype=dtype)  # type: ignore[arg-type]
        self.config = self._config()
        self.weights = load_parent(arguments.parent, self.parent, self.mesh)
        self.optimizer = with_rate(make_optimizer(self.config.optimizer, 10**9))
        self.steps = {
            name: training.make_step(
                self.config,
                self.mesh,
                self.optimizer,
                arguments.kernel,
                objective.Extras(parent, freshness=True),
            )
            for name, parent in (("sft", None), ("distill", self.parent))
        }
        self.measure_batch = self._make_measurement()
        tokenizer = from_json(meta["tokenizer"])
        self.corpora = {}
        for kind, path in conversion_text.write(out / "text").items():
            share = 0.02 if kind == MEASURED[0] else 0.5
            data = Data(
                source=str(path),
                held_out_fraction=share,
                token_cache=str(out / "text"),
            )
            corpus = corpora.prepare(data, tokenizer)
            self.corpora[kind] = corpus.cut(arguments.length)
            say(self.corpora[kind].report)
        self.held_out = {kind: self._held_out(kind) for kind in MEASURED}

    def _config(self) -> Config:
        arguments = self.arguments
        return Config(
            model=dataclasses.replace(self.parent, residual="ladder"),
            optimizer=Optimizer(
                learning_rate=1.0,
                lr_schedule="constant",
                warmup_steps=arguments.warmup,
                weight_decay=0.0,
            ),
            train=Train(
                global_batch=arguments.batch,
                seq_len=arguments.length,
                loss_chunk=arguments.chunk,
            ),
            distill=Distill(cross_entropy=arguments.cross_entropy),
        )

    def _held_out(self, kind: str) -> list[dict[str, jax.Array]]:
        arguments = self.arguments
        batches = held_out_batches(
            self.corpora[kind], batch=arguments.batch, length=arguments.length
        )
        count = -(-arguments.measured_tokens // (arguments.batch * arguments.length))
        picked = [batches[i] for i in range(min(count, len(batches)))]
        return [training.to_devices(self.mesh, batch) for batch in picked]

    def _make_measurement(self) -> Callable[..., Any]:
        """(model, batch, extras) -> sums of (divergence, cross-entropy, weights)."""
        config, parent = self.config.model, self.parent
        platform = chips.platform(self.mesh)
        length = self.arguments.length
        kernel = self.arguments.kernel or attention.kernel_for(platform, parent, length)
        options = dict(kernel=kernel)

        def local(parameters: Any, batch: Any, inputs: dict[str, Any]) -> Any:
            sums = distill.losses(
                parameters,
                config,
                inputs["parent"],
                parent,
                batch,
                chunk=self.arguments.chunk,
                options=options | dict(freshness=inputs["freshness"]),
                parent_options=options,
            )
            return lax.psum((*sums, batch["weights"].sum()), sharding.BATCH_AXES)

        extras = objective.Extras(parent, freshness=True)
        specs = sharding.parameter_specs(models.abstract(config))
        inputs = (specs, objective.BATCH_SPECS, *extras.specs())
        results = (sharding.REPLICATED,) * 3
        return jax.jit(
            sharding.shard_map(local, self.mesh, inputs, results),
            compiler_options=xla_options.options(self.mesh),
        )

    def inputs(self, freshness: np.ndarray) -> dict[str, Any]:
        return dict(parent=self.weights, freshness=freshness)

    def measure(self, parameters: Any, freshness: np.ndarray) -> dict[str, float]:
        """The losses on the held-out texts."""
        values = {}
        for kind, batches in self.held_out.items():
            inputs = self.inputs(freshness)
            sums = [self.measure_batch(parameters, batch, inputs) for batch in batches]
            kl, ce, weight = np.sum(jax.device_get(sums), axis=0)
            side = self.corpora[kind].held_out
            values[f"{kind}_loss"] = float(ce / weight)
            values[f"{kind}_bits_per_byte"] = float(side.bits_per_byte(ce / weight))
            values[f"{kind}_divergence"] = float(kl / weight)
        return values

    def first_state(self, rate: float) -> training.State:
        """The parent's parameters in float32, and a new optimizer."""
        shapes = training.abstract_state(self.config, self.mesh, self.optimizer)
        parameters = checkpoint.load_model(self.arguments.parent, shapes.model)
        init = jax.jit(
            self.optimizer.init,
            out_shardings=jax.tree.map(lambda x: x.sharding, shapes.optimizer),
        )
        return with_rate_of(training.State(parameters, init(parameters)), rate)

    def ladder_layers(self, text: str, out: Path) -> list[int]:
        """The layers that "last:15", "auto:15", "all" or "none" names."""
        count = self.parent.layers
        kind, _, argument = text.partition(":")
        number = {"none": 0, "all": count}.get(kind) or int(argument or 0)
        if kind != "auto":
            return list(range(count - number, count))
        damages = reports.read_damages(out)
        if damages is None:
            parameters = self.first_state(0.0).model
            batches = self.held_out[MEASURED[0]]

            def loss(layers: Any) -> float:
                inputs = self.inputs(damage.freshness_of(count, layers))
                sums = [self.measure_batch(parameters, b, inputs) for b in batches]
                _, ce, weight = np.sum(jax.device_get(sums), axis=0)
                return float(ce / weight)

            standard, damages = damage.measure(loss, count)
            reports.write_damages(out, damages)
            chosen = damage.cheapest(damages, number)
            say(damage.table(standard, damages, chosen))
        return damage.cheapest(damages, number)


def with_rate_of(state: training.State, rate: float) -> training.State:
    """`state` with this learning rate."""
    old = state.optimizer.rate
    new = jax.device_put(np.float32(rate), old.sharding)
    return training.State(state.model, state.optimizer._replace(rate=new))


# ---------------------------------------------------------------- a run


def train_run(
    study: Study, run: Run, out: Path, stop_at: float
) -> Iterator[dict[str, Any]]:
    """Trains, and yields a row at every budget, until the time `stop_at`."""
    arguments = study.arguments
    tokens_per_step = arguments.batch * arguments.length
    budgets = sorted({*arguments.budgets, *arguments.long_budgets})
    stops = [round(budget / tokens_per_step) for budget in budgets]
    stops = [stop for stop in stops if stop * tokens_per_step <= run.total]
    chosen = study.ladder_layers(run.layers, out)
    stale = damage.freshness_of(study.parent.layers, chosen)
    anneal_steps = round(arguments.anneal * stops[-1]) if run.method == "anneal" else 0
    step_program = study.steps["sft" if run.method == "sft" else "distill"]
    batches = train_iterator(
        study.corpora[MEASURED[0]],
        batch=arguments.batch,
        length=arguments.length,
        seed=run.seed,
    )
    step, state = 0, study.first_state(run.rate)
    saver = Saver(study, run, out) if arguments.save else None
    if saver and (restored := saver.restore(state, batches)):
        step, state = restored
    began, trained, loss = time.perf_counter(), 0, math.nan
    for stop in stops:
        if stop < step:
            continue
        while step < stop:
            inputs: dict[str, Any] = dict(freshness=blended(stale, step, anneal_steps))
            if run.method != "sft":
                inputs["parent"] = study.weights
            batch = training.to_devices(study.mesh, next(batches))
            state, results = step_program(state, batch, inputs)
            step, trained = step + 1, trained + 1
            if trained == 1:  # XLA compiled
                jax.block_until_ready(state)
                began = time.perf_counter()
            if step % 20 == 0:
                loss = float(results["loss"])
                if not math.isfinite(loss):
                    say(f"{run}: loss {loss} in step {step}: the run ends")
                    return
                if time.perf_counter() > stop_at:
                    return
        jax.block_until_ready(state)
        seconds = time.perf_counter() - began
        rate = (trained - 1) * tokens_per_step / seconds if trained > 1 else math.nan
        values = study.measure(state.model, stale)
        yield dict(
            **run._asdict(),
            tokens=step * tokens_per_step,
            residual=notation_of(chosen, study.parent.layers) if chosen else "standard",
            train_loss=loss,
            tokens_per_s=rate,
            **values,
        )
        if saver and 0 < step < stops[-1]:
            saver.save(step, state, batches)
        began = time.perf_counter() - seconds
    if saver:
        saver.remove()


def blended(stale: np.ndarray, step: int, anneal_steps: int) -> np.ndarray:
    """The freshness of every block in step `step`: 1 at first, `stale` at the end."""
    alpha = max(1 - step / anneal_steps, 0) if anneal_steps else 0
    return 1 - np.float32(1 - alpha) * (1 - stale)


class Saver:
    """The state of the run in progress, in the folder state/."""

    def __init__(self, study: Study, run: Run, out: Path) -> None:
        self.study, self.meta = study, dict(run=[*map(str, run)])
        self.folder = out / "state" / "-".join(map(str, run)).replace(":", "")

    def save(self, step: int, state: training.State, batches: Any) -> None:
        # Another run's state, or an earlier one of this run, is of no use any more.
        with checkpoint.Checkpoints(self.folder, 1) as checkpoints:
            if checkpoints.steps():
                checkpoints.restore(self._abstract())
            checkpoints.save(step, state._asdict(), batches, self.meta)

    def _abstract(self) -> dict[str, Any]:
        study = self.study
        return training.abstract_state(
            study.config, study.mesh, study.optimizer
        )._asdict()

    def restore(
        self, state: training.State, batches: Any
    ) -> tuple[int, training.State] | None:
        if not checkpoint.saved_steps(self.folder):
            return None
        with checkpoint.Checkpoints(self.folder, 1) as checkpoints:
            step, arrays, _ = checkpoints.restore(self._abstract(), batches)
        say(f"goes on from step {step} in {self.folder}")
        return step, training.State(**arrays)

    def remove(self) -> None:
        import shutil

        shutil.rmtree(self.folder, ignore_errors=True)


def say(text: str) -> None:
    print(text, flush=True)


def run(arguments: Arguments) -> None:
    """Makes the runs that rows.csv does not hold yet, then the table and the plot."""
    began = time.perf_counter()
    minutes = arguments.minutes
    stop_at = math.inf if minutes is None else began + 60 * minutes
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    study = Study(arguments, out)
    rows = reports.Rows(out / "rows.csv")
    seconds_per_token = 0.0
    for number, each in enumerate(plan := runs(arguments), start=1):
        if rows.complete(each._asdict()):
            continue
        now = time.perf_counter()
        estimate = seconds_per_token * each.total
        if now + estimate > stop_at:
            say(f"{each} would end after --minutes {minutes}: left out")
            continue
        if not arguments.save:
            rows.remove(each._asdict())
        for row in train_run(study, each, out, stop_at):
            rows.add(row)
            say(reports.line(row, number, len(plan), time.perf_counter() - began))
        if number > 2:  # the first two may have compiled
            seconds = time.perf_counter() - now
            seconds_per_token = max(seconds_per_token, seconds / each.total)
    reports.write(out)
    say(f"done: {out}/table.md, {out}/plot.png, {out}/rows.csv")


if __name__ == "__main__":
    run(parse(Arguments, sys.argv[1:], "python -m ladder_jax.bench.conversion"))
