"""SentencePiece's BPE as a tokenizer of the library `tokenizers`.

SentencePiece merges the two neighbours whose joined piece has the highest score, the
leftmost ones first. The library takes pairs in an order of their own: here those of the
highest score come first. Both give the same ids unless two pieces have one score, or
one piece overlaps itself in a text and is made of two different pairs there.
"""

import logging
from collections.abc import Sequence
from typing import NamedTuple

import tokenizers
from tokenizers import decoders, models, normalizers, processors

from ladder_jax.config import ConfigError, short_repr

log = logging.getLogger(__name__)

# The types of pieces, by SentencePiece's numbers, which GGUF has, too.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPACE = "▁"  # stands for a space in pieces


class Piece(NamedTuple):
    """A row of the vocabulary."""

    text: str
    score: float
    type: int


def tokenizer_of(
    pieces: Sequence[Piece], name: str, *, prefix: bool
) -> tokenizers.Tokenizer:
    """The tokenizer of a vocabulary. The caller adds what stands around a text.

    Args:
      pieces: of all ids, in order.
      name: the file's name in messages.
      prefix: whether a text gets a space in front. A part of a text after a special
        token gets one, too, as in llama.cpp; SentencePiece itself knows no special
        tokens in texts.

    Raises ConfigError, one line, where the vocabulary is not one of BPE.
    """
    ids: dict[str, int] = {}
    for id, piece in enumerate(pieces):
        if piece.type == UNUSED:  # fills a vocabulary up: no text becomes one
            continue
        if piece.text in ids:
            raise ConfigError(
                f"{name} has the token {short_repr(piece.text)} twice: ids "
                f"{ids[piece.text]} and {id}"
            )
        ids[piece.text] = id
    unknown = [piece.text for piece in pieces if piece.type == UNKNOWN]
    if len(unknown) > 1:
        raise ConfigError(f"{name} has {len(unknown)} unknown tokens: one is accepted")
    model = models.BPE(
        ids,
        _merges(pieces, name),
        unk_token=unknown[0] if unknown else None,
        fuse_unk=True,
        byte_fallback=_has_bytes(pieces, name),
    )
    tokenizer = tokenizers.Tokenizer(model)
    # tokenizers.pre_tokenizers.Metaspace would add no space to a text that starts with
    # one.
    front = [normalizers.Prepend(SPACE)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence(
        [*front, normalizers.Replace(" ", SPACE)]
    )
    undo = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(
        [*undo, decoders.Strip(" ", 1, 0)] if prefix else undo
    )
    _add_special(tokenizer, pieces, name)
    return tokenizer


def _merges(pieces: Sequence[Piece], name: str) -> list[tuple[str, str]]:
    """The pairs that make a piece, those of the highest score first."""
    scores = {piece.text: piece.score for piece in pieces if piece.type == NORMAL}
    found = []
    for id, piece in enumerate(pieces):
        if piece.type != NORMAL:
            continue
        for cut in range(1, len(piece.text)):
            left, right = piece.text[:cut], piece.text[cut:]
            if left in scores and right in scores:
                found.append((-piece.score, id, left, right))
    if not found:
        raise ConfigError(f"{name} has no tokens that two others make: it is not BPE")
    found.sort(key=lambda row: row[:2])
    merged = {row[1]: row[0] for row in found}
    if len(set(merged.values())) < len(merged):
        log.warning(
            "%s has tokens of equal scores: some texts may get other ids than with "
            "SentencePiece",
            name,
        )
    return [(left, right) for _, _, left, right in found]


def _has_bytes(pieces: Sequence[Piece], name: str) -> bool:
    """Whether the bytes of characters without a piece have tokens."""
    there = {piece.text for piece in pieces if piece.type == BYTE}
    missing = {f"<0x{byte:02X}>" for byte in range(256)} - there
    if there and missing:
        raise ConfigError(f"{name} has tokens of bytes, but none of {min(missing)}")
    return bool(there)


def _add_special(
    tokenizer: tokenizers.Tokenizer, pieces: Sequence[Piece], name: str
) -> None:
    """Adds the tokens that a text names whole."""
    special, own = [], []
    for piece in pieces:
        token = tokenizers.AddedToken(piece.text, normalized=False)
        if piece.type in (CONTROL, UNKNOWN):
            special.append(token)
        elif piece.type == USER_DEFINED:
            if SPACE in piece.text:
                raise ConfigError(
                    f"{name}: the user's token {short_repr(piece.text)} is not "
                    "supported: it has a space"
                )
            own.append(token)
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(own)


def surround(
    tokenizer: tokenizers.Tokenizer,
    tokens: Sequence[str],
    bos: int | None,
    eos: int | None,
) -> None:
    """Puts the tokens of these ids before and after every text."""
    parts, ids = ["$A"], []
    for id, is_first in ((bos, True), (eos, False)):
        if id is not None:
            token = tokens[id]
            parts = [token, *parts] if is_first else [*parts, token]
            ids.append((token, id))
    if ids:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=parts, special_tokens=ids
        )
