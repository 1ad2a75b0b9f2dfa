"""What steps take beside the state and the batch: the parent and the freshness."""

from typing import Any

import jax
import numpy as np

from ladder_jax import model
from ladder_jax.anneal import Anneal
from ladder_jax.config import Config, Model
from ladder_jax.initial import load_parent
from ladder_jax.objective import Extras


class StepInputs:
    """The parent's parameters and the annealed delay of a run.

    Args:
      config: the run's.
      mesh: the run's, for the parent too.
      parent: the parent's shape (initial.parent_model); None: no parent.
      state: `state()` of the run to resume; None: a new run.

    Attributes:
      anneal: the annealed delay; None: none.
    """

    def __init__(
        self,
        config: Config,
        mesh: jax.sharding.Mesh,
        parent: Model | None,
        state: dict[str, Any] | None,
    ) -> None:
        self._config, self._parent = config, parent
        self._parameters: model.Transformer | None = None
        if parent is not None:
            self._parameters = load_parent(config.distill.parent, parent, mesh)
        self.anneal: Anneal | None = None
        self.restore(state)

    def restore(self, state: dict[str, Any] | None) -> None:
        """Goes on from `state()` of a checkpoint; None: from the start."""
        config = self._config
        if config.distill.anneal_steps:
            self.anneal = Anneal(config.distill, config.train.steps, state)

    @property
    def annealing(self) -> bool:
        """Whether the next step takes a freshness.

        Once the delay is that of the schedule for good, steps run the program without
        one, whose reductions overlap.
        """
        return self.anneal is not None and not self.anneal.ended

    def extras(self, annealing: bool) -> Extras:
        """What the program of a step takes."""
        return Extras(self._parent, annealing)

    def for_step(self, step: int) -> tuple[dict[str, Any], ...]:
        """The last argument of step `step`, from 0; no argument if it takes none."""
        inputs: dict[str, Any] = {}
        if self._parameters is not None:
            inputs["parent"] = self._parameters
        return (inputs | self.freshness(step),) if inputs or self.annealing else ()

    def freshness(self, step: int) -> dict[str, np.float32]:
        """The freshness of step `step` as a dict; empty where there is none."""
        if self.anneal is None or self.anneal.ended:
            return {}
        return dict(freshness=self.anneal.freshness(step))

    def after_step(self) -> None:
        """Takes note that a step was taken."""
        if self.anneal is not None:
            self.anneal.after_step()

    def see(self, loss: float) -> None:
        """Takes the held-out loss of the blended model, in nats a token."""
        if self.anneal is not None:
            self.anneal.see(loss)

    def state(self) -> dict[str, Any]:
        """What a checkpoint's meta stores, as JSON."""
        return {} if self.anneal is None else dict(anneal=self.anneal.state())
