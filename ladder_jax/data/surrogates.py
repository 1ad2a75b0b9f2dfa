"""Halves of UTF-16 surrogate pairs: JSON can contain them, UTF-8 cannot."""

import re

_SURROGATES = re.compile("[\ud800-\udfff]")


def without_surrogates(text: str) -> str:
    """Returns the text with U+FFFD instead of every surrogate."""
    return text if text.isascii() else _SURROGATES.sub("\ufffd", text)
