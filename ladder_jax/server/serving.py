"""What all endpoints of one server share: the engine, the limits, the state."""

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ladder_jax.config import ConfigError
from ladder_jax.data.chat import ChatEncoder
from ladder_jax.data.tokenizer import Tokenizer
from ladder_jax.serve.engine import Engine
from ladder_jax.server import errors
from ladder_jax.server.lifecycle import Lifecycle
from ladder_jax.server.logs import LogWriter
from ladder_jax.server.metrics import Metrics

THREADS = 2  # that encode prompts
MOST_RETRY_AFTER = 60  # seconds


@dataclass(frozen=True)
class Options:
    """The limits and the other settings of a server."""

    model_name: str = "ladder_jax"
    max_body: int = 4 * 2**20  # bytes of a request
    max_prompt_tokens: int | None = None  # None: the engine's length, less one
    max_output_tokens: int | None = None  # None: the engine's length
    max_choices: int = 128  # outputs of a request: prompts times n or best_of
    request_timeout: float = 600.0  # seconds from arrival to the last byte
    body_timeout: float = 30.0  # seconds for a request's body to arrive
    write_timeout: float = 60.0  # seconds until a client reads something
    keep_alive: float = 15.0  # seconds between comments in a stream without tokens
    api_keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    log_prompts: bool = False


class Served:
    """The model that a server serves: its engine, name, and texts.

    Raises ConfigError if the tokenizer's chat template is not valid.
    """

    def __init__(self, engine: Engine, name: str) -> None:
        if engine.tokenizer is None:
            raise ConfigError("an engine without a tokenizer cannot serve text")
        self.engine, self.name = engine, name
        self.tokenizer: Tokenizer = engine.tokenizer
        self.created = int(time.time())
        self.chat = ChatEncoder(self.tokenizer)
        self.chat_end_ids = self.chat.end_ids
        # No token stands for more bytes of a prompt: a text of more bytes than this
        # times the longest prompt is refused before it is encoded.
        self.longest_token = max(map(self._text_bytes, range(self.tokenizer.size)))

    def _text_bytes(self, token: int) -> int:
        name = self.tokenizer.token_name(token) or ""
        data = self.tokenizer.token_bytes(token, token) or b""
        return max(len(name.encode()), len(data))


class Wakeups:
    """Wakes coroutines from the engine's thread, with one call to the loop for many."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._pending: deque[asyncio.Event] = deque()
        self._is_scheduled = False

    def waker(self, event: asyncio.Event) -> Callable[[], None]:
        """Returns a function that sets `event`; any thread may call it."""

        def wake() -> None:
            self._pending.append(event)
            if not self._is_scheduled:
                self._is_scheduled = True
                self.loop.call_soon_threadsafe(self._set)

        return wake

    def _set(self) -> None:
        self._is_scheduled = False  # first: a later `wake` must schedule another call
        while self._pending:
            self._pending.popleft().set()


class Serving:
    """The state that the endpoints of one server share.

    `serve` may be called from any thread; all else belongs to the event loop.
    """

    def __init__(self, options: Options, writer: LogWriter) -> None:
        self.options, self.log = options, writer
        self.lifecycle = Lifecycle()
        self.metrics = Metrics()
        self.pool = ThreadPoolExecutor(THREADS, "ladder_jax encode")
        self._served: Served | None = None
        self._wakeups: Wakeups | None = None
        self._lock = threading.Lock()
        self._encoding = 0  # see `encoding`
        self.reading = 0  # bytes of the bodies that are not complete
        # What ends the requests that run: each removes itself when it has ended.
        self.running: set[Callable[[], object]] = set()

    def serve(self, engine: Engine) -> None:
        """Takes an engine whose programs are compiled, and says that it is ready."""
        served = Served(engine, self.options.model_name)
        if served.tokenizer.chat_template is None:
            self.log.write(
                "the tokenizer has no chat template: conversations get a default one",
                "warning",
                template=served.chat.template.source,
            )
        with self._lock:
            self.metrics.watch(engine)
            self._served = served
        self.lifecycle.ready()

    @property
    def engine(self) -> Engine | None:
        """The engine, None during the start-up."""
        return self._served.engine if self._served else None

    @property
    def wakeups(self) -> Wakeups:
        """Those of the running event loop."""
        if self._wakeups is None:
            self._wakeups = Wakeups()
        return self._wakeups

    def served(self, model: str | None = None) -> Served:
        """Returns the model that serves a request.

        Raises APIError: 503 if the server is not ready, 404 if it has no such model.
        """
        lifecycle = self.lifecycle
        if self._served is None or not lifecycle.serves:
            reason = lifecycle.detail or "the server takes no requests"
            raise errors.unavailable(f"{lifecycle.status}: {reason}")
        if model is not None and model != self._served.name:
            raise errors.APIError(
                404,
                f"model={model!r} does not exist: it must be {self._served.name!r}",
                param="model",
                code="model_not_found",
            )
        return self._served

    @property
    def encoding(self) -> int:
        """The engine's requests that are not in the queue yet."""
        return self._encoding

    def count_encoding(self, change: int) -> None:
        """Changes `encoding`; any thread may call it."""
        with self._lock:
            self._encoding += change

    def check_queue(self, requests: int = 1) -> None:
        """Raises APIError 429 unless the queue has room for so many requests."""
        engine = self.served().engine
        size = engine.options.queue_size
        if engine.waiting + self.encoding + requests > size:
            raise self.queue_full()

    def queue_full(self) -> errors.APIError:
        """Returns the error 429, with the time after which to try again."""
        rate = self.metrics.finish_rate()
        waiting = self.served().engine.waiting
        # At this rate, half of the queue is free then.
        seconds = waiting / (2 * rate) if rate else 1
        return errors.queue_full(min(max(math.ceil(seconds), 1), MOST_RETRY_AFTER))

    def cancel_all(self) -> None:
        """Ends all requests that run; each client gets an error."""
        for cancel in list(self.running):
            cancel()
