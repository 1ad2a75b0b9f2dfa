"""tokenizer.model, SentencePiece's file, as a tokenizer.json.

The file is a message of Protocol Buffers (sentencepiece_model.proto). The few fields
that decide about BPE are read here, so that no package is needed.
"""

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ladder_jax.config import ConfigError
from ladder_jax.data.sentencepiece_bpe import (
    CONTROL,
    NORMAL,
    Piece,
    surround,
    tokenizer_of,
)

BPE = 2  # TrainerSpec.model_type
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # the wire types of fields


def tokenizer_json(path: Path, settings: Mapping[str, Any]) -> str:
    """The tokenizer.json of a file, with the same ids for every text.

    settings: of tokenizer_config.json; add_bos_token (default true) and add_eos_token
      count, as they do for LlamaTokenizer of transformers.

    Raises ConfigError, one line, for a file that is damaged or no BPE.
    """
    try:
        pieces, trainer, normalizer = _read(path.read_bytes())
    except (ValueError, LookupError, TypeError, AttributeError, struct.error):
        raise ConfigError(
            f"{path} is damaged, or no file of SentencePiece (Llama 3's is "
            "tiktoken's): save a tokenizer.json beside it with transformers"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    refused = {
        "it is not BPE (unigram)": trainer.get(3, 1) != BPE,
        "it has rules that change characters": bool(normalizer.get(2)),
        "it removes spaces": bool(normalizer.get(4, 1)),
        "it keeps spaces as they are": not normalizer.get(5, 1),
        "it puts spaces after words": bool(trainer.get(24, 0)),
    }
    if reasons := [reason for reason, holds in refused.items() if holds]:
        raise ConfigError(
            f"{path} is not supported: {reasons[0]}; save a tokenizer.json beside it "
            "with transformers"
        )
    prefix = bool(normalizer.get(3, 1))
    made = tokenizer_of(pieces, str(path), prefix=prefix)
    bos, eos = (_id(pieces, text) for text in ("<s>", "</s>"))
    adds_bos = settings.get("add_bos_token") in (True, None)
    adds_eos = settings.get("add_eos_token") is True
    tokens = [piece.text for piece in pieces]
    surround(made, tokens, bos if adds_bos else None, eos if adds_eos else None)
    return made.to_str()


def _id(pieces: list[Piece], text: str) -> int | None:
    found = [i for i, x in enumerate(pieces) if x.text == text and x.type == CONTROL]
    return found[0] if found else None


def _read(data: bytes) -> tuple[list[Piece], dict[int, Any], dict[int, Any]]:
    """(the pieces, the trainer's settings, the normalizer's), by numbers of fields."""
    pieces, trainer, normalizer = [], {}, {}
    for number, value in _fields(data):
        if number == 1:
            piece = dict(_fields(value))
            (score,) = struct.unpack("<f", piece.get(2, bytes(4)))
            pieces.append(Piece(piece[1].decode(), score, piece.get(3, NORMAL)))
        elif number == 2:
            trainer = dict(_fields(value))
        elif number == 3:
            normalizer = dict(_fields(value))
    if not pieces:
        raise ValueError("no pieces")
    return pieces, trainer, normalizer


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a message: (number, an integer or bytes)."""
    if not isinstance(data, bytes):
        raise ValueError("no message")
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == VARINT:
            number, at = _varint(data, at)
            yield key >> 3, number
            continue
        size = {FIXED64: 8, FIXED32: 4}.get(kind)
        if kind == BYTES:
            size, at = _varint(data, at)
        if size is None or at + size > len(data):
            raise ValueError("a field ends after the file")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """(the number at a place, the place after it)."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return value, at
    raise ValueError("a number has more than ten bytes")
