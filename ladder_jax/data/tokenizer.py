"""Tokenizers: bytes, any Hugging Face tokenizer.json, and byte-level BPE.

All have one interface, `Tokenizer`. `encode` reads text as text: the name of a special
token in it is not that token. `prompt` encodes text for a model to continue, and reads
special tokens. `load` opens the tokenizer of a configuration, `from_json` that of a
checkpoint, and `train` learns one from text.
"""

import codecs
import contextlib
import functools
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from ladder_jax.config import ConfigError, require

# The usual names of special tokens. The first one that a tokenizer.json has is used;
# the first one of each kind is ours.
NAMES = {
    "bos": (
        "<|bos|>",
        "<|begin_of_text|>",
        "<|startoftext|>",
        "<s>",
        "<bos>",
        "<｜begin▁of▁sentence｜>",
    ),
    "eos": (
        "<|eos|>",
        "<|end_of_text|>",
        "<|endoftext|>",
        "</s>",
        "<eos>",
        "<｜end▁of▁sentence｜>",
    ),
    "pad": ("<|pad|>", "<|finetune_right_pad_id|>", "<pad>", "[PAD]", "<｜▁pad▁｜>"),
}
_OURS = [names[0] for names in NAMES.values()]
# Halves of a UTF-16 pair, which JSON can hold and text cannot.
_SURROGATES = re.compile("[\ud800-\udfff]")


def byte_alphabet() -> dict[str, int]:
    """Returns GPT-2's characters for bytes: {character: byte}.

    A byte that prints is its own character; the others are those from 256 on.
    """
    printing = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (byte for byte in range(256) if byte not in printing)
    alphabet = {chr(byte): byte for byte in sorted(printing)}
    return alphabet | {chr(256 + i): byte for i, byte in enumerate(others)}


_ALPHABET = byte_alphabet()


# ------------------------------------------------------------------ interface


class Stream:
    """Decodes ids one at a time.

    The texts that `push` and `flush` return, joined, are `decode` of all the ids.
    `tokenizers.decoders.DecodeStream` does not promise that: it has no flush, and it
    raises for some sequences of byte-fallback tokens.

    Args:
      token_bytes: `Tokenizer.token_bytes`.
    """

    def __init__(self, token_bytes: Callable[[int, int | None], bytes | None]) -> None:
        self._token_bytes = token_bytes
        self._previous: int | None = None
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """Returns the characters that this id completes, often ""; never a half one."""
        token = int(token)
        data = self._token_bytes(token, self._previous)
        if data is None:
            return ""
        self._previous = token
        return self._utf8.decode(data)

    def flush(self) -> str:
        """Returns U+FFFD if the ids ended within a character, else ""."""
        return self._utf8.decode(b"", final=True)


class Tokenizer:
    """The interface of all tokenizers.

    An id stands for some bytes, or for none (special tokens, rows of a padded
    vocabulary).

    Attributes:
      size: one more than the largest id.
      bos, eos, pad: ids of the tokens that start a document, end it and fill rows. A
        Hugging Face tokenizer without bos or pad uses its eos for them, as GPT-2 does.
    """

    size: int
    bos: int
    eos: int
    pad: int

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text` alone: no special token is added or read."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Returns `encode` of each text, in parallel where the tokenizer can.

        Raises:
          ConfigError: if the tokenizer cannot encode a text.
        """
        raise NotImplementedError

    def prompt(self, text: str) -> list[int]:
        """Returns the ids of a prompt, at least one; special tokens in it are read.

        They start with bos if the tokenizer asks for that. Without any text, they are
        bos alone (eos, if the tokenizer has no bos): the model starts a new document.

        Raises:
          ConfigError: if the tokenizer cannot encode the text.
        """
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        stream = self.stream()
        return "".join(map(stream.push, ids)) + stream.flush()

    def stream(self) -> Stream:
        """Returns a new `Stream`, for text that grows id by id."""
        return Stream(self.token_bytes)

    def to_json(self) -> str:
        """Returns the whole tokenizer as a string; `from_json` is the inverse."""
        raise NotImplementedError

    def tokenizer_json(self) -> str:
        """Returns the text of a Hugging Face tokenizer.json that gives the same ids."""
        raise NotImplementedError

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes `tokenizer_json` to `path`; a failed write changes nothing there.

        Raises:
          ValueError: if it cannot be written.
        """
        path = Path(path).expanduser()
        part = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(self.tokenizer_json(), encoding="utf-8")
            part.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                part.unlink()
            raise ValueError(
                f"out={str(path)!r} cannot be written: {error.strerror or error}"
            ) from None

    def token_bytes(self, token: int, previous: int | None) -> bytes | None:
        """Returns the bytes that an id adds to a text, None if it stands for no text.

        previous: the id before it that stands for text, None at the start of a text
        (where some tokenizers drop a space).
        """
        raise NotImplementedError


def _without_surrogates(text: str) -> str:
    return text if text.isascii() else _SURROGATES.sub("\ufffd", text)


# ------------------------------------------------------------------ bytes


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes are the ids 0 to 255; then bos, eos, pad."""

    bos, eos, pad, size = 256, 257, 258, 259

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [list(_without_surrogates(text).encode()) for text in texts]

    def prompt(self, text: str) -> list[int]:
        return [self.bos, *self.encode(text)]

    def to_json(self) -> str:
        return json.dumps({"kind": "bytes"})

    def tokenizer_json(self) -> str:
        library_tokenizer = tokenizers.Tokenizer(models.BPE(_ALPHABET, []))
        library_tokenizer.add_special_tokens(_OURS)
        _make_byte_level(library_tokenizer, use_regex=False)
        return library_tokenizer.to_str()

    def token_bytes(self, token: int, previous: int | None) -> bytes | None:
        return bytes([token]) if 0 <= token < 256 else None


# ------------------------------------------------------------------ Hugging Face


@contextlib.contextmanager
def _library_errors(message: str) -> Iterator[None]:
    """Turns an error of the tokenizers library into a ConfigError of one line.

    The library raises nothing narrower than Exception. A panic of its Rust code reaches
    Python as a PanicException, which is a BaseException.
    """
    try:
        yield
    except ConfigError:
        raise
    except BaseException as error:
        is_panic = type(error).__name__ == "PanicException"
        if not (is_panic or isinstance(error, Exception)):
            raise
        reason = " ".join(str(error).split())
        raise ConfigError(f"{message}: {reason}") from None


@contextlib.contextmanager
def _stderr_only_without_error() -> Iterator[None]:
    """Drops what is written to stderr inside, if that ends in an exception.

    Rust writes a panic's backtrace to the file descriptor before Python can catch it.
    """
    sys.stderr.flush()
    try:
        stderr = os.dup(2)
    except OSError:  # there is no stderr
        yield
        return
    with tempfile.TemporaryFile() as captured:
        os.dup2(captured.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
        captured.seek(0)
        os.write(2, captured.read())


def _parse(text: str) -> tokenizers.Tokenizer:
    """Returns the library's tokenizer of the text of a tokenizer.json."""
    with (
        _library_errors("this is not a Hugging Face tokenizer.json that can be read"),
        _stderr_only_without_error(),
    ):
        library_tokenizer = tokenizers.Tokenizer.from_str(text)
    # Some files ask for both.
    library_tokenizer.no_truncation()
    library_tokenizer.no_padding()
    return library_tokenizer


class HuggingFace(Tokenizer):
    """A tokenizer.json, run by the `tokenizers` library.

    Args:
      text: the content of tokenizer.json.
      names: the names of its special tokens: "eos", and perhaps "bos" and "pad".
      origin: what messages call it.

    Raises:
      ConfigError: if `text` is no tokenizer or has no token of these names.
    """

    def __init__(
        self, text: str, names: dict[str, str], origin: str = "this tokenizer"
    ) -> None:
        self._json, self.names, self._origin = text, names, origin
        self._plain = _parse(text)
        # Names of special tokens in a text are read as text.
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
        added = self._plain.get_added_tokens_decoder()
        self._special = {id for id, token in added.items() if token.special}
        decoder = json.loads(text).get("decoder") or {}
        parts = decoder.get("decoders", [decoder])
        self._decoders = {part["type"] for part in parts if part}
        # A byte-level token stands for the same bytes wherever it is.
        self._needs_previous = "ByteLevel" not in self._decoders
        # The engine decodes each token that it generates, and most of them recur.
        self._cached_bytes = functools.lru_cache(maxsize=1 << 16)(self._bytes_of)

    @functools.cached_property
    def _reader(self) -> tokenizers.Tokenizer:
        """The library's tokenizer, which reads names of special tokens as tokens."""
        return _parse(self._json)

    @functools.cached_property
    def _starts_with_bos(self) -> bool:
        """Whether the tokenizer's post-processor puts bos before a text."""
        names = sorted(self._reader.get_vocab(with_added_tokens=False))
        for text in ("a", *names[:100]):
            try:
                return self._reader.encode(text).ids[:1] == [self.bos]
            except Exception:  # a tokenizer without a token for unknown characters
                continue
        return False

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        texts = [_without_surrogates(text) for text in texts]
        with _library_errors(f"{self._origin} cannot encode a text"):
            encodings = self._plain.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def prompt(self, text: str) -> list[int]:
        text = _without_surrogates(text)
        with _library_errors(f"{self._origin} cannot encode the prompt"):
            ids = self._reader.encode(text, add_special_tokens=False).ids
        if not ids or (self._starts_with_bos and ids[0] != self.bos):
            ids = [self.bos, *ids]
        return ids

    def to_json(self) -> str:
        return json.dumps(
            {"kind": "huggingface", "names": self.names, "tokenizer": self._json},
            ensure_ascii=False,
        )

    def tokenizer_json(self) -> str:
        return self._json

    def token_bytes(self, token: int, previous: int | None) -> bytes | None:
        return self._cached_bytes(token, previous if self._needs_previous else None)

    def _bytes_of(self, token: int, previous: int | None) -> bytes | None:
        name = self._plain.id_to_token(token) if 0 <= token < self.size else None
        if name is None or token in self._special:
            return None
        if "ByteLevel" in self._decoders:
            if all(character in _ALPHABET for character in name):
                return bytes(_ALPHABET[character] for character in name)
            return name.encode()
        if "ByteFallback" in self._decoders and re.fullmatch("<0x[0-9A-F]{2}>", name):
            return bytes.fromhex(name[3:5])
        # The library decodes a token by what stands before it: it puts spaces between
        # words, or drops a space at the start. One token before it is enough.
        before = [] if previous is None else [previous]
        known = self._plain.decode(before) if before else ""
        return self._plain.decode([*before, token])[len(known) :].encode()


def _make_byte_level(
    library_tokenizer: tokenizers.Tokenizer, use_regex: bool = True
) -> None:
    """Completes a tokenizer over bytes that has our special tokens.

    Prompts then start with bos.
    """
    library_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=use_regex
    )
    library_tokenizer.decoder = decoders.ByteLevel()
    bos_name = _OURS[0]
    library_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos_name} $A",
        special_tokens=[(bos_name, library_tokenizer.token_to_id(bos_name))],
    )


# ------------------------------------------------------------------ training, loading


def train(texts: Iterable[str], vocab_size: int) -> HuggingFace:
    """Learns byte-level BPE from texts: 256 bytes, 3 special tokens, then merges.

    The same texts in the same order give the same tokenizer.

    Args:
      texts: the documents.
      vocab_size: the largest number of ids.

    Raises:
      ConfigError: if `vocab_size` is too small.
    """
    minimum = 256 + len(_OURS)
    require(
        vocab_size >= minimum,
        "vocab_size",
        vocab_size,
        f"at least {minimum}, for 256 bytes and {len(_OURS)} special tokens",
    )
    library_tokenizer = tokenizers.Tokenizer(models.BPE())
    library_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=_OURS,
        initial_alphabet=sorted(_ALPHABET),
        show_progress=False,
    )
    library_tokenizer.train_from_iterator(map(_without_surrogates, texts), trainer)
    _make_byte_level(library_tokenizer)
    return HuggingFace(library_tokenizer.to_str(), dict(zip(NAMES, _OURS)))


def from_json(text: str) -> Tokenizer:
    """Returns the tokenizer that `Tokenizer.to_json` wrote.

    Raises:
      ValueError: if `text` is something else.
    """
    try:
        values = json.loads(text)
        kind = values["kind"]
        if kind == "bytes":
            return ByteTokenizer()
        if kind == "huggingface":
            origin = "the checkpoint's tokenizer"
            return HuggingFace(values["tokenizer"], values["names"], origin)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"this is not a tokenizer that to_json wrote: {error!r}"
        ) from None
    raise ValueError(
        f"kind={kind!r} is not a tokenizer: it must be 'bytes' or 'huggingface'"
    )


def load(spec: str) -> Tokenizer:
    """Returns the tokenizer of `data.tokenizer`.

    tokenizer.json does not say which token ends a text. tokenizer_config.json or
    special_tokens_map.json beside it do; else it is the first of `NAMES` that it has.

    Args:
      spec: "bytes", or the path of a tokenizer.json or of a folder that holds one.

    Raises:
      ConfigError: if there is no such file, if it is no tokenizer, or if it has no
        token that ends a text.
    """
    if spec == "bytes":
        return ByteTokenizer()
    origin = f"data.tokenizer={spec!r}"
    path = Path(spec).expanduser()
    path = path / "tokenizer.json" if path.is_dir() else path
    try:
        text = path.read_text(encoding="utf-8")
        return HuggingFace(text, _special_names(text, path.parent), origin)
    except OSError as error:
        raise ConfigError(
            f"{origin} cannot be read ({error.strerror}): it must be 'bytes', or the "
            "path of a tokenizer.json or of a folder that holds one"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{origin} is not accepted: {error}") from None


def _special_names(text: str, folder: Path) -> dict[str, str]:
    """Returns the names of special tokens: "eos", and perhaps "bos" and "pad".

    Args:
      text: the content of a tokenizer.json.
      folder: where it is; other files there may name the tokens.
    """
    settings: dict[str, Any] = {}
    for path in (folder / "special_tokens_map.json", folder / "tokenizer_config.json"):
        if path.exists():
            settings |= json.loads(path.read_text(encoding="utf-8"))
    added = {
        token.content for token in _parse(text).get_added_tokens_decoder().values()
    }
    names = {}
    for kind, usual_names in NAMES.items():
        field = f"{kind}_token"
        name = settings.get(field)
        if isinstance(name, dict):
            name = name["content"]
        # A null says that there is no such token; but each tokenizer needs eos.
        if name is None and (kind == "eos" or field not in settings):
            name = next((usual for usual in usual_names if usual in added), None)
        if name is not None:
            names[kind] = name
    if "eos" not in names:
        raise ConfigError(
            "it has no token that ends a text: name one as eos_token in a "
            f"tokenizer_config.json beside it, or use one of {', '.join(NAMES['eos'])}"
        )
    return names
