"""Compares the losses of the residual schedules at equal size and tokens:
`ladder-jax bench quality`, or `python -m ladder_jax.bench.quality`.

Every run adds a row to docs/quality/runs.csv when it ends. Give the same command again
to continue: finished runs are not repeated, and an interrupted one starts anew. The
first seed of all schedules comes first, so that a study that is cut short compares.

All models train on one device. Those that belong to a number of tensor shards (desync,
dtp) have virtual shards (virtual_shards.py). The iso-speed ladder has as many more
layers as the planner says that a ladder decodes faster than the standard model
(docs/overlap/plans.csv, ISO_SPEED).
"""

import dataclasses
import datetime
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ladder_jax.arguments import parse
from ladder_jax.bench import quality_plots, quality_results
from ladder_jax.bench.quality_results import Run
from ladder_jax.config import (
    Config,
    ConfigError,
    Data,
    Model,
    Optimizer,
    Train,
    require,
)
from ladder_jax.planner import records
from ladder_jax.say import Say, say

# Bytes as tokens: the vocabulary is theirs, padded.
COMMON: dict[str, Any] = dict(vocab_size=320, tie_embeddings=True, max_length=1024)


class Size(NamedTuple):
    """A model and how it is trained unless the command says otherwise."""

    model: Model
    tokens: int
    learning_rate: float
    batch: int
    length: int


def _model(dim: int, layers: int, heads: int, ffn_dim: int) -> Model:
    return Model(
        dim=dim,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=dim // heads,
        ffn_dim=ffn_dim,
        **COMMON,
    )


SIZES = {
    # 0.3M parameters: for tests, and to see the study work in minutes.
    "tiny": Size(_model(64, 6, 4, 192), 300_000, 4e-3, 16, 128),
    # 3M parameters: about a night on two cores.
    "m3": Size(_model(160, 10, 8, 448), 4_000_000, 2e-3, 16, 256),
    # 113M parameters: a GPU.
    "m110": Size(_model(768, 16, 12, 2048), 20_000_000, 6e-4, 32, 512),
}
# The plans whose ratio of steps says how much deeper an iso-speed ladder may be: both
# models with the reduction that `auto` chooses.
ISO_SPEED: dict[str, Any] = dict(
    recipe="llama3_70b",
    target="h100:1x8",
    workload="decode",
    batch=16,
    mesh_reduction="auto",
    all_reduce_us=0.0,
)


@dataclass(frozen=True)
class Arguments:
    """Compares the held-out loss of the residual schedules."""

    size: str = "m3"
    """tiny (0.3M parameters), m3 (3M) or m110 (113M)."""
    tokens: int | None = None
    """Training tokens of every run. None: the size's."""
    seeds: int = 3
    """Runs of every schedule: of the initial weights and the order of the text."""
    minutes: float | None = None
    """Stop before this time is over; a run that would not fit is not started."""
    schedules: tuple[str, ...] = ()
    """Only these, such as: standard ladder dtp:1 iso. None: all."""
    shards: int = 4
    """Tensor shards of desync and dtp."""
    learning_rate: float | None = None
    """The peak. None: the size's."""
    batch: int | None = None
    """Sequences of a step. None: the size's."""
    length: int | None = None
    """Tokens of a sequence. None: the size's."""
    dtype: str = "auto"
    """float32 or bfloat16; auto: bfloat16 except on a CPU."""
    source: str = "builtin"
    """The corpus, as data.source."""
    tokenizer: str = "bytes"
    """bytes, or a tokenizer.json of at most 320 tokens."""
    held_out_fraction: float = 0.1
    """The share of the documents that is held out; all of it is evaluated."""
    plans: str = "docs/overlap"
    """The folder of plans.csv, which says how deep an iso-speed ladder is."""
    out: str = "docs/quality"
    """The folder of runs.csv, results.md and the plots."""


class Variant(NamedTuple):
    """A model of the study."""

    schedule: str
    layers: int

    @property
    def shards_matter(self) -> bool:
        """Whether the model depends on the number of tensor shards."""
        return self.schedule.startswith(("desync", "dtp"))


# ---------------------------------------------------------------- what is compared


def variants(layers: int, iso_layers: int) -> dict[str, Variant]:
    """The models by the name that --schedules takes."""
    names = (
        "standard",
        "parallel",
        "ladder",
        "ladder:1,2",
        f"hybrid:last{layers // 2}",
        "desync:2",
        "dtp:1",
        "dtp:2",
    )
    models = {name: Variant(name, layers) for name in names}
    return {**models, "iso": Variant("ladder", iso_layers)}


def iso_speed(plans: Path) -> float:
    """The step of the planned standard model over the ladder's (see ISO_SPEED)."""
    steps = {
        record.schedule: record.step_us
        for record in records.read(plans)
        if record.step_us
        and all(getattr(record, name) == value for name, value in ISO_SPEED.items())
    }
    if not {"standard", "ladder"} <= set(steps):
        wanted = ", ".join(f"{name}={value}" for name, value in ISO_SPEED.items())
        raise ConfigError(
            f"plans={str(plans)!r} has no plans of standard and ladder with {wanted}: "
            "run from the project's folder, or name its docs/overlap"
        )
    return steps["standard"] / steps["ladder"]


def chosen(arguments: Arguments) -> list[Variant]:
    """The models that the command asks for."""
    layers = SIZES[arguments.size].model.layers
    ratio = iso_speed(Path(arguments.plans))
    models = variants(layers, max(int(layers * ratio), layers + 1))
    for name in arguments.schedules:
        require(name in models, "schedules", name, f"among {', '.join(models)}")
    return [models[name] for name in arguments.schedules or models]


def config_of(arguments: Arguments, variant: Variant, seed: int, dtype: str) -> Config:
    """The Config of one run."""
    size = SIZES[arguments.size]
    batch, length = arguments.batch or size.batch, arguments.length or size.length
    tokens = arguments.tokens or size.tokens
    steps = max(tokens // (batch * length), 1)
    changes: Any = dict(residual=variant.schedule, layers=variant.layers, dtype=dtype)
    return Config(
        model=dataclasses.replace(size.model, **changes),
        data=Data(
            source=arguments.source,
            tokenizer=arguments.tokenizer,
            held_out_fraction=arguments.held_out_fraction,
        ),
        optimizer=Optimizer(
            learning_rate=arguments.learning_rate or size.learning_rate,
            warmup_steps=max(steps // 20, 1),
        ),
        train=Train(steps=steps, global_batch=batch, seq_len=length, seed=seed),
    )


# ---------------------------------------------------------------- the study


class Programs(NamedTuple):
    """The compiled programs of a model, which all its seeds share."""

    init: Callable[[int], Any]  # a seed -> the state
    step: Callable[..., Any]
    evaluate: Callable[..., Any]


class OutOfTime(Exception):
    """The budget of --minutes is over."""


class Study:
    """The corpus and the compiled programs of a study."""

    def __init__(self, arguments: Arguments, say: Say) -> None:
        import jax

        from ladder_jax.data import corpus, tokenizer
        from ladder_jax.preparation import check_vocabulary

        check(arguments)
        self.arguments, self.say = arguments, say
        self.device = jax.devices()[0].device_kind
        self.dtype = arguments.dtype
        if self.dtype == "auto":
            on_cpu = jax.devices()[0].platform == "cpu"
            self.dtype = "float32" if on_cpu else "bfloat16"
        self.variants = chosen(arguments)
        config = config_of(arguments, self.variants[0], 0, self.dtype)
        loaded = tokenizer.load(config.data.tokenizer)
        check_vocabulary(config, _one_device(), loaded)
        self.corpus = corpus.prepare(config.data, loaded).cut(config.train.seq_len)
        say(self.corpus.report)
        self.programs: dict[Variant, Programs] = {}
        self.start = time.monotonic()
        self.longest: dict[Variant, float] = {}  # seconds of a run, compiled

    def runs(self) -> Iterator[tuple[Variant, int]]:
        """All runs: each seed of all models before the next seed."""
        for seed in range(self.arguments.seeds):
            for variant in self.variants:
                yield variant, seed

    def row(self, variant: Variant, seed: int) -> Run:
        """The row of a run, without its result."""
        config = config_of(self.arguments, variant, seed, self.dtype)
        options = config.train
        return Run(
            size=self.arguments.size,
            schedule=variant.schedule,
            layers=variant.layers,
            shards=self.arguments.shards,
            seed=seed,
            tokens=options.steps * options.global_batch * options.seq_len,
            batch=options.global_batch,
            length=options.seq_len,
            learning_rate=config.optimizer.learning_rate,
            dtype=self.dtype,
            tokenizer=Path(config.data.tokenizer).name,
            corpus=self.corpus.digest,
        )

    def seconds_left(self) -> float:
        """How much of --minutes is left."""
        if self.arguments.minutes is None:
            return float("inf")
        return self.arguments.minutes * 60 - (time.monotonic() - self.start)

    def train(self, variant: Variant, seed: int) -> Run:
        """Trains and evaluates a model. Raises OutOfTime where it does not fit."""
        import jax
        import numpy as np

        from ladder_jax import train_programs
        from ladder_jax.data.batches import held_out_batches, train_iterator

        if self.longest.get(variant, 0.0) > self.seconds_left():
            raise OutOfTime
        row = self.row(variant, seed)
        config = config_of(self.arguments, variant, seed, self.dtype)
        if variant not in self.programs:
            self.programs[variant] = self.compile(config, variant)
        programs, steps = self.programs[variant], config.train.steps
        state, losses = programs.init(seed), []
        shape = dict(batch=row.batch, length=row.length)
        batches = train_iterator(self.corpus, seed=seed, **shape)
        begin = time.monotonic()
        for _, batch in zip(range(steps), batches):
            state, loss = programs.step(state, dict(batch))
            losses.append(loss)
            if len(losses) == 1:  # XLA compiled
                jax.block_until_ready(loss)
                begin = time.monotonic()
            if len(losses) % 20 == 0:
                jax.block_until_ready(loss)
                if self.seconds_left() < 0:
                    raise OutOfTime
        totals = [
            programs.evaluate(state.model, dict(batch))
            for batch in held_out_batches(self.corpus, **shape)
        ]
        total, weight = np.sum(jax.device_get(totals), axis=0)
        seconds = time.monotonic() - begin
        self.longest[variant] = max(self.longest.get(variant, 0.0), seconds)
        held_out = float(total / weight)
        losses = jax.device_get(losses)
        return dataclasses.replace(
            row,
            parameters=train_programs.parameter_count(state.model),
            steps=steps,
            epochs=round(row.tokens / self.corpus.train.tokens, 3),
            train_loss=float(np.mean(losses[-max(steps // 10, 1) :])),
            held_out_loss=held_out,
            bits_per_byte=float(self.corpus.held_out.bits_per_byte(held_out)),
            seconds=round(seconds, 1),
            device=self.device,
            jax=jax.__version__,
            date=datetime.date.today().isoformat(),
            curve=quality_results.curve(losses),
        )

    def compile(self, config: Config, variant: Variant) -> Programs:
        """The programs of a model; XLA compiles each at its first call."""
        import jax

        from ladder_jax import model
        from ladder_jax.bench import virtual_shards
        from ladder_jax.optimizer import make_optimizer
        from ladder_jax.train_programs import State

        shards = self.arguments.shards if variant.shards_matter else 1
        optimizer = make_optimizer(config.optimizer, config.train.steps)

        @jax.jit
        def init(seed: Any) -> State:
            parameters = model.init(config.model, jax.random.key(seed))
            return State(parameters, optimizer.init(parameters))

        return Programs(
            init,
            virtual_shards.make_step(config, shards, optimizer),
            virtual_shards.make_evaluation(config, shards),
        )


def check(arguments: Arguments) -> None:
    """Raises ConfigError for the first argument that is not accepted."""
    positive = ("tokens", "seeds", "minutes", "learning_rate", "batch", "length")
    for name in positive:
        value = getattr(arguments, name)
        require(value is None or value > 0, name, value, "greater than 0")
    require(
        arguments.size in SIZES, "size", arguments.size, f"among {', '.join(SIZES)}"
    )
    dtypes = "auto", "float32", "bfloat16"
    require(arguments.dtype in dtypes, "dtype", arguments.dtype, ", ".join(dtypes))
    model_config = SIZES[arguments.size].model
    require(
        arguments.shards > 1 and model_config.heads % arguments.shards == 0,
        "shards",
        arguments.shards,
        f"2 or more, and a divisor of the size's {model_config.heads} heads",
    )


def _one_device() -> Any:
    import jax

    from ladder_jax import sharding
    from ladder_jax.config import Mesh

    return sharding.make_mesh(Mesh(data=1), jax.devices()[:1])


def run(arguments: Arguments) -> None:
    """Runs the study, or what is left of it, and writes its pages."""
    folder = Path(arguments.out)
    path = folder / quality_results.CSV
    rows = quality_results.read(path)
    study = Study(arguments, say)
    todo = [
        (variant, seed)
        for variant, seed in study.runs()
        if study.row(variant, seed).key not in {row.key for row in rows}
    ]
    say(f"{len(todo)} runs to do, {len(list(study.runs())) - len(todo)} done before")
    try:
        for number, (variant, seed) in enumerate(todo, start=1):
            row = study.train(variant, seed)
            rows.append(row)
            quality_results.write(path, rows)
            quality_plots.write_pages(folder, rows)
            say(
                f"{number}/{len(todo)} {row.schedule}, {row.layers} layers, "
                f"seed {seed}: held-out loss {row.held_out_loss:.4f}, "
                f"{row.tokens:,} tokens in {row.seconds:.0f} s"
            )
    except OutOfTime:
        say("--minutes is over: give the same command again to continue")
    if rows:
        say(f"{folder / quality_results.PAGE} shows all runs")


def main(words: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    words = sys.argv[1:] if words is None else list(words)
    command = "python -m ladder_jax.bench.quality"
    try:
        run(parse(Arguments, list(words), command))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
