"""Implements the ways of batching that `ladder-jax bench decode` compares.

The docstring of decode.py describes them.
"""

import dataclasses
import functools
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from ladder_jax import decode, decode_state, model
from ladder_jax.config import Decode, Model, require
from ladder_jax.serve.buckets import bucket_sizes, round_up
from ladder_jax.serve.capacity import SHORTEST_LENGTH
from ladder_jax.serve.counters import Counters
from ladder_jax.serve.engine import Engine
from ladder_jax.serve.programs import array, slot_state
from ladder_jax.serve.request import Request
from ladder_jax.serve.scheduler import Limits, Load, Scheduler, Step, plan_step


class StaticBatches:
    """A scheduler of static batching: the next batch starts when this one has ended.

    A batch that is not full first waits `window` seconds, counted from the submission
    of its oldest request. After it has started, it still takes requests, until it has
    had as many as there are slots. Before a run, set `expected` to its number of
    requests, so that the last batch does not wait for more.

    Args:
      window: seconds. 0: static batching; more: dynamic batching.
    """

    def __init__(self, window: float) -> None:
        self.window, self.expected = window, 0
        self._room = 0  # requests that may still join the batch

    def __call__(self, load: Load, limits: Limits) -> Step:
        busy = bool(load.on_device)
        if not busy and not load.unread_chunks and load.candidates:
            oldest = min(candidate.submitted for candidate in load.candidates)
            waited = time.perf_counter() - oldest
            is_full = load.queued >= min(limits.slots, self.expected)
            starts = is_full or waited >= self.window
            self._room = limits.slots if starts else 0
        candidates = load.candidates[: self._room]
        load = dataclasses.replace(
            load, candidates=candidates, queued=min(load.queued, self._room)
        )
        # The batch keeps the width that it started with.
        limits = dataclasses.replace(limits, patience=10**9 if busy else 0)
        step = plan_step(load, limits)
        self._room -= step.admit
        self.expected -= step.admit
        if step.chunk_steps and not self._room:
            step = step._replace(chunk_steps=limits.steps_per_call)
        return step


class SingleRequest(NamedTuple):
    """A request of `Concurrent`, and the decode state that it alone uses."""

    request: Request
    state: decode.DecodeState
    is_prefilled: bool


class Concurrent:
    """Gives every request a state of its own, one slot wide. Their chunks take turns.

    Args:
      engine: its compiled programs decode the states. Its own state stays empty.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.running: deque[SingleRequest] = deque()
        self.counters = Counters()

    def submit(self, prompt: list[int], max_tokens: int, **options: Any) -> Request:
        """Queues a request and returns its handle; see Engine.submit."""
        request = self.engine.submit(prompt, max_tokens=max_tokens, **options)
        self.engine.stepper.queue.remove(request)
        length = round_up(self.engine.capacity.lengths, len(prompt) + max_tokens)
        spec = self.engine.spec
        page_count = decode_state.table_size(spec, length)
        state = decode_state.empty(spec, 1, 1, length, page_count)
        self.running.append(SingleRequest(request, state, False))
        return request

    def warm_up(self) -> None:
        """Compiles all programs."""
        self.engine.warm_up()

    def step(self) -> bool:
        """Runs a chunk of the next request. Returns False if there is no request."""
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
        for host_events in jax.device_get([*outputs, events]):
            self._append_tokens(request, host_events)
        if not request.finish:
            self.running.append(SingleRequest(request, state, True))
        return True

    def _prefill(
        self, request: Request, state: decode.DecodeState
    ) -> tuple[decode.DecodeState, decode.Events]:
        """Prefills a whole prompt into the staging of `state`."""
        engine, length = self.engine, len(request.prompt)
        longest = engine.capacity.length
        width = round_up(bucket_sizes(min(SHORTEST_LENGTH, longest), longest), length)
        tokens_1T = np.zeros((1, width), np.int32)
        tokens_1T[0, :length] = request.prompt

        prompts = decode.Prompts(
            tokens=tokens_1T,
            start=array(0),
            length=array(length),
            staging_index=array(0),
            last=array(True, bool),
            prompt=tokens_1T,
            state=slot_state(
                request.number,
                request.submission,
                admission_order=0,
                max_stop_ids=engine.options.max_stop_ids,
            ),
            size=array(length),
            generated=array(0),
        )
        staging, events, _ = engine.programs.prefill(
            engine.programs.weights, state.shared_staging(), prompts
        )
        return state.with_staging(staging), events

    def _append_tokens(self, request: Request, events: Any) -> None:
        """Appends the tokens of a call's events, NumPy arrays, to a request."""
        for index in np.flatnonzero(events.flag):
            request.tokens.append(int(events.token.flat[index]))
            request.times.append(time.perf_counter())
            self.counters.tokens += 1
            if events.flag.flat[index] != decode_state.TOKEN:
                request.finish = "length"


@dataclasses.dataclass
class _Engines:
    """Makes engines of one model, all with one copy of its weights."""

    options: Decode
    parameters: model.Transformer
    model_config: Model
    mesh: jax.sharding.Mesh
    weights: dict[Any, Any] = dataclasses.field(default_factory=dict)

    def make(
        self,
        scheduler: Scheduler = plan_step,
        pipelined: bool = True,
        **changes: Any,
    ) -> Engine:
        """An engine; `changes` are of `options`."""
        engine = Engine(
            self.parameters,
            self.model_config,
            self.mesh,
            dataclasses.replace(self.options, **changes),
            scheduler=scheduler,
            trace=True,
            pipelined=pipelined,
        )
        # Weights are the same with pages and with drafts.
        spec = engine.spec._replace(page_size=0, speculate=0)
        programs = engine.programs
        programs.weights = self.weights.setdefault(spec, programs.weights)
        return engine

    def make_static(self, window: float, **changes: Any) -> Engine:
        return self.make(StaticBatches(window), **changes)

    def make_concurrent(self, **changes: Any) -> Concurrent:
        changes |= dict(slots=1, staging=1, steps_per_call=4)
        return Concurrent(self.make(**changes))


def make_policies(
    names: tuple[str, ...],
    options: Decode,
    parameters: model.Transformer,
    model_config: Model,
    mesh: jax.sharding.Mesh,
    windows: list[float],
    drafts: int,
    carry_tokens: int,
) -> dict[str, Callable[..., Any]]:
    """The policies of these names: {name: a function that builds its engine}.

    The function takes changes of `options`.

    Args:
      names: of policies, such as "dynamic". An empty tuple means all of them.
      options: of the engines; some policies change some of them.
      parameters: the model's.
      model_config: the model.
      mesh: the engines' devices.
      windows: seconds that dynamic batching waits for more requests.
      drafts: the most drafted tokens of the policy speculate.
      carry_tokens: of the policy carry.
    Raises ConfigError for an unknown name.
    """
    engines = _Engines(options, parameters, model_config, mesh)
    make = functools.partial
    policies: dict[str, Callable[..., Any]] = {
        "sequential": make(engines.make, slots=1, staging=1),
        "concurrent": engines.make_concurrent,
        "static": make(engines.make_static, 0.0),
        **{
            f"dynamic {window * 1e3:.0f} ms": make(engines.make_static, window)
            for window in windows
        },
        "per-token": make(
            engines.make, steps_per_call=1, pipelined=False, fit_shapes=True
        ),
        "no-shuffle": make(engines.make, fit_shapes=False),
        "rows": make(engines.make, kv_layout="rows"),
        "ours": engines.make,
        "speculate": make(engines.make, speculate=drafts),
        "carry": make(engines.make, kv_layout="pages", carry_tokens=carry_tokens),
    }

    def kind_of(name: str) -> str:
        """The name without a window, such as "dynamic"."""
        return name.split()[0]

    kinds = set(map(kind_of, policies))
    for name in names:
        known = ", ".join(policies)
        require(kind_of(name) in kinds, "policies", name, f"among {known}")
    kinds_to_run = set(map(kind_of, names)) or kinds
    return {
        name: function
        for name, function in policies.items()
        if kind_of(name) in kinds_to_run
    }
