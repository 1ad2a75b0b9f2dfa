"""Leaves out training steps whose loss or gradient norm is not finite, or spikes.

The compiled step itself decides, from numbers that all devices have: a bad step changes
neither parameters nor optimizer, and the host does not wait for the decision.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ladder_jax.config import Train

# Steps in the running means of loss and gradient norm. Nothing is a spike before so
# many good steps.
WINDOW = 50


class Watch(NamedTuple):
    """What a step knows of the steps before it: scalars, the same on all devices."""

    loss: Any  # the running mean of good steps, float32
    norm: Any  # the same of the gradient norm
    good: Any  # how many good steps, int32
    skipped: Any  # how many bad ones, int32
    # How many of them in a row, int32. It stays at the limit, so that the host sees it
    # in the next report.
    in_a_row: Any

    def state(self) -> dict[str, float]:
        """As JSON, for a checkpoint's meta. Waits for the arrays."""
        return {name: value.item() for name, value in self._asdict().items()}


def start(state: dict[str, float] | None = None) -> Watch:
    """The watch of a new run, or that of `Watch.state`, as NumPy scalars."""
    values = Watch(0.0, 0.0, 0, 0, 0)._asdict() | (state or {})
    types = dict.fromkeys(("loss", "norm"), np.float32)
    return Watch(**{n: types.get(n, np.int32)(value) for n, value in values.items()})


def judge(
    options: Train, watch: Watch, loss: jax.Array, norm: jax.Array
) -> tuple[jax.Array, Watch]:
    """(whether a step is bad, the watch after it).

    Args:
      options: skip_steps, greater than 0, and spike_factor.
      watch: before the step.
      loss: of the step, in nats a token.
      norm: of its gradients.
    """
    bad = ~(jnp.isfinite(loss) & jnp.isfinite(norm))
    if options.spike_factor is not None:
        factor, full = options.spike_factor, watch.good >= WINDOW
        bad |= full & (loss > factor * watch.loss)
        bad |= full & (norm > factor * watch.norm)
    good = watch.good + 1
    share = 1 / jnp.minimum(good, WINDOW).astype(jnp.float32)
    after_good = watch._replace(
        loss=watch.loss + (loss - watch.loss) * share,
        norm=watch.norm + (norm - watch.norm) * share,
        good=good,
        in_a_row=jnp.zeros_like(watch.in_a_row),
    )
    after_bad = watch._replace(skipped=watch.skipped + 1, in_a_row=watch.in_a_row + 1)
    after = choose(bad, after_bad, after_good)
    full_row = watch.in_a_row >= options.skip_steps
    in_a_row = jnp.where(full_row, watch.in_a_row, after.in_a_row)
    return bad, after._replace(in_a_row=in_a_row)


def choose(condition: jax.Array, yes: Any, no: Any) -> Any:
    """The tree `yes` where `condition`, a scalar, is true, else the tree `no`."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)
