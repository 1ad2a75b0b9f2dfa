"""How much a pretrained model loses when a layer is made ladder: measured, not guessed.

One program serves all layers: it is the ladder model whose blocks each read a share of
the fresh stream (residual/annealing.py). A layer is ladder where that share is 0, and
standard where it is 1.

B batch, T tokens, L layers.
"""

from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np
from jax import lax

from ladder_jax import attention, model, sharding
from ladder_jax.config import Model
from ladder_jax.hardware import chips, xla_options
from ladder_jax.objective import BATCH_FIELDS, BATCH_SPECS, Batch, Extras
from ladder_jax.say import Say

Loss = Callable[[Iterable[int]], float]  # the layers that are ladder -> nats a token


def hybrid_loss(
    parameters: model.Transformer,
    model_config: Model,
    mesh: jax.sharding.Mesh,
    batches: Sequence[Batch],
    chunk: int = 2048,
) -> Loss:
    """A function that measures the mean loss with some layers made ladder.

    Args:
      parameters: on `mesh`.
      model_config: its residual schedule must be "ladder".
      mesh: the devices.
      batches: of data/batches.py; all of them are measured each time.
      chunk: tokens whose logits exist at one time.
    """
    assert model_config.residual == "ladder"
    length = batches[0]["tokens"].shape[1]
    kernel = attention.kernel_for(chips.platform(mesh), model_config, length)

    def local(parameters: model.Transformer, batch: Batch, extras: dict) -> jax.Array:
        loss = model.loss(
            parameters, model_config, batch, kernel=kernel, chunk=chunk, **extras
        )
        return lax.psum((loss, batch["weights"].sum()), sharding.BATCH_AXES)

    specs = sharding.parameter_specs(model.abstract(model_config))
    inputs = (specs, BATCH_SPECS, *Extras(freshness=True).specs())
    results = (sharding.REPLICATED, sharding.REPLICATED)
    evaluate = jax.jit(
        sharding.shard_map(local, mesh, inputs, results),
        compiler_options=xla_options.options(mesh),
    )
    rows = sharding.named_shardings(mesh, BATCH_SPECS)
    on_mesh = [
        jax.device_put({name: batch[name] for name in BATCH_FIELDS}, rows)
        for batch in batches
    ]

    def loss(ladder_layers: Iterable[int]) -> float:
        extras = dict(freshness=freshness_of(model_config.layers, ladder_layers))
        totals = [evaluate(parameters, batch, extras) for batch in on_mesh]
        total, weight = np.sum(jax.device_get(totals), axis=0)
        return float(total / weight)

    return loss


def freshness_of(layers: int, ladder_layers: Iterable[int]) -> np.ndarray:
    """One value a block: 0 in these layers, 1 in the others."""
    freshness_LB = np.ones((layers, 2), np.float32)
    freshness_LB[sorted(ladder_layers)] = 0
    return freshness_LB.reshape(-1)


def measure(loss: Loss, layers: int) -> tuple[float, list[float]]:
    """(the loss of the standard model, what each layer alone adds to it), nats."""
    standard = loss(())
    return standard, [loss([layer]) - standard for layer in range(layers)]


def cheapest(damages: Sequence[float], count: int) -> list[int]:
    """The `count` layers with the least damage, in order."""
    return sorted(np.argsort(damages, kind="stable")[:count].tolist())


def cheapest_together(loss: Loss, layers: int, count: int, say: Say) -> list[int]:
    """`count` layers, each the one that adds the least loss to those before it.

    It measures `count` times as often as `measure`.
    """
    chosen: list[int] = []
    for _ in range(count):
        losses = {
            layer: loss([*chosen, layer])
            for layer in range(layers)
            if layer not in chosen
        }
        best = min(losses, key=losses.__getitem__)
        chosen.append(best)
        say(f"with layer {best}: loss {losses[best]:.4f}, {len(chosen)} layers")
    return sorted(chosen)


def table(standard: float, damages: Sequence[float], chosen: Iterable[int]) -> str:
    """The damages as lines of text, four layers a line; * marks the chosen."""
    marks = set(chosen)
    cells = [
        f"{layer:3}{'*' if layer in marks else ' '} {damage:+.4f}"
        for layer, damage in enumerate(damages)
    ]
    lines = [f"loss of the standard model: {standard:.4f} nats a token"]
    lines.append("made ladder alone, a layer adds (* chosen):")
    for start in range(0, len(cells), 4):
        lines.append("  " + "   ".join(cells[start : start + 4]))
    return "\n".join(lines)
