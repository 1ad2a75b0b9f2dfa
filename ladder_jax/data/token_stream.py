"""Text of ids that come one at a time; it never has half a character."""

import codecs
import itertools
from collections.abc import Callable, Sequence


class Stream:
    """Decodes ids one at a time.

    The texts that `push` and `flush` return, joined, are `decode` of all the ids.
    `tokenizers.decoders.DecodeStream` does not promise that: it has no flush, and it
    raises for some sequences of byte-fallback tokens.

    Args:
      token_bytes: `Tokenizer.token_bytes` of tokenizer.py.
      after: ids before the first one, such as a prompt; see `Tokenizer.stream`.
    """

    def __init__(
        self,
        token_bytes: Callable[[int, int | None], bytes | None],
        after: Sequence[int] = (),
    ) -> None:
        self._token_bytes = token_bytes
        self._previous: int | None = None
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        # Whether `after` ends inside a character that has got no byte since.
        self._is_inside = False
        # A character has at most 4 bytes.
        texts = (id for id in reversed(after) if token_bytes(int(id), None) is not None)
        for token in reversed(list(itertools.islice(texts, 8))):
            self.push(token)
        self._is_inside = bool(self._utf8.getstate()[0])

    def push(self, token: int) -> str:
        """Returns the characters that this id completes; "" if it completes none."""
        token = int(token)
        data = self._token_bytes(token, self._previous)
        if data is None:
            return ""
        self._previous = token
        if not (self._is_inside and data):
            return self._decode(data)
        self._is_inside = False
        first = self._decode(data[:1])
        is_broken = len(first) > 1 or bool(self._utf8.getstate()[0])
        if first.startswith("\ufffd") and is_broken:
            first = first[1:]  # the replacement of a character of `after` alone
        return first + self._decode(data[1:])

    def _decode(self, data: bytes) -> str:
        text = self._utf8.decode(data)
        # Python waits for the third byte of a surrogate, which UTF-8 does not have.
        if b"\xed\xa0" <= self._utf8.getstate()[0] < b"\xee":
            text += self._utf8.decode(b"", final=True)
        return text

    def flush(self) -> str:
        """Returns U+FFFD if the last character is incomplete, else ""."""
        rest = self._utf8.decode(b"", final=True)
        return "" if self._is_inside else rest
