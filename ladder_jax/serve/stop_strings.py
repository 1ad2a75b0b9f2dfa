"""Turns tokens into text that ends exactly before the first stop string."""

from collections.abc import Iterable
from typing import Any, Protocol

from ladder_jax.config import require


class TextStream(Protocol):
    """Turns ids into text, see `Tokenizer.stream`."""

    def push(self, token: int) -> str:
        """Returns the text that `token` completes."""

    def flush(self) -> str:
        """Returns the rest of the text, at the end."""


def check_stop(stop: Any) -> tuple[str, ...]:
    """Returns the option `stop`, a string or several, as a tuple of stop strings.

    Raises ConfigError unless all are non-empty strings.
    """
    accepted = "a non-empty string, or several"
    if isinstance(stop, str):
        stop = (stop,)
    is_list = isinstance(stop, Iterable) and not isinstance(stop, (bytes, dict))
    require(is_list, "stop", stop, accepted)
    strings = tuple(stop)
    are_text = all(isinstance(text, str) and text for text in strings)
    require(are_text, "stop", stop, accepted)
    return strings


class StopStringFilter:
    """Turns ids into text up to a stop string.

    The texts that `push` and `flush` return, joined, end before the first stop string
    that becomes complete. If one token completes several, they end before the one that
    begins first. `push` holds back text that may be the beginning of a stop string.

    Args:
      stream: turns ids into text.
      stops: non-empty stop strings.
    """

    def __init__(self, stream: TextStream, stops: Iterable[str] = ()) -> None:
        self._stream = stream
        self._stops = tuple(stops)
        self._held_back = ""
        self._stopped = False

    def push(self, token: int) -> tuple[str, bool]:
        """Returns (text, whether a stop string is complete).

        The text is the part that is certainly before the stop string. After a stop
        string, `push` returns no more text.
        """
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
        positions = [text.find(stop) for stop in self._stops if stop in text]
        if positions:
            self._held_back, self._stopped = "", True
            return text[: min(positions)]
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
