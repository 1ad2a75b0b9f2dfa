"""Tokenizers: bytes, any Hugging Face tokenizer.json, and byte-level BPE.

All have one interface, `Tokenizer`. `encode` treats the name of a special token in a
text, such as "<|eos|>", as plain text. `prompt` encodes text for a model to continue,
and converts such names to the special tokens; so does `encode_rendered`, for the text
of a chat template. `load` opens the tokenizer of a configuration, `from_json` opens
that of a checkpoint, and `train` trains BPE on texts.
"""

import functools
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from ladder_jax import files
from ladder_jax.addresses import local_path
from ladder_jax.config import ConfigError, require
from ladder_jax.data.foreign_files import is_file
from ladder_jax.data.surrogates import without_surrogates
from ladder_jax.data.token_stream import Stream
from ladder_jax.data.tokenizer_files import (
    NAMES,
    SENTENCEPIECE,
    TOKENIZER,
    Special,
    read_special,
    texts_of,
)
from ladder_jax.data.tokenizers_library import library_errors, parse

_OWN_NAMES = [names[0] for names in NAMES.values()]
# It splits a text into names of special tokens and what is between them.
_OWN_NAMES_PATTERN = re.compile(f"({'|'.join(map(re.escape, _OWN_NAMES))})")

# Of a vocabulary that is trained: the library takes memory for all ids at the start,
# and aborts the process where there is not enough.
MOST_IDS = 10_000_000


def byte_alphabet() -> dict[str, int]:
    """Returns the characters by which GPT-2's BPE writes bytes: {character: byte}.

    A printable byte is the character of the same number. The other bytes are the
    characters from 256 on.
    """
    printing = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (byte for byte in range(256) if byte not in printing)
    alphabet = {chr(byte): byte for byte in sorted(printing)}
    return alphabet | {chr(256 + i): byte for i, byte in enumerate(others)}


_ALPHABET = byte_alphabet()


# ------------------------------------------------------------------ interface


class Rendered(NamedTuple):
    """The ids of a text of a chat template, and the characters that each stands for."""

    ids: list[int]
    offsets: list[tuple[int, int]]  # of each id: its first character, and the one after


class Tokenizer:
    """The interface of all tokenizers.

    An id stands for some bytes, or for none: special tokens, and ids of a padded
    vocabulary that are no tokens.

    Attributes:
      size: one more than the largest id.
      bos, eos, pad: ids of the tokens that start a document, end it and fill rows. A
        Hugging Face tokenizer without bos or pad uses its eos for them, as GPT-2 does.
      eos_ids: the ids that end a generation, at least one. A chat model may have
        several, which need not include eos.
      chat_template: the template of conversations, in Jinja; None if there is none.
      special: the names of its special tokens and the settings that belong to them.
      starts_with_bos: whether a prompt starts with bos.
    """

    size: int
    bos: int
    eos: int
    pad: int
    eos_ids: tuple[int, ...]
    chat_template: str | None = None
    special: Special
    starts_with_bos: bool

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, none of them a special token."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Returns `encode` of each text, in parallel where the tokenizer can.

        Raises:
          ConfigError: if the tokenizer cannot encode a text.
        """
        raise NotImplementedError

    def prompt(self, text: str, bos: bool | None = None) -> list[int]:
        """Returns the ids of a prompt, at least one unless `bos` is False.

        A name of a special token in the text becomes that token. The ids start with bos
        if the tokenizer is configured so. The ids of "" are bos alone (eos, if the
        tokenizer has no bos): the model starts a new document.

        bos: whether to put bos before ids that do not start with it. None: as the
        tokenizer is configured.

        Raises:
          ConfigError: if the tokenizer cannot encode the text.
        """
        raise NotImplementedError

    def encode_rendered(self, texts: list[str]) -> list[Rendered]:
        """Returns the ids of each text, and where in the text they come from.

        Names of special tokens become these tokens. Nothing is added.

        Raises:
          ConfigError: if the tokenizer cannot encode a text.
        """
        raise NotImplementedError

    def token_name(self, token: int) -> str | None:
        """Returns the name of a token in the vocabulary, None for other ids."""
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        stream = self.stream()
        return "".join(map(stream.push, ids)) + stream.flush()

    def stream(self, after: Sequence[int] = ()) -> Stream:
        """Returns a new `Stream`, for text that grows id by id.

        after: ids before the first one, such as a prompt. The stream's text is then
          what the ids add to the text of `after`. If `after` ends inside a character,
          the stream's text has this character if the ids complete it; if they do not,
          it has nothing of it.
        """
        return Stream(self.token_bytes, after)

    def to_json(self) -> str:
        """Returns the whole tokenizer as a string; `from_json` is the inverse."""
        raise NotImplementedError

    def documents_json(self) -> str:
        """Returns what decides on the ids of documents: a part of `to_json`."""
        return self.to_json()

    def tokenizer_json(self) -> str:
        """Returns the text of a Hugging Face tokenizer.json that gives the same ids."""
        raise NotImplementedError

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes `tokenizer_json` to `path`; a failed write does not change it.

        Raises:
          ValueError: if it cannot be written.
        """
        path = local_path(path, "out")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_text(path, self.tokenizer_json())
        except OSError as error:
            raise ValueError(
                f"out={str(path)!r} cannot be written: {error.strerror or error}"
            ) from None

    def token_bytes(self, token: int, previous: int | None) -> bytes | None:
        """Returns the bytes that an id adds to a text, None if it stands for no text.

        previous: the id before it that stands for text, None at the start of a text
        (where some tokenizers drop a space).
        """
        raise NotImplementedError


# ------------------------------------------------------------------ bytes


class ByteTokenizer(Tokenizer):
    """A tokenizer with the bytes of UTF-8 as ids 0 to 255, and bos, eos, pad after."""

    bos, eos, pad, size = 256, 257, 258, 259
    eos_ids = (eos,)
    starts_with_bos = True
    special = Special(dict(zip(NAMES, _OWN_NAMES)))

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [list(without_surrogates(text).encode()) for text in texts]

    def prompt(self, text: str, bos: bool | None = None) -> list[int]:
        return [self.bos] * (bos is not False) + self.encode(text)

    def token_name(self, token: int) -> str | None:
        if 0 <= token < 256:
            return next(name for name, byte in _ALPHABET.items() if byte == token)
        return dict(enumerate(_OWN_NAMES, start=256)).get(token)

    def encode_rendered(self, texts: list[str]) -> list[Rendered]:
        return [self._encode_rendered(without_surrogates(text)) for text in texts]

    def _encode_rendered(self, text: str) -> Rendered:
        special = dict(zip(_OWN_NAMES, (self.bos, self.eos, self.pad)))
        rendered = Rendered([], [])
        start = 0
        for part in _OWN_NAMES_PATTERN.split(text):
            if part in special:
                rendered.ids.append(special[part])
                rendered.offsets.append((start, start + len(part)))
            else:
                for i, character in enumerate(part, start):
                    ids = character.encode()
                    rendered.ids.extend(ids)
                    rendered.offsets.extend([(i, i + 1)] * len(ids))
            start += len(part)
        return rendered

    def to_json(self) -> str:
        return json.dumps({"kind": "bytes"})

    def tokenizer_json(self) -> str:
        library_tokenizer = tokenizers.Tokenizer(models.BPE(_ALPHABET, []))
        library_tokenizer.add_special_tokens(_OWN_NAMES)
        _make_byte_level(library_tokenizer, use_regex=False)
        return library_tokenizer.to_str()

    def token_bytes(self, token: int, previous: int | None) -> bytes | None:
        return bytes([token]) if 0 <= token < 256 else None


# ------------------------------------------------------------------ Hugging Face


class HuggingFace(Tokenizer):
    """A tokenizer.json, run by the `tokenizers` library.

    Args:
      text: the content of tokenizer.json.
      special: what the files beside it say.
      origin: its name in messages.
      chat_template: its Jinja template, if it has one.

    Raises:
      ConfigError: if `text` is no tokenizer or has no token of these names or ids.
    """

    def __init__(
        self, text: str, special: Special, origin: str = "this tokenizer"
    ) -> None:
        self._json, self.special, self._origin = text, special, origin
        names = special.names
        self._plain = parse(text)
        # It encodes names of special tokens in a text as plain text.
        self._plain.encode_special_tokens = True
        vocabulary = self._plain.get_vocab(with_added_tokens=True)
        for kind, name in names.items():
            if name not in vocabulary:
                raise ConfigError(
                    f"{kind}={name!r} is not a token: it must be one of the tokenizer's"
                )
        self.size = max(vocabulary.values()) + 1
        self.eos = vocabulary[names["eos"]]
        self.bos = vocabulary[names.get("bos", names["eos"])]
        self.pad = vocabulary[names.get("pad", names["eos"])]
        self.eos_ids = special.eos_ids or (self.eos,)
        require(
            max(self.eos_ids) < self.size,
            "eos_token_id",
            max(self.eos_ids),
            f"one of the tokenizer's {self.size} ids",
        )
        self.chat_template = special.chat_template
        added = self._plain.get_added_tokens_decoder()
        self._special = {id for id, token in added.items() if token.special}
        decoder = json.loads(text).get("decoder") or {}
        parts = decoder.get("decoders", [decoder])
        self._decoders = {part["type"] for part in parts if part}
        # Only the bytes of a byte-level token do not depend on the token before it.
        self._needs_previous = "ByteLevel" not in self._decoders
        # The engine decodes each token that it generates, most of them many times.
        self._cached_bytes = functools.lru_cache(maxsize=1 << 16)(self._bytes_of)

    @functools.cached_property
    def _with_special_tokens(self) -> tokenizers.Tokenizer:
        """The library's tokenizer; it encodes names of special tokens as such."""
        return parse(self._json)

    @functools.cached_property
    def _without_processor(self) -> tokenizers.Tokenizer:
        """`_with_special_tokens` whose offsets keep the spaces of a token.

        The post-processor would cut them off.
        """
        values = json.loads(self._json)
        values["post_processor"] = None
        return parse(json.dumps(values))

    @functools.cached_property
    def starts_with_bos(self) -> bool:  # type: ignore[override]
        """Whether prompts start with bos: by its setting, else its post-processor."""
        if self.special.add_bos is not None:
            return self.special.add_bos and "bos" in self.special.names
        names = sorted(self._with_special_tokens.get_vocab(with_added_tokens=False))
        for text in ("a", *names[:100]):
            try:
                return self._with_special_tokens.encode(text).ids[:1] == [self.bos]
            except Exception:  # a tokenizer without a token for unknown characters
                continue
        return False

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        texts = [without_surrogates(text) for text in texts]
        with library_errors(f"{self._origin} cannot encode a text"):
            encodings = self._plain.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def prompt(self, text: str, bos: bool | None = None) -> list[int]:
        text = without_surrogates(text)
        with library_errors(f"{self._origin} cannot encode the prompt"):
            ids = self._with_special_tokens.encode(text, add_special_tokens=False).ids
        if bos is None:
            bos = self.starts_with_bos or not ids
        return [self.bos, *ids] if bos and ids[:1] != [self.bos] else ids

    def token_name(self, token: int) -> str | None:
        return self._plain.id_to_token(token) if 0 <= token < self.size else None

    def encode_rendered(self, texts: list[str]) -> list[Rendered]:
        texts = [without_surrogates(text) for text in texts]
        library_tokenizer = self._without_processor
        with library_errors(f"{self._origin} cannot encode a conversation"):
            encodings = library_tokenizer.encode_batch(texts, add_special_tokens=False)
        return [Rendered(encoding.ids, encoding.offsets) for encoding in encodings]

    def to_json(self) -> str:
        return self._to_json(self.special._asdict())

    def documents_json(self) -> str:
        return self._to_json({"names": self.special.names})

    def _to_json(self, settings: dict[str, Any]) -> str:
        values = {"kind": "huggingface"} | settings | {"tokenizer": self._json}
        return json.dumps(values, ensure_ascii=False)

    def tokenizer_json(self) -> str:
        return self._json

    def token_bytes(self, token: int, previous: int | None) -> bytes | None:
        return self._cached_bytes(token, previous if self._needs_previous else None)

    def _bytes_of(self, token: int, previous: int | None) -> bytes | None:
        name = self.token_name(token)
        if name is None or token in self._special:
            return None
        if "ByteLevel" in self._decoders:
            if all(character in _ALPHABET for character in name):
                return bytes(_ALPHABET[character] for character in name)
            return name.encode()
        if "ByteFallback" in self._decoders and re.fullmatch("<0x[0-9A-F]{2}>", name):
            return bytes.fromhex(name[3:5])
        # The text of a token depends on the token before it: the library puts a space
        # between words, or drops it at the start of a text.
        ids_before = [] if previous is None else [previous]
        text_before = self._plain.decode(ids_before) if ids_before else ""
        text = self._plain.decode([*ids_before, token])
        return text[len(text_before) :].encode()


def _make_byte_level(
    library_tokenizer: tokenizers.Tokenizer, use_regex: bool = True
) -> None:
    """Makes a tokenizer with special tokens of _OWN_NAMES work on bytes.

    It also makes prompts start with bos.
    """
    library_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=use_regex
    )
    library_tokenizer.decoder = decoders.ByteLevel()
    bos_name = _OWN_NAMES[0]
    library_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos_name} $A",
        special_tokens=[(bos_name, library_tokenizer.token_to_id(bos_name))],
    )


# ------------------------------------------------------------------ training, loading


def train(texts: Iterable[str], vocab_size: int) -> HuggingFace:
    """Trains byte-level BPE on texts: 256 bytes, 3 special tokens, then merges.

    The same texts in the same order give the same tokenizer.

    Args:
      texts: the documents.
      vocab_size: the largest number of ids.

    Raises:
      ConfigError: if `vocab_size` is too small, or above MOST_IDS.
    """
    minimum = 256 + len(_OWN_NAMES)
    require(
        minimum <= vocab_size <= MOST_IDS,
        "vocab_size",
        vocab_size,
        f"at least {minimum}, for 256 bytes and {len(_OWN_NAMES)} special tokens, and "
        f"at most {MOST_IDS}",
    )
    library_tokenizer = tokenizers.Tokenizer(models.BPE())
    library_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=_OWN_NAMES,
        initial_alphabet=sorted(_ALPHABET),
        show_progress=False,
    )
    library_tokenizer.train_from_iterator(map(without_surrogates, texts), trainer)
    _make_byte_level(library_tokenizer)
    return HuggingFace(library_tokenizer.to_str(), ByteTokenizer.special)


def from_json(text: str) -> Tokenizer:
    """Returns the tokenizer that `Tokenizer.to_json` wrote.

    Raises:
      ValueError: if `text` does not come from `to_json`.
    """
    try:
        values = json.loads(text)
        kind = values["kind"]
        if kind == "bytes":
            return ByteTokenizer()
        if kind == "huggingface":
            origin = "the checkpoint's tokenizer"
            text = values["tokenizer"]
            # Checkpoints of older versions have the names alone.
            fields = {name: values[name] for name in Special._fields if name in values}
            fields["eos_ids"] = tuple(fields.get("eos_ids", ()))
            return HuggingFace(text, Special(**fields), origin)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"this is not a tokenizer that to_json wrote: {error!r}"
        ) from None
    raise ValueError(
        f"kind={kind!r} is not a tokenizer: it must be 'bytes' or 'huggingface'"
    )


def from_files(read: Callable[[str], str | None], origin: str) -> HuggingFace:
    """Returns the tokenizer of a folder with a tokenizer.json (see `texts_of`).

    tokenizer.json does not say which token ends a text. The files beside it do (see
    tokenizer_files.py). Without these, the token is the first of NAMES in
    tokenizer.json.

    Args:
      read: gives the content of a file by its name, None if there is no such file.
      origin: its name in messages.

    Raises:
      ConfigError: if it is no tokenizer, or has no token that ends a text.
    """
    text = read(TOKENIZER)
    if text is None:
        raise ConfigError(f"it has no {TOKENIZER} and no {SENTENCEPIECE}")
    added = parse(text).get_added_tokens_decoder().values()
    special = read_special(read, (token.content for token in added))
    return HuggingFace(text, special, origin)


def load(spec: str) -> Tokenizer:
    """Returns the tokenizer of `data.tokenizer`, see `from_files`.

    Args:
      spec: "bytes", or the path of a tokenizer.json, of SentencePiece's
        tokenizer.model, of a folder that holds one, or of a run or checkpoint.

    Raises:
      ConfigError: if there is no such file, if it is no tokenizer, or if it has no
        token that ends a text.
    """
    if spec == "bytes":
        return ByteTokenizer()
    origin = f"data.tokenizer={spec!r}"
    path = local_path(spec, "data.tokenizer")
    is_folder = path.is_dir()
    if is_folder and not any((path / x).exists() for x in (TOKENIZER, SENTENCEPIECE)):
        tokenizer = _from_checkpoint(path)
        if tokenizer:
            return tokenizer
    try:
        if is_folder or is_file(path):
            return from_files(texts_of(path), origin)
    except ValueError as error:
        raise ConfigError(f"{origin} is not accepted: {error}") from None
    raise ConfigError(
        f"{origin} does not exist: it must be 'bytes', or the path of a "
        f"{TOKENIZER}, of a {SENTENCEPIECE}, of a folder that holds one, or of a run"
    )


def _from_checkpoint(path: Path) -> Tokenizer | None:
    """Returns the tokenizer of a run, its checkpoints or one of them; None: it is none.

    Orbax is imported only where it is needed.
    """
    from ladder_jax import checkpoint

    try:
        return from_json(checkpoint.read_meta(path)["tokenizer"])
    except (ValueError, KeyError, OSError):
        return None
