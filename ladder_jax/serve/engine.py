"""The engine: decodes many requests of one model together.

    engine = Engine(model, config.model, mesh, Decode(slots=32), tokenizer)
    for token in engine.submit("Once upon", max_tokens=50, temperature=0.8, seed=1):
        print(token.text, end="")

One step admits requests, starts prefill calls and a chunk, and then reads the events of
the chunk before it. So the device does not wait for the host, and the host waits for
the device once a chunk:

    host    | start chunk 1 | start chunk 2, read chunk 1 | start chunk 3, read chunk 2
    device  |               | chunk 1                     | chunk 2

The thread that iterates a request takes the steps. With `with engine:`, or after
`engine.start()`, a thread of the engine takes them instead. `async for` over a request
starts this thread. serve/scheduler.py decides what a step does, and the device runs the
programs of decode.py.
"""

import dataclasses
import itertools
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, Unpack

import jax

from ladder_jax import decode, kv_cache, sharding
from ladder_jax.config import ConfigError, Decode, Model, require, to_bytes
from ladder_jax.data.tokenizer import Tokenizer
from ladder_jax.hardware import chips
from ladder_jax.model import Transformer
from ladder_jax.residual import choose
from ladder_jax.serve.capacity import Capacity
from ladder_jax.serve.prefix_cache import PrefixCache
from ladder_jax.serve.programs import Programs
from ladder_jax.serve.request import QueueFull, Request
from ladder_jax.serve.request_queue import RequestQueue
from ladder_jax.serve.scheduler import Scheduler, plan_step
from ladder_jax.serve.stepper import Stepper
from ladder_jax.serve.stop_strings import StopStringFilter
from ladder_jax.serve.submission import (
    Accepts,
    Submission,
    SubmitOptions,
    check_request,
)


class Engine:
    """Decodes many requests of one model together, on one mesh.

    Args:
      model: the parameters, on `mesh`.
      model_config: config.Model.
      mesh: of size 1 along data and fsdp. To serve data-parallel, make an engine for
        every replica.
      options: config.Decode.
      tokenizer: reads prompts and stop strings, and writes outputs. None: prompts and
        outputs are ids alone.
      reduction: a name of reductions.REDUCTIONS, or "auto", see choose.reduction_for.
      scheduler: decides what a step does, see scheduler.plan_step.
      trace: whether `history` records which request every slot decoded in every
        iteration. It has an entry per chunk: (seconds, request numbers [K, W] or -1).
      pipelined: whether the host starts a chunk before it reads the events of the
        previous one.
    Raises ConfigError if the options do not fit the model, the mesh or the memory.

    On a mesh of several hosts, make an engine on each, and make the same calls in the
    same order on all of them; then all take the same steps. The engine has no thread
    there. `plan_step` does not read the clock, so that the hosts agree.
    """

    def __init__(
        self,
        model: Transformer,
        model_config: Model,
        mesh: jax.sharding.Mesh,
        options: Decode | None = None,
        tokenizer: Tokenizer | None = None,
        *,
        reduction: str = "auto",
        scheduler: Scheduler = plan_step,
        trace: bool = False,
        pipelined: bool = True,
    ) -> None:
        options = options or Decode()
        if tokenizer is not None:  # requests stop at every id that it ends at
            most_ids = max(options.max_stop_ids, len(tokenizer.eos_ids))
            options = dataclasses.replace(options, max_stop_ids=most_ids)
        self.model_config, self.mesh, self.tokenizer = model_config, mesh, tokenizer
        self.length = options.max_length or model_config.max_length
        self.vocabulary = tokenizer.size if tokenizer else model_config.vocab_size
        self._check_sizes()
        self.spec = _spec(
            model_config, mesh, self.vocabulary, options, reduction=reduction
        )
        token_bytes = kv_cache.bytes_per_token(model_config, self.spec.kv_dtype)
        token_bytes //= mesh.shape[sharding.TENSOR]  # on one device
        self.prefixes = PrefixCache(
            options.prefix_block,
            to_bytes(options.prefix_memory, "decode.prefix_memory"),
            token_bytes * options.prefix_block,
        )
        self.capacity = Capacity(
            options,
            self.length,
            token_bytes,
            arrays=2 * model_config.layers if options.unroll_layers else 2,
            prefix_bytes=self.prefixes.budget,
            fixed_trip_count=self.spec.fixed_trip_count,
        )
        self.options = options = dataclasses.replace(options, slots=self.capacity.slots)
        self.programs = Programs(
            model, self.spec, self.capacity, padding_id=model_config.vocab_size
        )
        self._accepts = Accepts(
            tokenizer=tokenizer,
            vocabulary=self.vocabulary,
            length=self.length,
            max_stop_ids=options.max_stop_ids,
            max_logit_bias=options.max_logit_bias,
            max_logprobs=self.spec.max_logprobs,
        )
        self.scheduler = scheduler
        self._queue = RequestQueue(options.queue_size)
        self.stepper = Stepper(
            options,
            self.capacity,
            self.programs,
            self.prefixes,
            self._queue,
            scheduler,
            trace=trace,
            pipelined=pipelined,
        )
        self.counters, self.history = self.stepper.counters, self.stepper.history
        self._numbers = itertools.count(1)
        self._stepping = threading.RLock()  # held during a step
        self._lock = threading.Lock()  # held to submit, to start and to close
        self._thread: threading.Thread | None = None
        self._wake = threading.Event()  # ends the thread's wait for something to do
        self._closing = self._running = False
        self._users = 0  # `with` blocks that are open

    def _check_sizes(self) -> None:
        """Raises ConfigError unless model, mesh, length and tokenizer fit together."""
        data, fsdp = self.mesh.shape[sharding.DATA], self.mesh.shape[sharding.FSDP]
        if data * fsdp != 1:
            raise ConfigError(
                f"mesh.data x mesh.fsdp = {data * fsdp} is not accepted: both must be "
                "1, as an engine decodes on tensor shards of one model"
            )
        sharding.check_fits(self.model_config, self.mesh)
        most = self.model_config.max_length
        require(
            self.length <= most,
            "decode.max_length",
            self.length,
            f"at most model.max_length={most}",
        )
        ids = self.model_config.vocab_size
        if self.vocabulary > ids:
            raise ConfigError(
                f"the tokenizer has {self.vocabulary} ids, but model.vocab_size={ids}"
            )

    # ------------------------------------------------------------ submission

    def submit(self, prompt: Any, **options: Unpack[SubmitOptions]) -> Request:
        """Queues a request and returns its handle.

        Args:
          prompt: text, or ids.
          max_tokens: the most tokens of the output (default: 200, or as many as
            `length` leaves room for).
          stop: a string or several; the output ends before the first of them that the
            model generates.
          stop_token_ids: ids that end the output and are not part of it (default: the
            tokenizer's eos_ids).
          logprobs: how many alternatives' log-probabilities come with every token's
            own, 0 or more (default: None, no log-probabilities).
          priority: -1000 to 1000; higher goes first, equals in order of submission.
          logit_bias: {id: value to add to its logit}.
          temperature, ..., seed: see sampling.SamplingParams.
        Raises ConfigError for a value that is not accepted, and QueueFull if
        decode.queue_size requests wait already.
        """
        return self._enqueue(check_request(prompt, options, self._accepts))

    def generate(
        self, prompts: Iterable[Any], **options: Unpack[SubmitOptions]
    ) -> list[Request]:
        """Generates from all prompts (texts or ids); returns the requests, finished.

        It checks all prompts before it submits the first, and cancels all requests if
        one fails. options: those of `submit`.
        """
        is_several = isinstance(prompts, Iterable) and not isinstance(prompts, str)
        require(is_several, "prompts", prompts, "a list of prompts")
        submissions = [check_request(p, options, self._accepts) for p in prompts]
        requests: list[Request] = []
        try:
            for submission in submissions:
                requests.append(self._enqueue_or_wait(submission))
            return [request.result() for request in requests]
        except BaseException:  # the caller has no handle to end the others with
            for request in requests:
                request.cancel()
            raise

    def _enqueue_or_wait(self, submission: Submission) -> Request:
        """Queues a request as soon as the queue has room."""
        while True:
            try:
                return self._enqueue(submission)
            except QueueFull:
                if self.running:
                    time.sleep(0.001)
                else:
                    self.step()

    def _enqueue(self, submission: Submission) -> Request:
        """Queues a request. Raises QueueFull if the queue has no room."""
        text_filter = None
        if self.tokenizer:
            text_filter = StopStringFilter(self.tokenizer.stream(), submission.stop)
        with self._lock:
            request = Request(self, next(self._numbers), submission, text_filter)
            self._queue.add(request)
            self.counters.submitted += 1
        self._wake.set()
        return request

    def cancel(self, request: Request) -> None:
        """Ends a request, see Request.cancel. A queued request leaves the queue."""
        self.stepper.cancel(request)
        self._wake.set()

    # ------------------------------------------------------------ thread

    @property
    def running(self) -> bool:
        """Whether the engine's thread takes the steps."""
        return self._running

    def start(self) -> "Engine":
        """Starts the engine's thread, if it does not run.

        Raises ConfigError on a mesh of several hosts.
        """
        if len({device.process_index for device in self.mesh.devices.flat}) > 1:
            raise ConfigError(
                "on several hosts an engine has no thread of its own, as all must take "
                "the same steps: submit the same requests on each, and iterate them "
                "there"
            )
        with self._lock:
            if self._running:
                return self
            self._thread = threading.Thread(
                target=self._run, name="ladder_jax engine", daemon=True
            )
            self._closing, self._running = False, True
            try:
                self._thread.start()
            except BaseException:
                self._running = False
                raise
        return self

    def close(self) -> None:
        """Ends the engine's thread after its current step.

        Unfinished requests stay: a thread that iterates one takes the steps again. A
        coroutine that iterates one now gets EngineClosed.
        """
        self._closing = True
        self._wake.set()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def __enter__(self) -> "Engine":
        self.start()
        with self._lock:
            self._users += 1
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            users = self._users
        if not users:
            self.close()

    def _run(self) -> None:
        try:
            while not self._closing:
                if not self.step():
                    self._wake.wait(0.05)
                    self._wake.clear()
        finally:
            self._running = False
            with self._stepping:
                live = [record.request for record in self.stepper.tracker]
            for request in [*self._queue, *live]:
                request.notify()

    # ------------------------------------------------------------ a step

    def step(self) -> bool:
        """Takes one step; returns whether there was anything to do.

        If the device raises an exception, the requests that it works on fail, and the
        engine continues with an empty state and the queued requests. The same holds if
        an interrupt, such as Ctrl-C, ended the step before this one halfway.
        """
        with self._stepping:
            return self.stepper.step()

    def warm_up(
        self, progress: Callable[[list[Any]], Any] = lambda shapes: shapes
    ) -> None:
        """Compiles every program that the engine can need.

        Without this call, each program is compiled when it is first needed. The call
        also excludes all objects of this process from Python's garbage collection
        (`gc.freeze`), see Programs.warm_up.

        progress: wraps the list of shapes, as tqdm does.
        Raises RuntimeError if the device works on requests.
        """
        with self._stepping:
            self.stepper.warm_up(progress)

    # ------------------------------------------------------------ numbers

    @property
    def waiting(self) -> int:
        """How many requests wait on the host."""
        return len(self._queue)

    @property
    def on_device(self) -> int:
        """How many unfinished requests the device works on."""
        return len(self.stepper.tracker.live())

    def report(self) -> str:
        """Returns slots, staging and their memory as one line of text."""
        return self.capacity.report(self.spec.kv_dtype)

    def compiled(self) -> tuple[int, int]:
        """Returns (programs compiled so far, the most that there can be)."""
        return self.programs.compiled()


def _spec(
    model_config: Model,
    mesh: jax.sharding.Mesh,
    vocabulary: int,
    options: Decode,
    reduction: str,
) -> decode.DecodeSpec:
    """Returns the DecodeSpec of an engine, with values instead of "auto"."""
    platform = chips.platform(mesh)
    is_gpu = platform in chips.GPUS
    kv_dtype = kv_cache.choose_dtype(options.kv_dtype, model_config.dtype, platform)
    return decode.DecodeSpec(
        model_config=model_config,
        mesh=mesh,
        vocabulary=vocabulary,
        max_stop_ids=options.max_stop_ids,
        max_logit_bias=options.max_logit_bias,
        max_logprobs=min(options.max_logprobs, vocabulary),
        kv_dtype=kv_dtype,
        unroll_layers=options.unroll_layers,
        fixed_trip_count=options.loop == "fixed" or (options.loop == "auto" and is_gpu),
        reduction=choose.reduction_for(reduction, model_config, mesh),
    )
