"""Measures the time of a decode iteration: how many fit in decode.burst_ms, how many
hide the host's work, and when a chunk will end.

The scheduler reads no clock. The engine gives it `Pace.fitting` and `Pace.hiding`,
numbers of iterations.
"""

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence

# The estimate for a width is the median of its last so many chunks: two of them may be
# far too slow or too fast.
SAMPLES = 5
SHORTEST = 1e-9  # seconds of an iteration, so that none takes 0
# A chunk may end this share of its time earlier than the estimate.
EARLIER = 0.1
# A chunk that takes so many times as long as the host's work for it hides that work.
HIDES = 8


class Pace:
    """The times of an engine's iterations, one estimate for each compiled width.

    Args:
      burst_ms: config.Decode.burst_ms. 0: `fitting` is always empty.
      steps_per_call: the most iterations of a chunk.
      widths: the compiled numbers of slots.
      clock: returns seconds, as time.perf_counter does.

    fitting: {width: iterations of that width that fit in burst_ms}, at least 1 and at
    most steps_per_call. A width without chunks so far has the estimate of the nearest
    width that had some. Before the first chunk all widths have 1.
    """

    def __init__(
        self,
        burst_ms: float,
        steps_per_call: int,
        widths: Sequence[int],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.burst_ms, self.steps_per_call = burst_ms, steps_per_call
        self.widths, self.clock = widths, clock
        self.fitting: Mapping[int, int] = dict.fromkeys(widths, 1) if burst_ms else {}
        self._samples: dict[int, deque[float]] = {}
        self._host: deque[float] = deque(maxlen=SAMPLES)

    def add(self, width: int, iterations: int, seconds: float, waited: bool) -> None:
        """Notes the time of a chunk of so many iterations, without its prefill calls.

        The time must not include compilation.

        waited: whether the host waited for the chunk. If not, the host's own work took
        the time, and more iterations would cost none: the chunk counts as if twice as
        many fit, so that chunks grow until the host waits for them.
        """
        if not self.burst_ms or not iterations or seconds <= 0:
            return
        samples = self._samples.setdefault(width, deque(maxlen=SAMPLES))
        if not waited:
            seconds = min(seconds, self.burst_ms * 1e-3) / 2
        samples.append(max(seconds / iterations, SHORTEST))
        self.fitting = {width: self._fitting(width) for width in self.widths}

    def add_host(self, seconds: float) -> None:
        """Notes the host's time from the end of a wait to the start of a chunk."""
        self._host.append(seconds)

    def hiding(self, width: int) -> int | None:
        """Returns the fewest iterations that hide the host's work, 1 or more.

        None: the times are not known yet, or decode.burst_ms is 0, which asks for
        throughput alone.
        """
        if not (self.burst_ms and self._samples and self._host):
            return None
        needed = HIDES * statistics.median(self._host) / self.seconds(width)
        return int(min(max(math.ceil(needed), 1), self.steps_per_call))

    def nearly_done(self, width: int, iterations: int, start: float) -> float:
        """Returns when the host must start the next chunk, before this one ends.

        start: when the device began a chunk of so many iterations, in seconds of the
        clock. Without an estimate of its time, the result is `start`.
        """
        if not self._samples:
            return start
        chunk = iterations * self.seconds(width)
        host = statistics.median(self._host) if self._host else chunk / 4
        return start + max(chunk * (1 - EARLIER) - 2 * host, 0.0)

    def seconds(self, width: int) -> float:
        """Returns the estimated time of an iteration; there must have been a chunk."""
        nearest = min(
            self._samples, key=lambda known: (abs(math.log(known / width)), known)
        )
        return statistics.median(self._samples[nearest])

    def _fitting(self, width: int) -> int:
        fitting = self.burst_ms * 1e-3 / self.seconds(width)
        return int(min(max(fitting, 1), self.steps_per_call))
