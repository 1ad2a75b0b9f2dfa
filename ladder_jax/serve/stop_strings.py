"""Turns tokens into text that ends exactly before the first stop string."""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from ladder_jax.config import ConfigError, short_repr

MOST_STOP_STRINGS = 256  # of one request
ACCEPTED = f"a non-empty string, or a list of at most {MOST_STOP_STRINGS} of them"


class TextStream(Protocol):
    """Turns ids into text, see `Tokenizer.stream`."""

    def push(self, token: int) -> str:
        """Returns the text that `token` completes."""

    def flush(self) -> str:
        """Returns the rest of the text, at the end."""


def read_stop(stop: Any) -> tuple[str, ...]:
    """Returns the option `stop`, a string or several, as a tuple of stop strings.

    Raises TypeError unless it is as `ACCEPTED` says.
    """
    if isinstance(stop, str):
        stop = (stop,)
    if not isinstance(stop, Iterable) or isinstance(stop, (bytes, bytearray, Mapping)):
        raise TypeError("not a sequence of strings")
    strings = tuple(itertools.islice(stop, MOST_STOP_STRINGS + 1))
    if len(strings) > MOST_STOP_STRINGS:  # the iterable may never end
        raise TypeError("too many")
    if not all(isinstance(text, str) and text for text in strings):
        raise TypeError("not all are non-empty strings")
    return strings


def check_stop(stop: Any) -> tuple[str, ...]:
    """Returns `read_stop(stop)`. Raises ConfigError if it is not accepted."""
    try:
        return read_stop(stop)
    except TypeError:
        raise ConfigError(
            f"stop={short_repr(stop)} is not accepted: it must be {ACCEPTED}"
        ) from None


class StopStringFilter:
    """Turns ids into text up to a stop string.

    The texts that `push` and `flush` return, joined, end before the first stop string
    that becomes complete. If one token completes several, they end before the one that
    begins first. `push` holds back text that may be the beginning of a stop string.

    Args:
      stream: turns ids into text.
      stops: non-empty stop strings.
      min_tokens: a stop string that is complete within the first so many tokens does
        not count.
    """

    def __init__(
        self, stream: TextStream, stops: Iterable[str] = (), min_tokens: int = 0
    ) -> None:
        self._stream = stream
        self._stops = tuple(stops)
        self._min_tokens, self._tokens = min_tokens, 0
        self._held_back = ""
        self._stopped = False

    def push(self, token: int) -> tuple[str, bool]:
        """Returns (text, whether a stop string is complete).

        The text is the part that is certainly before the stop string. After a stop
        string, `push` returns no more text.
        """
        self._tokens += 1
        return self._add(self._stream.push(token)), self._stopped

    def flush(self) -> str:
        """Returns the text that was held back. The caller pushes no more tokens."""
        text = self._add(self._stream.flush()) + self._held_back
        self._held_back = ""
        return text

    def _add(self, new: str) -> str:
        """Appends `new` to the text that is held back; returns the part now certain."""
        if self._stopped:
            return ""
        text = self._held_back + new
        # A stop string inside the text held back did not count when it was completed.
        starts = [
            text.find(stop, max(len(self._held_back) - len(stop) + 1, 0))
            for stop in self._stops
        ]
        starts = [start for start in starts if start >= 0]
        counts = not self._min_tokens or self._tokens > self._min_tokens
        if starts and counts:
            self._held_back, self._stopped = "", True
            return text[: min(starts)]
        certain = len(text) - self._beginning_of_stop(text)
        self._held_back = text[certain:]
        return text[:certain]

    def _beginning_of_stop(self, text: str) -> int:
        """Returns how many characters at the end of `text` may begin a stop string."""
        lengths = [
            length
            for stop in self._stops
            for length in range(1, len(stop))
            if text.endswith(stop[:length])
        ]
        return max(lengths, default=0)
