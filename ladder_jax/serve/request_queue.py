"""The requests that wait on the host, in the order of their admission."""

import bisect
import itertools
import threading
from collections.abc import Iterator

from ladder_jax.serve.request import EngineFailed, QueueFull, Request


class RequestQueue:
    """A queue of at most `size` requests, in the order of their admission.

    The highest priority comes first; of equal priorities, the lowest request number.

    Every method is safe to call from any thread.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._lock = threading.Lock()
        self._entries: list[tuple[int, int, Request]] = []  # sorted
        self._closed_by: BaseException | None = None

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Request]:
        with self._lock:
            entries = list(self._entries)
        return iter([request for *_, request in entries])

    def add(self, request: Request) -> None:
        """Adds a request. May raise what `check_room` raises."""
        with self._lock:
            self._check_room(0)
            bisect.insort(self._entries, self._entry(request))

    def put_back(self, request: Request) -> None:
        """Adds a request that was here before, however many wait."""
        with self._lock:
            bisect.insort(self._entries, self._entry(request))

    def check_room(self, others: int = 0) -> None:
        """Returns if a request could be added after so many others.

        Raises QueueFull if `size` requests wait already, EngineFailed after `close`.
        """
        with self._lock:
            self._check_room(others)

    def _check_room(self, others: int) -> None:
        if self._closed_by is not None:
            raise EngineFailed(
                f"the engine has ended by an error: {self._closed_by}"
            ) from self._closed_by
        waiting = len(self._entries) + others
        if waiting >= self.size:
            raise QueueFull(
                f"{waiting} requests wait already (decode.queue_size={self.size})"
            )

    def close(self, error: BaseException) -> None:
        """Accepts no more requests, because of `error`; those that wait stay."""
        with self._lock:
            self._closed_by = error

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
