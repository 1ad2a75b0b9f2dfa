"""The host side of serving: requests come in, their tokens come out, the device decides the rest (decode.py).

    engine = Engine(model, config.model, mesh, Decode(slots=32), tokenizer)
    for token in engine.submit("Once upon", max_tokens=50, temperature=0.8, seed=1):
        print(token.text, end="")

One `step` prefills what there is room for, starts a chunk, and then reads the events of the chunk before it, so that
the device never waits for the host: one synchronisation a chunk. A step is taken by whoever iterates a request, or by
the engine's own thread once it is started (`with engine:`), which asyncio needs.
"""

import dataclasses
import gc
import heapq
import itertools
import logging
import threading
import time
from collections import deque
from typing import NamedTuple

import jax
import numpy as np

from ladder_jax import config as configuration
from ladder_jax import decode, kv_cache, sampling, sharding
from ladder_jax.config import ConfigError
from ladder_jax.residual import choose
from ladder_jax.serve import packing
from ladder_jax.serve.buckets import round_up
from ladder_jax.serve.capacity import Capacity
from ladder_jax.serve.prefix_cache import PrefixCache
from ladder_jax.serve.request import QueueFull, Request, Token
from ladder_jax.serve.stop_strings import StopStringFilter

log = logging.getLogger(__name__)
PATIENCE = 4  # chunks that a smaller shape must have sufficed for, before the state shrinks to it


@dataclasses.dataclass
class Counters:
    """What an engine has done so far."""

    submitted: int = 0
    finished: int = 0
    tokens: int = 0
    chunks: int = 0
    syncs: int = 0  # waits of the host for the device
    iterations: int = 0  # of the decode loop
    slot_iterations: int = 0  # iterations times slots of the compiled width
    busy: int = 0  # of these, those that made a token
    prefill_calls: int = 0
    prefill_tokens: int = 0  # that counted
    prefill_padded: int = 0  # that were computed
    prefix_tokens: int = 0  # that a shared prefix saved
    reshapes: int = 0
    failures: int = 0  # of the device

    @property
    def occupancy(self):
        """The share of slot iterations that made a token."""
        return self.busy / max(self.slot_iterations, 1)


class _Place(NamedTuple):
    """Who holds a place in staging: a request, and the chunk that first saw it wait (None: still being prefilled)."""

    request: Request
    chunk: int | None


class _Flight(NamedTuple):
    """Results under way to the host."""

    chunk: int
    width: int
    steps: int  # iterations of the chunk
    prefills: list  # Events [P]
    events: object  # Events [K, W]
    waiting: object  # [R]


class Engine:
    """Decodes requests of one model on one mesh.

    Args:
      model: its parameters on `mesh` (a model.Transformer).
      config: its config.Model.
      mesh: of size 1 along data and fsdp; an engine a replica serves data parallel.
      options: config.Decode.
      tokenizer: for prompts that are text, for text of tokens and stop strings; None: ids alone.
      reduction: of reductions.REDUCTIONS, or "auto": what choose.py takes for this machine.
      trace: keep what every slot did in every iteration in `self.history`, a list of (seconds, request ids [K, W]).
    Raises ConfigError where the options do not fit the model, the mesh or the memory.

    On a mesh of several hosts each has an engine, and all take the same steps: the same calls in the same order, and no
    thread of the engine's. Nothing is decided by time, so that they agree.
    """

    def __init__(
        self,
        model,
        config,
        mesh,
        options=None,
        tokenizer=None,
        *,
        reduction="auto",
        trace=False,
        pipelined=True,
    ):
        self.options = options = options or configuration.Decode()
        if mesh.shape[sharding.DATA] * mesh.shape[sharding.FSDP] != 1:
            raise ConfigError(
                f"mesh.data x mesh.fsdp = {mesh.shape[sharding.DATA] * mesh.shape[sharding.FSDP]} is not "
                "accepted: an engine decodes on a mesh of tensor shards alone, so both must be 1"
            )
        sharding.check_fits(config, mesh)
        self.length = options.max_length or config.max_length
        if self.length > config.max_length:
            raise ConfigError(
                f"decode.max_length={self.length} is not accepted: it must be at most "
                f"model.max_length={config.max_length}"
            )
        self.vocabulary = tokenizer.size if tokenizer else config.vocab_size
        if self.vocabulary > config.vocab_size:
            raise ConfigError(
                f"the tokenizer has {self.vocabulary} ids, but model.vocab_size={config.vocab_size}"
            )
        self.config, self.mesh, self.tokenizer, self.trace, self.pipelined = (
            config,
            mesh,
            tokenizer,
            trace,
            pipelined,
        )
        platform = mesh.devices.flat[0].platform
        fixed = options.loop == "fixed" or (
            options.loop == "auto" and platform in ("gpu", "cuda", "rocm")
        )
        kv_dtype = kv_cache.choose_dtype(options.kv_dtype, config.dtype, platform)
        self.spec = decode.DecodeSpec(
            config,
            mesh,
            self.vocabulary,
            options.max_stop_ids,
            options.max_logit_bias,
            min(options.max_logprobs, self.vocabulary),
            kv_dtype,
            options.unroll_layers,
            fixed,
            choose.reduction_for(reduction, config, mesh),
        )
        token_bytes = (
            kv_cache.bytes_per_token(config, kv_dtype) // mesh.shape[sharding.TENSOR]
        )  # on one device
        self.prefixes = PrefixCache(
            options.prefix_block,
            configuration.to_bytes(options.prefix_memory, "prefix_memory"),
            token_bytes * options.prefix_block,
        )
        self.capacity = Capacity(
            options,
            self.length,
            token_bytes,
            2 * config.layers if options.unroll_layers else 2,
            self.prefixes.budget,
            fixed,
        )
        self.options = options = dataclasses.replace(options, slots=self.capacity.slots)
        self._weights = decode.place_weights(self.spec, model)
        self._chunks = {
            size: decode.make_chunk(self.spec, size) for size in self.capacity.chunks
        }
        self._prefill = decode.make_prefill(self.spec)
        self._read_block = decode.make_read_block(self.spec, options.prefix_block)
        self._write_block = decode.make_write_block(self.spec)
        self.counters, self.history, self.patience = Counters(), [], PATIENCE
        self._numbers = itertools.count(1)
        self._inbox, self._cancels = deque(), deque()
        self._queue = []  # heap of (-priority, number, request)
        self._waiting_count = 0
        self._stepping, self._counting = threading.RLock(), threading.Lock()
        self._thread, self._wake, self._closing = None, threading.Event(), False
        self._reset()

    # ------------------------------------------------------------ the door

    def submit(
        self,
        prompt,
        *,
        max_tokens=None,
        stop=(),
        stop_token_ids=None,
        logprobs=None,
        priority=0,
        logit_bias=None,
        **sampling_options,
    ):
        """Queues a request and returns its handle.

        Args:
          prompt: text, or ids.
          max_tokens: most tokens it may emit (default: 200, or as many as there is room for).
          stop: a string or several; output ends before the first one that it would contain.
          stop_token_ids: ids that end it and are not part of it (default: the tokenizer's eos).
          logprobs: None, or how many alternatives' log-probabilities come with every token's own (0 or more).
          priority: higher goes first; equals go first come, first served.
          logit_bias: {id: added to its logit}; sampling_options: those of sampling.SamplingParams.
        Raises ConfigError for what is not accepted, QueueFull when decode.queue_size requests wait already.
        """
        if isinstance(prompt, str):
            self._need_tokenizer("prompt is text")
            prompt = self.tokenizer.prompt(prompt)
        prompt = np.asarray(list(prompt), np.int64)
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if stop:
            self._need_tokenizer("stop is text")
        if stop_token_ids is None:
            stop_token_ids = (self.tokenizer.eos,) if self.tokenizer else ()
        room = self.length - len(prompt)
        max_tokens = max(min(200, room), 1) if max_tokens is None else max_tokens
        for name, value, ok, accepted in (
            ("prompt", "[]", len(prompt), "at least one token"),
            (
                "prompt",
                prompt[:8].tolist(),
                ((0 <= prompt) & (prompt < self.vocabulary)).all(),
                f"of ids from 0 to {self.vocabulary - 1}",
            ),
            (
                "prompt",
                f"{len(prompt)} tokens",
                room > 0,
                f"fewer than {self.length} tokens",
            ),
            (
                "max_tokens",
                max_tokens,
                isinstance(max_tokens, int) and 1 <= max_tokens <= room,
                f"from 1 to {room}: {self.length} less the {len(prompt)} of the prompt",
            ),
            (
                "stop_token_ids",
                stop_token_ids,
                len(stop_token_ids) <= self.options.max_stop_ids,
                f"at most {self.options.max_stop_ids} ids",
            ),
            (
                "stop",
                stop,
                all(isinstance(s, str) and s for s in stop),
                "non-empty strings",
            ),
            (
                "logprobs",
                logprobs,
                logprobs is None or 0 <= logprobs <= self.spec.max_logprobs,
                f"None, or from 0 to {self.spec.max_logprobs}",
            ),
        ):
            if not ok:
                raise ConfigError(
                    f"{name}={value} is not accepted: it must be {accepted}"
                )
        params = sampling.make_params(
            logit_bias, self.options.max_logit_bias, self.vocabulary, **sampling_options
        )
        number = next(self._numbers)
        one = lambda value, dtype=np.int32: np.asarray([value], dtype)
        padded = [
            *map(int, stop_token_ids),
            *[decode.NO_REQUEST] * (self.options.max_stop_ids - len(stop_token_ids)),
        ]
        row = decode.SlotState(
            request=one(number),
            active=one(False, bool),
            admission_order=one(0),
            token=one(0),
            position=one(0),
            remaining=one(max_tokens),
            stops=one(padded),
            logprobs=one(logprobs is not None, bool),
            sampling=params,
            history=None,
        )
        stopper = (
            StopStringFilter(self.tokenizer.stream(), stop) if self.tokenizer else None
        )
        request = Request(
            self,
            number,
            prompt.astype(np.int32),
            max_tokens,
            row,
            priority,
            logprobs,
            stopper,
        )
        with self._counting:
            if self._waiting_count >= self.options.queue_size:
                raise QueueFull(
                    f"{self._waiting_count} requests wait already (decode.queue_size={self.options.queue_size})"
                )
            self._waiting_count += 1
            self.counters.submitted += 1
        self._inbox.append(request)
        self._wake.set()
        return request

    def generate(self, prompts, **options):
        """The finished Requests of all `prompts` (texts or ids), in order; options: those of `submit`."""
        requests = []
        for prompt in prompts:
            while self._waiting_count >= self.options.queue_size:
                time.sleep(0.001) if self.running else self.step()
            requests.append(self.submit(prompt, **options))
        return [request.result() for request in requests]

    @property
    def running(self):
        """Whether the engine's thread takes the steps."""
        return self._thread is not None and self._thread.is_alive()

    def start(self):
        """Starts the engine's thread, if it does not run. Raises ConfigError on a mesh of several hosts."""
        if len({device.process_index for device in self.mesh.devices.flat}) > 1:
            raise ConfigError(
                "on several hosts an engine has no thread of its own, as all must take the same steps: "
                "submit the same requests on each, and iterate them there"
            )
        with self._counting:
            if not self.running:
                self._closing = False
                self._thread = threading.Thread(
                    target=self._run, name="ladder_jax engine", daemon=True
                )
                self._thread.start()
        return self

    def close(self):
        """Ends the engine's thread after its step; what is unfinished stays, and can be stepped on."""
        self._closing = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join()

    __enter__ = start

    def __exit__(self, *_):
        self.close()

    def _run(self):
        while not self._closing:
            if not self.step():
                self._wake.wait(0.05)
                self._wake.clear()

    def _need_tokenizer(self, why):
        if self.tokenizer is None:
            raise ConfigError(f"{why}, but this engine has no tokenizer: give ids")

    def _cancel(self, request):
        request._put(finish="cancelled")
        self._cancels.append(request)
        self._wake.set()

    # ------------------------------------------------------------ a step

    def step(self):
        """Takes one step; whether there was anything to do. An exception on the device fails what is live, no more."""
        with self._stepping:
            try:
                return self._step()
            except Exception as error:  # whatever it was, the device's state is lost and the engine goes on
                log.exception(
                    "decode step failed; live requests fail, the engine starts afresh"
                )
                self._fail(error)
                return True

    def _step(self):
        self._read_inbox()
        self._fit()
        prefills = self._admit()
        started = self._start_chunk()
        if self._flights and (
            not started or not self.pipelined or len(self._flights) > 1
        ):
            self._land(self._flights.popleft())
            return True
        return started or bool(prefills) or bool(self._prefilled)

    def _reset(self):
        self._width, self._length, self._small = (
            self.capacity.widths[0],
            self.capacity.lengths[0],
            0,
        )
        self._state = decode.empty(
            self.spec, self._width, self.capacity.places, self._length
        )
        self._staging = [None] * self.capacity.places  # _Place or None
        self._prefilled = {}  # place -> prompt tokens computed so far, in order of admission
        self._live = {}  # id -> request, of those on the device
        self._cancelled = []  # ids that the next chunk cancels
        self._flights, self._started = (
            deque(),
            0,
        )  # chunks under way, and how many were started so far
        self._pending = []  # prefill events that no chunk has taken along yet
        self.prefixes.clear()

    def _fail(self, error):
        live = list(self._live.values())
        self.counters.failures += 1
        self._reset()
        for request in live:
            self.counters.finished += 1
            request._put(finish="error", error=error)

    def _read_inbox(self):
        while self._inbox:
            request = self._inbox.popleft()
            heapq.heappush(self._queue, (-request.priority, request.number, request))
        while self._cancels:
            request = self._cancels.popleft()
            if request.number in self._live:
                self._drop(request)

    def _drop(self, request):
        """Takes a request off the device whose events no longer count."""
        del self._live[request.number]
        self.counters.finished += 1
        for index, place in enumerate(self._staging):
            if (
                place and place.request is request and place.chunk is None
            ):  # still being prefilled: never waited
                self._staging[index] = None
                del self._prefilled[index]
                return
        self._cancelled.append(request.number)

    # ------------------------------------------------------------ shape

    def _fit(self):
        """Grows the state's compiled shape to what the next chunk needs; shrinks it when less has sufficed for long."""
        if not self.options.fit_shapes:
            return
        room = self.capacity.places - sum(place is not None for place in self._staging)
        coming = [
            request
            for _, _, request in heapq.nsmallest(room, self._queue)
            if not request.finish
        ]
        live = len(self._live) + len(
            self._cancelled
        )  # an upper bound: some may have finished already
        if not live + len(coming):
            return
        width = round_up(
            self.capacity.widths, min(live + len(coming), self.options.slots)
        )
        steps = self.options.steps_per_call * (len(self._flights) + 1)
        reach = lambda request: (
            len(request.prompt)
            + min(request.max_tokens, len(request.tokens) + steps + 1)
        )
        length = round_up(
            self.capacity.lengths,
            max(map(reach, [*self._live.values(), *coming]), default=0),
        )
        grown = max(width, self._width), max(length, self._length)
        self._small = self._small + 1 if (width, length) != grown else 0
        target = grown
        if self._small > self.patience or not live:
            target, self._small = (width, length), 0
        if target != (self._width, self._length):
            self._move(*target)
            self.counters.reshapes += 1

    def _move(self, width, length):
        """Gives the state another shape."""
        for shape in self.capacity.moves((self._width, self._length), (width, length)):
            self._state = decode.reshape(self._state, *shape)
        self._width, self._length = width, length

    # ------------------------------------------------------------ prefill

    def _enough_wait(self):
        """Whether prefill can wait until more prompts share a call: enough requests stand by for the slots that free.

        That is for all whose tokens run out within the chunks under way and the next one; and as a stop may end others
        at any time, for a quarter of the slots.
        """
        soon = self.options.steps_per_call * (len(self._flights) + 1)
        ends = sum(
            request.max_tokens - len(request.tokens) <= soon
            for request in self._live.values()
        )
        waiting = sum(
            place is not None and place.chunk is not None for place in self._staging
        )
        free = self.options.slots - (len(self._live) - len(self._prefilled) - waiting)
        return waiting - max(free, 0) >= max(ends, -(-self.options.slots // 4))

    def _admit(self):
        """Gives free places to those whose turn it is, and starts prefill calls. Returns how many."""
        for index, place in enumerate(self._staging):
            if place is None and (request := self._pop()):
                self._staging[index] = _Place(request, None)
                self._live[request.number] = request
                self._prefilled[index] = self._paste_prefix(index, request)
        calls, budget = 0, self.options.prefill_budget
        decoding = len(self._live) > len(self._prefilled)
        while self._prefilled and (
            budget > 0 and not self._enough_wait() or not decoding
        ):
            used = self._prefill_call(
                budget if decoding else self.options.prefill_budget
            )
            if not used:
                break
            budget -= used
            calls += 1
            decoding = len(self._live) > len(self._prefilled)
        return calls

    def _pop(self):
        """The next request that is still wanted, or None."""
        while self._queue:
            request = heapq.heappop(self._queue)[2]
            with self._counting:
                self._waiting_count -= 1
            if not request.finish:
                return request
            self.counters.finished += 1
        return None

    def _paste_prefix(self, index, request):
        """Copies what is known of the prompt into the place; the number of its tokens."""
        blocks = self.prefixes.find(request.prompt)
        for i, block in enumerate(blocks):
            start = np.int32(i * self.options.prefix_block)
            self._stage(
                self._write_block(self._state.staging, np.int32(index), start, block)
            )
        self.counters.prefix_tokens += len(blocks) * self.options.prefix_block
        return len(blocks) * self.options.prefix_block

    def _prefill_call(self, budget):
        """Computes the next pieces of as many prompts as fit `budget` tokens, padding included; tokens computed."""
        waiting = [
            (index, done, len(self._staging[index].request.prompt))
            for index, done in self._prefilled.items()
        ]
        chosen, width = packing.pick_pieces(waiting, self.capacity.pieces, budget)
        if not chosen:
            return 0
        requests = [self._staging[piece.staging_index].request for piece in chosen]
        seen = round_up(
            self.capacity.seen(self._length), max(piece.stop for piece in chosen)
        )
        prompts = self._pack(
            chosen,
            width,
            seen,
            [request.prompt for request in requests],
            [self._turn(request) for request in requests],
        )
        staging, events = self._prefill(self._weights, self._state.staging, prompts)
        self._stage(staging)
        _copy_to_host(events)
        self._pending.append(events)
        self.counters.prefill_calls += 1
        self.counters.prefill_tokens += int(prompts.length.sum())
        self.counters.prefill_padded += prompts.tokens.size
        for piece, request in zip(chosen, requests):
            if piece.last:
                del self._prefilled[piece.staging_index]
                self._staging[piece.staging_index] = _Place(request, self._started)
                self._keep_prefix(piece.staging_index, request)
            else:
                self._prefilled[piece.staging_index] = piece.stop
        return prompts.tokens.size

    def _pack(self, *pieces):
        return packing.pack(*pieces, self.capacity.places, self.config.vocab_size)

    def _turn(self, request):
        """Its row; who waits on the device takes turns by priority, then by number."""
        order = request.number - request.priority * 2**24
        return request._row._replace(
            admission_order=np.asarray(
                [np.clip(order, -(2**31), decode.NOT_WAITING - 1)], np.int32
            )
        )

    def _keep_prefix(self, index, request):
        for start, key in self.prefixes.missing(request.prompt):
            self.prefixes.add(
                key,
                self._read_block(self._state.staging, np.int32(index), np.int32(start)),
            )

    def _stage(self, staging):
        self._state = self._state._replace(staging=staging)

    # ------------------------------------------------------------ chunks

    def _start_chunk(self):
        """Starts a chunk if there is anything for it to do; whether it did."""
        if not (self._left() or self._cancelled or self._pending):
            return False
        most = self.options.slots + self.capacity.places
        cancelled, self._cancelled = self._cancelled[:most], self._cancelled[most:]
        padded = np.full(most, decode.NO_REQUEST, np.int32)
        padded[: len(cancelled)] = cancelled
        steps = self._steps()
        events, waiting = self._chunk(padded, steps)
        _copy_to_host((events, waiting))
        self._flights.append(
            _Flight(self._started, self._width, steps, self._pending, events, waiting)
        )
        self._pending = []
        self._started += 1
        self.counters.chunks += 1
        return True

    def _chunk(self, cancelled, steps):
        """Starts the smallest compiled chunk that has so many iterations; its (events, waiting)."""
        chunk = self._chunks[round_up(self.capacity.chunks, steps)]
        self._state, events, waiting = chunk(
            self._weights, self._state, cancelled, np.int32(steps)
        )
        return events, waiting

    def _left(self):
        """The most tokens that a request has left to make by decoding once the chunks under way have run."""
        waits = {place.request.number: place.chunk for place in self._staging if place}
        decoding = [
            request
            for number, request in self._live.items()
            if waits.get(number, 0) is not None
        ]
        crowded = (
            len(decoding) > self._width
        )  # who still waits in staging may do so for long

        def left(request):
            since = waits.get(request.number, 0)
            ran = (
                0
                if crowded and request.number in waits
                else sum(f.steps for f in self._flights if f.chunk >= since)
            )
            return (
                request.max_tokens - max(len(request.tokens), 1) - ran
            )  # one of them comes with prefill

        return max([0, *map(left, decoding)])

    def _steps(self):
        """Iterations of the next chunk: no more than tokens are left to make, and as many fewer as slots stand empty
        that the next prefill call could fill, so that it comes soon."""
        decoding = len(self._live) - len(self._prefilled)
        nearly = sum(
            len(self._staging[index].request.prompt) - done
            <= self.options.prefill_budget
            for index, done in self._prefilled.items()
        )
        fillable = min(nearly + len(self._queue), max(self.options.slots - decoding, 0))
        steps = max(
            min(
                self.options.steps_per_call * decoding // max(decoding + fillable, 1),
                self._left(),
            ),
            1,
        )
        return (
            round_up(self.capacity.chunks, steps)
            if self.spec.fixed_trip_count
            else steps
        )

    def _land(self, flight):
        """Reads a chunk's events, with those of the prefills before it, and hands them out."""
        prefills, events, waiting = jax.device_get(
            (flight.prefills, flight.events, flight.waiting)
        )
        self.counters.syncs += 1
        for made in prefills:
            self._hand_out(jax.tree.map(lambda x: x[None], made))
        ran = np.flatnonzero((events.flag != decode.IDLE).any(axis=1))
        ran = (
            len(events.flag)
            if self.spec.fixed_trip_count
            else (ran[-1] + 1 if ran.size else 0)
        )
        self.counters.iterations += int(ran)
        self.counters.slot_iterations += int(ran) * flight.width
        self.counters.busy += int((events.flag != decode.IDLE).sum())
        if self.trace:
            self.history.append(
                (
                    time.perf_counter(),
                    np.where(events.flag != decode.IDLE, events.request, -1)[:ran],
                )
            )
        self._hand_out(events)
        for index, place in enumerate(self._staging):
            if (
                place
                and place.chunk is not None
                and place.chunk <= flight.chunk
                and (waiting[index] != place.request.number)
            ):
                self._staging[index] = None

    def _hand_out(self, events):
        """Events [K, W]: to every request its own, in the order of their making."""
        ids, tokens, flags = (
            events.request.tolist(),
            events.token.tolist(),
            events.flag.tolist(),
        )
        places = {}
        for i, j in np.argwhere(events.flag).tolist():
            places.setdefault(ids[i][j], []).append((i, j))
        for number, own in places.items():
            request = self._live.get(number)
            if (
                request is None or request.finish
            ):  # cancelled, or ended by a stop string
                continue
            made, finish, error = [], None, None
            for i, j in own:
                self.counters.tokens += 1
                try:
                    finish = self._push(
                        request, tokens[i][j], flags[i][j], events, (i, j), made
                    )
                except (
                    Exception
                ) as raised:  # of this request alone, such as its tokenizer's
                    finish, error = "error", raised
                if finish:
                    break
            if (
                finish and flags[i][j] == decode.TOKEN
            ):  # the device does not know that it has ended
                self._drop(request)
            elif finish:
                del self._live[number]
                self.counters.finished += 1
            request._put(made, finish, error)

    def _push(self, request, token, flag, events, at, made):
        """Appends what a token means for its client to `made`; how the request has ended with it, or None."""
        finish, text = {decode.STOP: "stop", decode.LENGTH: "length"}.get(flag), ""
        if request._stopper:
            if flag != decode.STOP:
                text, stopped = request._stopper.push(token)
                finish = "stop" if stopped else finish
            text += request._stopper.flush() if finish else ""
        if flag == decode.STOP:
            made += [Token(None, text)] if text else []
            return finish
        if request._top is None:
            made.append(Token(token, text))
        else:
            top = tuple(
                zip(events.top_ids[at].tolist(), events.top_logprobs[at].tolist())
            )[: request._top]
            made.append(Token(token, text, float(events.logprob[at]), top))
        return finish

    # ------------------------------------------------------------ figures

    def report(self):
        """What is planned, in one line."""
        return self.capacity.report(self.spec.kv_dtype)

    def compiled(self):
        """(programs compiled so far, most that there can ever be) for this engine's shapes."""
        functions = (
            *self._chunks.values(),
            self._prefill,
            self._read_block,
            self._write_block,
        )
        return sum(f._cache_size() for f in functions), self.capacity.most_programs()

    def warm_up(self, progress=lambda shapes: shapes):
        """Compiles every program that this engine can need, before there are requests; else each is when it is needed.

        What Python holds by then its garbage collector will not walk again, in this process (`gc.freeze`): of JAX alone
        that is a million objects, and a walk holds up whatever is being decoded for most of a second.

        progress: wraps the list of shapes, as tqdm does. Raises RuntimeError where requests are live already.
        """
        with self._stepping:
            if self._live or self._flights:
                raise RuntimeError(
                    "warm_up is for an engine without live requests: call it before the first"
                )
            widths, lengths, prefills = (
                self.capacity.widths,
                self.capacity.lengths,
                self.capacity.prefills,
            )
            shapes = [
                (length, width, shape)
                for length in lengths
                for width, shape in (
                    *((width, None) for width in widths),
                    *((widths[-1], shape) for shape in prefills(length)),
                )
            ]
            nobody = np.full(
                self.options.slots + self.capacity.places, decode.NO_REQUEST, np.int32
            )
            turn = decode.empty_slots(1, self.spec)._replace(history=None)
            for width in widths:  # every move that there is, up and down
                self._move(width, lengths[-1])
                self._move(width, lengths[0])
            for length in lengths:
                self._move(widths[-1], length)
                self._move(widths[0], length)
            for length, width, shape in progress(shapes):
                self._move(width, length)
                if shape is None:
                    for iterations in self.capacity.chunks:
                        self._chunk(nobody, iterations)
                    continue
                seen, count, width = shape
                pieces = [packing.Piece(self.capacity.places, 0, width, False)] * count
                prompts = self._pack(
                    pieces,
                    width,
                    seen,
                    [np.zeros(width, np.int32)] * count,
                    [turn] * count,
                )
                self._stage(
                    self._prefill(self._weights, self._state.staging, prompts)[0]
                )
            self._reset()
            gc.collect()
            gc.freeze()


def _copy_to_host(tree):
    for leaf in jax.tree.leaves(tree):
        leaf.copy_to_host_async()
