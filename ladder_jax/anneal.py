"""The annealed delay in time: how fresh a stream blocks read in each training step.

Freshness 1 is the stream of schedule standard, 0 that of the model's own schedule. It
falls linearly in `distill.anneal_steps` steps, and waits while the held-out loss of the
blended model is too far above its loss before the first step.
"""

from typing import Any

import numpy as np

from ladder_jax.config import Distill


class Anneal:
    """The freshness of every step; its `state` is JSON that a checkpoint stores.

    Args:
      options: anneal_steps, greater than 0, and anneal_tolerance.
      steps: of the whole run.
      state: that of a run to resume; None: a new run.
    """

    def __init__(
        self, options: Distill, steps: int, state: dict[str, Any] | None = None
    ) -> None:
        self.options, self.steps = options, steps
        state = state or {}
        self._done: int = state.get("done", 0)  # steps that have changed the freshness
        self._reference: float | None = state.get("reference")
        self._waits: bool = state.get("waits", False)

    def state(self) -> dict[str, Any]:
        return dict(done=self._done, reference=self._reference, waits=self._waits)

    def freshness(self, step: int) -> np.float32:
        """The freshness of step `step`, from 0.

        It falls with the steps that did not wait. In the run's last `anneal_steps`
        steps it falls without waiting, so that the last step has 0.
        """
        count = self.options.anneal_steps
        by_steps_done = 1 - self._done / count
        by_steps_left = max(self.steps - 1 - step, 0) / count
        return np.float32(max(min(by_steps_done, by_steps_left), 0))

    @property
    def ended(self) -> bool:
        """Whether the freshness is 0 for the rest of the run."""
        return self._done >= self.options.anneal_steps

    def after_step(self) -> None:
        """Takes note that a step was taken."""
        if not self._waits:
            self._done = min(self._done + 1, self.options.anneal_steps)

    def see(self, loss: float) -> None:
        """Takes the held-out loss of the blended model, in nats a token.

        The first one is that of the fresh model, before the first step.
        """
        tolerance = self.options.anneal_tolerance
        if tolerance is None:
            return
        if self._reference is None:
            self._reference = loss
        self._waits = loss > self._reference + tolerance
