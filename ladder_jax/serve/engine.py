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

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, Unpack

import jax

from ladder_jax.config import ConfigError, Decode, Model, require
from ladder_jax.data.tokenizer import Tokenizer
from ladder_jax.model import Transformer, Unstacked
from ladder_jax.serve import snapshot
from ladder_jax.serve.design import design
from ladder_jax.serve.prefix_cache import PrefixCache
from ladder_jax.serve.programs import Programs
from ladder_jax.serve.request import EngineFailed, QueueFull, Request
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
      model: the parameters, on `mesh`; or what decode_weights.prepare_weights made of
        them.
      model_config: config.Model.
      mesh: of size 1 along data and fsdp. To serve data-parallel, make an engine for
        every replica.
      options: config.Decode.
      tokenizer: reads prompts and stop strings, and writes outputs. None: prompts and
        outputs are ids alone.
      reduction: a name of reductions.REDUCTIONS, or "auto", see choose.reduction_for.
      scheduler: decides what a step does, see scheduler.plan_step.
      trace: whether `history` records which request every slot decoded in every
        iteration. It has a counters.TracedChunk for every chunk.
      pipelined: whether the host starts a chunk before it reads the events of the
        previous one.
    Raises ConfigError if the options do not fit the model, the mesh or the memory.

    On a mesh of several hosts, make an engine on each, and make the same calls in the
    same order on all of them; then all take the same steps. The engine has no thread
    there. `plan_step` does not read the clock, so that the hosts agree, and
    `decode.burst_ms` has no effect, since each host would measure other times. The
    engines of hosts.py do without the same calls: they follow the one of process 0, and
    use the times that it measures.
    """

    def __init__(
        self,
        model: Transformer | Unstacked,
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
        plan = design(model_config, mesh, options, tokenizer, reduction)
        self.model_config, self.mesh, self.tokenizer = model_config, mesh, tokenizer
        self.length, self.vocabulary = plan.length, plan.vocabulary
        self.spec, self.capacity = plan.spec, plan.capacity
        self.options = options = plan.options
        self.programs = Programs(
            model, self.spec, self.capacity, padding_id=plan.padding_id
        )
        self.prefixes = PrefixCache(
            options.prefix_block,
            self.capacity.prefix_bytes,
            self.capacity.token_bytes * options.prefix_block,
            drop=self.programs.drop_block,
        )
        self._accepts = Accepts(
            tokenizer=tokenizer,
            vocabulary=self.vocabulary,
            length=self.length,
            max_stop_ids=options.max_stop_ids,
            max_logit_bias=options.max_logit_bias,
            max_logprobs=self.spec.max_logprobs,
            prompt_logprobs=options.prompt_logprobs,
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

    # ------------------------------------------------------------ submission

    def submit(self, prompt: Any, **options: Unpack[SubmitOptions]) -> Request:
        """Queues a request and returns its handle.

        Args:
          prompt: text, or ids.
          max_tokens: the most tokens of the output (default: 200, or as many as
            `length` leaves room for). 0 is accepted with `prompt_logprobs`.
          min_tokens: of the first so many tokens, none is one of `stop_token_ids`, and
            none completes a stop string that counts.
          stop: a string or several; the output ends before the first of them that the
            model generates.
          stop_token_ids: ids that end the output and are not part of it (default: the
            tokenizer's eos_ids).
          ignore_eos: whether the default of `stop_token_ids` is none.
          logprobs: how many alternatives' log-probabilities come with every token's
            own, 0 or more (default: None, no log-probabilities).
          prompt_logprobs: the same for the tokens of the prompt, see
            Request.prompt_logprobs. The prefix cache does not speed it up.
          priority: -1000 to 1000; higher goes first, equals in order of submission.
          speculate: whether its tokens may be drafted, if decode.speculate is not 0
            (default: True). It changes no token.
          logit_bias: {id: value to add to its logit}.
          temperature, ..., seed: see sampling.SamplingParams.
        Raises ConfigError for a value that is not accepted, QueueFull if
        decode.queue_size requests wait already, and EngineFailed after `failed`.
        """
        return self._enqueue(check_request(prompt, options, self._accepts))

    def generate(
        self, prompts: Iterable[Any], **options: Unpack[SubmitOptions]
    ) -> list[Request]:
        """Generates from all prompts (texts or ids); returns the requests, finished.

        It checks all prompts before it submits the first, and cancels all requests if
        one fails. An engine that does nothing else needs no `decode.burst_ms`: it can
        be 0. options: those of `submit`.
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
        """Queues a request. May raise QueueFull or EngineFailed."""
        text_filter = self._text_filter(submission)
        with self._lock:
            request = Request(self, next(self._numbers), submission, text_filter)
            self._accept(request)
            self.counters.submitted += 1
        self._wake.set()
        return request

    def _text_filter(self, submission: Submission) -> StopStringFilter | None:
        """Returns what makes text of a request's tokens."""
        if self.tokenizer is None:
            return None
        return StopStringFilter(
            self.tokenizer.stream(after=submission.prompt.tolist()),
            submission.stop,
            submission.min_tokens,
        )

    def _accept(self, request: Request) -> None:
        """Puts a request into the queue. May raise QueueFull or EngineFailed."""
        self._queue.add(request)

    def cancel(self, request: Request) -> None:
        """Ends a request, see Request.cancel. A queued request leaves the queue."""
        self.stepper.cancel(request)
        self._wake.set()

    # ------------------------------------------------------------ thread

    @property
    def running(self) -> bool:
        """Whether the engine's thread takes the steps."""
        return self._running

    @property
    def failed(self) -> BaseException | None:
        """The error that ended the engine, or None.

        An exception of the device fails the requests that the device works on, and the
        engine continues. After stepper.MOST_ERRORS of them in a row, without a chunk
        that succeeded between them, the engine ends for good: every request that it has
        fails, `submit` raises EngineFailed, and steps do nothing. The same holds if the
        engine's thread ends by an exception that is no Exception, such as SystemExit.
        """
        return self.stepper.failed

    def start(self) -> "Engine":
        """Starts the engine's thread, if it does not run.

        Raises ConfigError on a mesh of several hosts, and EngineFailed after `failed`.
        """
        if self.failed is not None:
            raise EngineFailed(
                f"the engine has ended by an error: {self.failed}"
            ) from self.failed
        self._check_thread()
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

    def _check_thread(self) -> None:
        """Raises ConfigError unless the engine may have a thread of its own."""
        if self._on_several_hosts():
            raise ConfigError(
                "on several hosts an engine has no thread of its own, as all must take "
                "the same steps: submit the same requests on each, and iterate them "
                "there, or serve with serve.hosts"
            )

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
            while not self._closing and self.failed is None:
                # An error that no request could report: the stepper counts it.
                with contextlib.suppress(Exception):
                    if self.step(wait=True):
                        continue
                self._wake.wait(0.05)
                self._wake.clear()
        except BaseException as error:
            with self._stepping:
                self.stepper.end(error)
            raise
        finally:
            self._running = False
            with self._stepping:
                live = [record.request for record in self.stepper.tracker]
            for request in [*self._queue, *live]:
                request.notify()

    # ------------------------------------------------------------ a step

    def step(self, wait: bool = False) -> bool:
        """Takes one step; returns whether there was anything to do.

        wait: whether to return only when the device has nearly ended its chunk, if a
        request that arrives meanwhile could start then. For a loop that takes the steps
        while requests come from elsewhere.

        If the device raises an exception, the requests that it works on fail, and the
        engine continues with an empty state and the queued requests; see `failed` for
        several exceptions in a row. The same holds if an interrupt, such as Ctrl-C,
        ended the step before this one halfway. If there are no requests that could
        report the exception, this method raises it.
        """
        with self._stepping:
            several = self._on_several_hosts()
            if several:
                return self.stepper.step({})
            had_work = self.stepper.step(self.stepper.pace.fitting, wait)
        if wait:
            self.stepper.wait_for_arrivals()
        return had_work

    def _on_several_hosts(self) -> bool:
        return len({device.process_index for device in self.mesh.devices.flat}) > 1

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

    def snapshot(self) -> snapshot.Snapshot:
        """Returns what the engine is doing, as far as the host knows.

        Any thread may call it at any time. It does not wait for a step or the device.
        """
        return snapshot.take(self.stepper, self._queue, self.programs)

    def report(self) -> str:
        """Returns slots, staging and their memory as one line of text."""
        return self.capacity.report(self.spec.kv_dtype, self.spec.page_kernel)

    def compiled(self) -> tuple[int, int]:
        """Returns (programs compiled so far, the most that there can be).

        Engines of this process that run the same programs share them and this count.
        """
        return self.programs.compiled()
