"""The profiler's trace of a few training steps."""

import contextlib
from pathlib import Path

import jax

from ladder_jax.say import Say
from ladder_jax.train_programs import State


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
