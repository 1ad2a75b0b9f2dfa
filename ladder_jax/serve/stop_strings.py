"""Text that grows token by token and ends exactly before a stop string."""


class StopStringFilter:
    """Turns ids into text, holding back what may be the start of a stop string.

    What `push` and `flush` return, joined, is the text before the first place where a stop string is complete; of stop
    strings that become complete with the same token, the one that begins first counts.
    """

    def __init__(self, stream, stops=()):
        self._stream, self._stops, self._held, self._done = stream, stops, "", False

    def push(self, token):
        """(the text that is certain now, whether a stop string has ended it)."""
        return self._add(self._stream.push(token))

    def flush(self):
        """The rest, at the end."""
        text, _ = self._add(self._stream.flush())
        held, self._held = self._held, ""
        return text + held

    def _add(self, new):
        if self._done:
            return "", True
        text = self._held + new
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self._held, self._done = "", True
            return text[: min(found)], True
        keep = max(
            (
                n
                for stop in self._stops
                for n in range(1, len(stop))
                if text.endswith(stop[:n])
            ),
            default=0,
        )
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False
