"""The ways of batching that `ladder-jax bench decode` compares: see decode.py."""

import dataclasses
import functools
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from ladder_jax import decode, model
from ladder_jax.config import Decode, Model, require
from ladder_jax.serve.buckets import round_up
from ladder_jax.serve.counters import Counters
from ladder_jax.serve.engine import Engine
from ladder_jax.serve.programs import slot_state
from ladder_jax.serve.request import Request
from ladder_jax.serve.scheduler import Limits, Load, Scheduler, Step, plan_step


class StaticBatches:
    """A scheduler of static batching: the next batch starts when this one has ended.

    A batch that is not full first waits `window` seconds, counted from the submission
    of its oldest request; after it has started, it still takes requests until it is
    full. expected: requests that are still to come in this run.
    """

    def __init__(self, window: float) -> None:
        self.window, self.expected = window, 0
        self._room = 0  # requests that may still join the batch

    def __call__(self, load: Load, limits: Limits) -> Step:
        busy = bool(load.on_device)
        if not busy and not load.unread_chunks and load.candidates:
            waited = time.perf_counter() - min(w.submitted for w in load.candidates)
            is_full = load.queued >= min(limits.slots, self.expected)
            opens = is_full or waited >= self.window
            self._room = limits.slots if opens else 0
        candidates = load.candidates[: self._room]
        load = dataclasses.replace(
            load, candidates=candidates, queued=min(load.queued, self._room)
        )
        # The batch keeps the width that it began with.
        limits = dataclasses.replace(limits, patience=10**9 if busy else 0)
        step = plan_step(load, limits)
        self._room -= step.admit
        self.expected -= step.admit
        if step.chunk_steps and not self._room:
            step = step._replace(chunk_steps=limits.steps_per_call)
        return step


class Alone(NamedTuple):
    """A request of `Concurrent`, with a decode state of its own."""

    request: Request
    state: decode.DecodeState
    is_prefilled: bool


class Concurrent:
    """Gives every request a state of its own, one slot wide. Their chunks take turns.

    Args:
      engine: its programs are used; it never takes a step itself.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.running: deque[Alone] = deque()
        self.counters = Counters()

    def submit(self, prompt: list[int], max_tokens: int) -> Request:
        """Queues a request and returns its handle; see Engine.submit."""
        request = self.engine.submit(prompt, max_tokens=max_tokens)
        self.engine.stepper.queue.remove(request)
        length = round_up(self.engine.capacity.lengths, len(prompt) + max_tokens)
        state = decode.empty(self.engine.spec, 1, 1, length)
        self.running.append(Alone(request, state, False))
        return request

    def warm_up(self) -> None:
        """Compiles all programs."""
        self.engine.warm_up()

    def step(self) -> bool:
        """Runs a chunk of the next request. Returns whether there was one."""
        if not self.running:
            return False
        request, state, is_prefilled = self.running.popleft()
        outputs = []
        if not is_prefilled:
            state, events = self._prefill(request, state)
            outputs.append(jax.tree.map(lambda x: x[None], events))
        programs, steps = self.engine.programs, self.engine.options.steps_per_call
        no_cancels = np.full(programs.most_cancelled, decode.NO_REQUEST, np.int32)
        state, events, _ = programs.chunks[steps](
            programs.weights, state, no_cancels, np.int32(steps)
        )
        self.counters.syncs += 1
        for read in jax.device_get([*outputs, events]):
            self._hand_out(request, read)
        if not request.finish:
            self.running.append(Alone(request, state, True))
        return True

    def _prefill(
        self, request: Request, state: decode.DecodeState
    ) -> tuple[decode.DecodeState, decode.Events]:
        """Computes a whole prompt into staging."""
        engine, length = self.engine, len(request.prompt)
        width = round_up(engine.capacity.lengths, length)
        tokens_1T = np.zeros((1, width), np.int32)
        tokens_1T[0, :length] = request.prompt

        def one(value: int | bool, dtype: Any = np.int32) -> Any:
            return np.asarray([value], dtype)

        prompts = decode.Prompts(
            tokens=tokens_1T,
            start=one(0),
            length=one(length),
            staging_index=one(0),
            last=one(True, bool),
            prompt=tokens_1T,
            state=slot_state(
                request.number,
                request.submission,
                admission_order=0,
                max_stop_ids=engine.options.max_stop_ids,
            ),
        )
        staging, events = engine.programs.prefill(
            engine.programs.weights, state.staging, prompts
        )
        return state._replace(staging=staging), events

    def _hand_out(self, request: Request, events: Any) -> None:
        """Gives a request its tokens among the events of a call, NumPy arrays."""
        for index in np.flatnonzero(events.flag):
            request.tokens.append(int(events.token.flat[index]))
            request.times.append(time.perf_counter())
            self.counters.tokens += 1
            if events.flag.flat[index] != decode.TOKEN:
                request.finish = "length"


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
        scheduler: Scheduler = plan_step,
        pipelined: bool = True,
        trace: bool = False,
        **changes: Any,
    ) -> Engine:
        engine = Engine(
            parameters,
            model_config,
            mesh,
            dataclasses.replace(options, **changes),
            scheduler=scheduler,
            trace=trace,
            pipelined=pipelined,
        )
        # All engines exist at once and share one copy of the weights.
        programs = engine.programs
        programs.weights = weights.setdefault(engine.spec, programs.weights)
        return engine

    def batched(window: float) -> Engine:
        return make(StaticBatches(window))

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
