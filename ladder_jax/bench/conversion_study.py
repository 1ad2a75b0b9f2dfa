"""The parent, the texts and the compiled programs that all runs of the conversion study
share."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from ladder_jax import (
    attention,
    checkpoint,
    distill,
    objective,
    sharding,
    train_programs,
    training,
)
from ladder_jax import model as models
from ladder_jax.bench import conversion_report as reports
from ladder_jax.bench import conversion_text
from ladder_jax.bench.conversion_plan import Arguments
from ladder_jax.bench.conversion_tasks import Tasks
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
from ladder_jax.data import corpus as corpora
from ladder_jax.data.batches import held_out_batches
from ladder_jax.data.tokenizer import from_json
from ladder_jax.hardware import chips, xla_options
from ladder_jax.initial import load_parent
from ladder_jax.optimizer import make_optimizer

MEASURED = ("documentation", "notices")  # kinds of text; training uses the first


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
        sharding.check_fits(self.parent, self.mesh, arguments.batch)
        self.config = self._config()
        self.weights = load_parent(arguments.parent, self.parent, self.mesh)
        self.optimizer = with_rate(make_optimizer(self.config.optimizer, 10**9))
        self.steps = {
            name: train_programs.make_step(
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
        self.tasks = Tasks(arguments, self.parent, tokenizer, self.mesh)
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
            reports.say(self.corpora[kind].report)
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

    def blended_loss(self, parameters: Any, freshness: np.ndarray) -> float:
        """The loss on a part of the first held-out text, in nats a token."""
        picked = self.held_out[MEASURED[0]][: self.arguments.gate_batches]
        return self._mean_loss(parameters, freshness, picked)

    def _mean_loss(
        self, parameters: Any, freshness: np.ndarray, batches: Sequence[Any]
    ) -> float:
        inputs = self.inputs(freshness)
        sums = [self.measure_batch(parameters, batch, inputs) for batch in batches]
        _, ce, weight = np.sum(jax.device_get(sums), axis=0)
        return float(ce / weight)

    def first_state(self, rate: float) -> train_programs.State:
        """The parent's parameters in float32, and a new optimizer."""
        shapes = train_programs.abstract_state(self.config, self.mesh, self.optimizer)
        parameters = checkpoint.load_model(self.arguments.parent, shapes.model)
        init = jax.jit(
            self.optimizer.init,
            out_shardings=jax.tree.map(lambda x: x.sharding, shapes.optimizer),
        )
        return with_rate_of(train_programs.State(parameters, init(parameters)), rate)

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
                freshness = damage.freshness_of(count, layers)
                return self._mean_loss(parameters, freshness, batches)

            standard, damages = damage.measure(loss, count)
            reports.write_damages(out, damages)
            chosen = damage.cheapest(damages, number)
            reports.say(damage.table(standard, damages, chosen))
        return damage.cheapest(damages, number)


def with_rate_of(state: train_programs.State, rate: float) -> train_programs.State:
    """`state` with this learning rate."""
    old = state.optimizer.rate
    new = jax.device_put(np.float32(rate), old.sharding)
    return train_programs.State(state.model, state.optimizer._replace(rate=new))
