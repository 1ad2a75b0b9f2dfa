"""The requests that wait on the host, in the order of their admission."""

import bisect
import itertools
import threading
from collections.abc import Iterator

from ladder_jax.serve.request import QueueFull, Request


class RequestQueue:
    """A queue of at most `size` requests, in the order of their admission.

    The highest priority comes first; of equal priorities, the lowest request number.

    Every method is safe to call from any thread.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._lock = threading.Lock()
        self._entries: list[tuple[int, int, Request]] = []  # sorted

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Request]:
        with self._lock:
            entries = list(self._entries)
        return iter([request for *_, request in entries])

    def add(self, request: Request) -> None:
        """Adds a request. Raises QueueFull if `size` requests wait already."""
        with self._lock:
            if len(self._entries) >= self.size:
                raise QueueFull(
                    f"{len(self._entries)} requests wait already "
                    f"(decode.queue_size={self.size})"
                )
            bisect.insort(self._entries, self._entry(request))

    def remove(self, request: Request) -> bool:
        """Removes a request; returns whether it was there."""
        entry = self._entry(request)
        with self._lock:
            i = bisect.bisect_left(self._entries, entry)
            if i == len(self._entries) or self._entries[i][2] is not request:
                return False
            del self._entries[i]
            return True

    def first(self, count: int) -> list[Request]:
        """Returns the first `count` requests; they stay in the queue."""
        with self._lock:
            entries = list(itertools.islice(self._entries, count))
        return [request for *_, request in entries]

    def remove_finished(self) -> None:
        """Removes finished requests: an interrupt in `cancel` can leave one behind."""
        for request in self:
            if request.finish:
                self.remove(request)

    @staticmethod
    def _entry(request: Request) -> tuple[int, int, Request]:
        # Numbers differ, so a comparison of two entries never reaches the requests.
        return -request.priority, request.number, request
