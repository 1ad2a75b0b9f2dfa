"""The metrics of /metrics, in Prometheus's format."""

import time
from collections import deque
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from ladder_jax.hardware.compilations import Compilations
from ladder_jax.serve.engine import Engine
from ladder_jax.serve.request import Request
from ladder_jax.server.errors import APIError

PREFIX = "ladder_jax_"
CONTENT_TYPE = CONTENT_TYPE_LATEST
LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
SHORT = (
    *(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15),
    *(0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5),
)
# The reasons that are counted; others count by the code of the error.
REASONS = {
    400: "invalid",
    401: "unauthorized",
    404: "not_found",
    408: "slow_body",
    413: "too_large",
    415: "invalid",
    503: "unavailable",
    504: "timeout",
}
FINISHES = ("stop", "length", "cancelled", "error")  # of serve.request.Request.finish
RECENT = 512  # finished requests, of which `Metrics.recent` knows the times


class Times:
    """The times of one finished request, in seconds; None: it had no such time."""

    def __init__(self, request: Request, now: float) -> None:
        times, submitted = request.times, request.submitted
        self.end_to_end = now - submitted
        self.first_token = times[0] - submitted if times else None
        several = len(times) > 1
        self.per_token = (times[-1] - times[0]) / (len(times) - 1) if several else None
        admitted = request.admitted
        self.queue = None if admitted is None else admitted - submitted
        self.finished = now


class Metrics:
    """Counts and histograms of one server; the engine's own counts are read when
    somebody asks for them."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(PREFIX + name, text, buckets=buckets, registry=registry)

        self.first_token = histogram(
            "time_to_first_token_seconds",
            "From submission to the first token",
            LONG,
        )
        self.per_token = histogram(
            "time_per_output_token_seconds",
            "Between two tokens, the mean of a request",
            SHORT,
        )
        self.end_to_end = histogram(
            "e2e_request_latency_seconds", "From submission to the end", LONG
        )
        self.queue_time = histogram(
            "request_queue_time_seconds", "From submission to admission", LONG
        )
        self.prompt_tokens = Counter(
            PREFIX + "prompt_tokens", "Tokens of prompts", registry=registry
        )
        self.generation_tokens = Counter(
            PREFIX + "generation_tokens", "Tokens of outputs", registry=registry
        )
        self.rejected = Counter(
            PREFIX + "requests_rejected",
            "HTTP requests that were refused",
            ["reason"],
            registry=registry,
        )
        self.requests = Counter(
            PREFIX + "requests",
            "Outputs by how they ended",
            ["finish"],
            registry=registry,
        )
        # Every series starts at 0, so that a rate sees the first event, too.
        for reason in {*REASONS.values(), "queue_full"}:
            self.rejected.labels(reason)
        for finish in FINISHES:
            self.requests.labels(finish)
        self.recent: deque[Times] = deque(maxlen=RECENT)

    def finished(self, request: Request) -> None:
        """Counts a request of the engine that has ended."""
        times = Times(request, time.perf_counter())
        self.recent.append(times)
        self.requests.labels(request.finish or "cancelled").inc()
        self.prompt_tokens.inc(len(request.prompt))
        self.generation_tokens.inc(len(request.tokens))
        self.end_to_end.observe(times.end_to_end)
        if times.first_token is not None:
            self.first_token.observe(times.first_token)
        if times.per_token is not None:
            self.per_token.observe(times.per_token)
        if times.queue is not None:
            self.queue_time.observe(times.queue)

    def refused(self, error: APIError) -> None:
        """Counts an HTTP request that got an error."""
        reason = REASONS.get(error.status) or error.code or "other"
        self.rejected.labels(reason).inc()

    def watch(self, engine: Engine) -> None:
        """Adds the engine's own counts. All its programs must be compiled."""
        self.registry.register(_EngineCollector(engine, Compilations()))

    def finish_rate(self) -> float | None:
        """Returns how many requests ended a second of late; None: unknown."""
        recent = list(self.recent)[-64:]
        if len(recent) < 2:
            return None
        seconds = time.perf_counter() - recent[0].finished
        return len(recent) / max(seconds, 1e-3)

    def text(self) -> bytes:
        """Returns all metrics in Prometheus's format."""
        return generate_latest(self.registry)


class _EngineCollector:
    """Reads an engine's counts when Prometheus asks for them.

    compilations: counts what XLA compiles from now on.
    """

    def __init__(self, engine: Engine, compilations: Compilations) -> None:
        self._engine, self._compilations = engine, compilations

    def collect(self) -> Iterator[Metric]:
        now = self._engine.snapshot()
        counters = now.counters
        gauges = {
            "requests_running": (
                "Requests on the device",
                now.busy_slots + now.prefilling + now.staged,
            ),
            "requests_waiting": ("Requests in the queue", now.waiting),
            "slot_occupancy": (
                "Share of the slots that decode a request",
                now.busy_slots / len(now.slots),
            ),
            "kv_cache_usage": (
                "Share of the memory for keys and values that holds some",
                now.kv_used_bytes / max(now.kv_total_bytes, 1),
            ),
            "programs_compiled": ("Programs compiled", now.programs_compiled),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(PREFIX + name, text, value=value)
        counts = {
            "prefix_cache_hit_tokens": (
                "Prompt tokens copied from a shared prefix",
                counters.prefix_tokens,
            ),
            "preemptions": (
                "Times that a request lost its slot because pages ran out",
                counters.preempted,
            ),
            "drafted_tokens": ("Tokens that speculation guessed", counters.drafted),
            "accepted_tokens": (
                "Guessed tokens that became tokens of outputs",
                counters.accepted,
            ),
            "device_errors": ("Steps that an error ended", counters.failures),
            "compiles_after_ready": (
                "Programs compiled while serving",
                self._compilations.total,
            ),
        }
        for name, (text, value) in counts.items():
            yield CounterMetricFamily(PREFIX + name, text, value=value)
