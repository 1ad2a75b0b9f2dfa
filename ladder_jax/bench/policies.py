"""The ways of batching that `ladder-jax bench decode` compares: see decode.py."""

import dataclasses
import functools
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ladder_jax import decode, model
from ladder_jax.config import Decode, Model, require
from ladder_jax.serve.buckets import round_up
from ladder_jax.serve.engine import Counters, Engine


class Batched(Engine):
    """Static batching: nobody joins a batch that runs. A batch that is not full first waits `window` seconds."""

    window, expected, opened = 0.0, 0, False

    def _step(self):
        self._read_inbox()
        if not self._live and not self._flights:
            oldest = min((r.submitted for _, _, r in self._queue), default=None)
            full = len(self._queue) >= min(self.options.slots, self.expected)
            self.opened = oldest is not None and (
                full or time.perf_counter() - oldest >= self.window
            )
            self.room = self.options.slots
        self.patience = (
            10**9 if self._live else 0
        )  # the batch keeps the width that it began with
        return super()._step()

    def _steps(self):
        return super()._steps() if self.room else self.options.steps_per_call

    def _pop(self):
        if not self.opened or not self.room:
            return None
        self.room -= 1
        request = super()._pop()
        self.expected -= request is not None
        return request


class Concurrent:
    """Every request has a state of its own, one slot wide; their chunks take turns on the device."""

    def __init__(self, engine):
        self.like, self.waiting, self.running = engine, deque(), deque()
        self.counters = Counters()

    def submit(self, prompt, max_tokens):
        request = self.like.submit(
            prompt, max_tokens=max_tokens
        )  # for its handle and row alone
        self.like._inbox.clear()
        self.like._waiting_count = 0
        length = round_up(self.like.capacity.lengths, len(prompt) + max_tokens)
        self.running.append(
            (request, decode.empty(self.like.spec, 1, 1, length), False)
        )
        return request

    def warm_up(self):
        self.like.warm_up()

    def step(self):
        if not self.running:
            return False
        engine = self.like
        request, state, started = self.running.popleft()
        prefills = []
        if not started:
            n = len(request.prompt)
            width = round_up(engine.capacity.lengths, n)
            one = lambda value, kind=np.int32: np.asarray([value], kind)
            tokens = np.zeros((1, width), np.int32)
            tokens[0, :n] = request.prompt
            staging, events = engine._prefill(
                engine._weights,
                state.staging,
                decode.Prompts(
                    tokens,
                    one(0),
                    one(n),
                    one(0),
                    one(True, bool),
                    tokens,
                    request._row,
                ),
            )
            state = state._replace(staging=staging)
            prefills.append(jax.tree.map(lambda x: x[None], events))
        nobody = np.full(
            engine.options.slots + engine.capacity.places, decode.NO_REQUEST, np.int32
        )
        chunk = engine.options.steps_per_call
        state, events, _ = engine._chunks[chunk](
            engine._weights, state, nobody, np.int32(chunk)
        )
        self.counters.syncs += 1
        for made in jax.device_get([*prefills, events]):
            for k in np.flatnonzero(made.flag):
                request.tokens.append(int(made.token.flat[k]))
                request.times.append(time.perf_counter())
                self.counters.tokens += 1
                if made.flag.flat[k] != decode.TOKEN:
                    request.finish = "length"
        if not request.finish:
            self.running.append((request, state, True))
        return True


def make_policies(
    names: tuple[str, ...],
    options: Decode,
    parameters: model.Transformer,
    model_config: Model,
    mesh: jax.sharding.Mesh,
    windows: list[float],
) -> dict[str, Callable[[], Any]]:
    """The policies of these names: {name: a function that makes its engine}.

    Args:
      names: of policies, such as "dynamic"; none: all of them.
      options: of the engines, as far as policies do not differ in them.
      parameters: the model's.
      model_config: the model.
      mesh: the engines' devices.
      windows: seconds that dynamic batching waits for more requests.
    Raises ConfigError for an unknown name.
    """
    weights: dict[Any, Any] = {}

    def make(
        kind: Callable[..., Any] = Engine,
        pipelined: bool = True,
        trace: bool = False,
        **changes: Any,
    ) -> Any:
        engine = kind(
            parameters,
            model_config,
            mesh,
            dataclasses.replace(options, **changes),
            trace=trace,
            pipelined=pipelined,
        )
        # All engines exist at once and share one copy of the weights.
        engine._weights = weights.setdefault(engine.spec, engine._weights)
        return engine

    def batched(window: float) -> Any:
        engine = make(Batched)
        engine.window = window
        return engine

    policies: dict[str, Callable[[], Any]] = {
        "sequential": lambda: make(slots=1, staging=1),
        "concurrent": lambda: Concurrent(make(slots=1, staging=1, steps_per_call=4)),
        "static": lambda: batched(0.0),
        **{f"dynamic {w * 1e3:.0f} ms": functools.partial(batched, w) for w in windows},
        "per-token": lambda: make(steps_per_call=1, pipelined=False, fit_shapes=True),
        "no-shuffle": lambda: make(fit_shapes=False, trace=True),
        "ours": lambda: make(trace=True),
    }
    kinds = {name.split()[0] for name in policies}
    for name in names:
        known = ", ".join(policies)
        require(name.split()[0] in kinds, "policies", name, f"among {known}")
    wanted = {name.split()[0] for name in names} or kinds
    return {name: make for name, make in policies.items() if name.split()[0] in wanted}
