"""Tokenizers: bytes, any Hugging Face `tokenizer.json`, and byte-level BPE trained on a corpus.

All have one interface. `encode` reads text as text: the name of a special token in it is not that token. `prompt`
encodes what a model is asked to continue. Every id stands for some bytes, or for none (special tokens, and rows of a
padded vocabulary), so `decode` and `stream` are the same map from bytes to characters, whole or one id at a time.
"""

import codecs
import contextlib
import functools
import json
import os
import re
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from ladder_jax.config import ConfigError

NAMES = {  # of special tokens, the first that a tokenizer.json has is taken; the first of each are our own
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
_SURROGATES = re.compile(
    "[\ud800-\udfff]"
)  # halves of a UTF-16 pair, as JSON can hold: no text has them


def _byte_alphabet():
    """GPT-2's character for each byte: itself where it prints, else one from 256 on. -> dict[str, int]"""
    printing = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (b for b in range(256) if b not in printing)
    return {chr(b): b for b in sorted(printing)} | {
        chr(256 + i): b for i, b in enumerate(others)
    }


_ALPHABET = _byte_alphabet()


class Stream:
    """Decodes ids one at a time. What `push` and `flush` return, joined, is `decode` of all the ids."""

    def __init__(self, piece):
        self._piece, self._first = piece, True
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token):
        """The characters that this id completes, often "" (int -> str). Never half a character."""
        piece = self._piece(int(token), self._first)
        self._first = self._first and piece is None
        return self._utf8.decode(piece or b"")

    def flush(self):
        """What is left at the end: U+FFFD for a character that was never completed, else ""."""
        return self._utf8.decode(b"", final=True)


class Tokenizer:
    """What every tokenizer offers.

    size: one more than the largest id.
    bos, eos, pad: ids of the tokens that start a document, end it and fill rows. A Hugging Face tokenizer without
        bos or pad uses its eos for them (as GPT-2 does).
    """

    size: int
    bos: int
    eos: int
    pad: int

    def encode(self, text):
        """Ids of `text` alone, no special tokens added or read (str -> list[int])."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts):
        """`encode` of each, in parallel where the tokenizer can (list[str] -> list[list[int]])."""
        raise NotImplementedError

    def prompt(self, text):
        """Ids of a prompt (str -> list[int]): starts with bos where the tokenizer says so, special tokens are read."""
        raise NotImplementedError

    def decode(self, ids):
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD (iterable of int -> str)."""
        stream = self.stream()
        return "".join(map(stream.push, ids)) + stream.flush()

    def stream(self):
        """A new `Stream`, for text that grows id by id."""
        return Stream(self._piece)

    def to_json(self):
        """All of it as one string; `from_json` is the inverse."""
        raise NotImplementedError

    def tokenizer_json(self):
        """The text of a Hugging Face tokenizer.json that gives the same ids."""
        raise NotImplementedError

    def save(self, path):
        """Writes `tokenizer_json` to `path`, whole or not at all. Raises ValueError where it cannot be written."""
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

    def _piece(self, token, first):
        """The bytes of one id, None for no text. `first`: no text came before, so a leading space may go."""
        raise NotImplementedError


def _text(text):
    return text if text.isascii() else _SURROGATES.sub("\ufffd", text)


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes are the ids 0 to 255; then bos, eos, pad."""

    bos, eos, pad, size = 256, 257, 258, 259

    def encode_batch(self, texts):
        return [list(_text(text).encode()) for text in texts]

    def prompt(self, text):
        return [self.bos, *self.encode(text)]

    def to_json(self):
        return json.dumps({"kind": "bytes"})

    def tokenizer_json(self):
        made = tokenizers.Tokenizer(models.BPE(_ALPHABET, []))
        made.add_special_tokens(_OURS)
        return _byte_level(made, use_regex=False).to_str()

    def _piece(self, token, first):
        return bytes([token]) if 0 <= token < 256 else None


def _parse(text):
    """The `tokenizers.Tokenizer` of the text of a tokenizer.json."""
    try:
        made = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing narrower
        raise ConfigError(
            f"this is not a Hugging Face tokenizer.json: {error}"
        ) from None
    made.no_truncation()  # some files ask for both
    made.no_padding()
    return made


class HuggingFace(Tokenizer):
    """A tokenizer.json, run by the `tokenizers` library.

    text: the content of tokenizer.json. names: its special tokens, dict with "eos" and perhaps "bos" and "pad".
    Raises ValueError if `text` is no tokenizer or has no token `names["eos"]`.
    """

    def __init__(self, text, names):
        self._json, self.names = text, names
        self._plain = _parse(text)
        self._plain.encode_special_tokens = (
            True  # read them as the text they are written in
        )
        vocabulary = self._plain.get_vocab(with_added_tokens=True)
        for kind, name in names.items():
            if name not in vocabulary:
                raise ConfigError(
                    f"{kind}={name!r} is not a token: it must be one of the tokenizer's"
                )
        self.size = max(vocabulary.values()) + 1
        self.eos = vocabulary[names["eos"]]
        self.bos, self.pad = (
            vocabulary[names.get(kind, names["eos"])] for kind in ("bos", "pad")
        )
        self._special = {
            id
            for id, token in self._plain.get_added_tokens_decoder().items()
            if token.special
        }
        decoder = json.loads(text).get("decoder") or {}
        self._decoders = {
            part["type"] for part in decoder.get("decoders", [decoder]) if part
        }
        texts = (
            id
            for id in [*self.encode("a"), *sorted(vocabulary.values())]
            if self._plain.decode([id]).strip()
        )
        self._anchor = [
            next(texts, self.eos)
        ]  # a token with text, to stand before another one
        self._piece = functools.cache(self._piece)

    @functools.cached_property
    def _prompting(self):
        """(tokenizer that reads special tokens, whether its post-processor starts a text with bos)"""
        reader = _parse(self._json)
        return reader, reader.encode("a").ids[:1] == [self.bos]

    def encode_batch(self, texts):
        encoded = self._plain.encode_batch_fast(
            [_text(text) for text in texts], add_special_tokens=False
        )
        return [one.ids for one in encoded]

    def prompt(self, text):
        reader, starts_with_bos = self._prompting
        ids = reader.encode(_text(text), add_special_tokens=False).ids
        return [self.bos, *ids] if starts_with_bos and ids[:1] != [self.bos] else ids

    def to_json(self):
        return json.dumps(
            {"kind": "huggingface", "names": self.names, "tokenizer": self._json},
            ensure_ascii=False,
        )

    def tokenizer_json(self):
        return self._json

    def _piece(self, token, first):
        name = self._plain.id_to_token(token) if 0 <= token < self.size else None
        if name is None or token in self._special:
            return None
        if "ByteLevel" in self._decoders:
            known = all(character in _ALPHABET for character in name)
            return (
                bytes(_ALPHABET[character] for character in name)
                if known
                else name.encode()
            )
        if "ByteFallback" in self._decoders and re.fullmatch("<0x[0-9A-F]{2}>", name):
            return bytes.fromhex(name[3:5])
        before = [] if first else self._anchor
        return self._plain.decode([*before, token])[
            len(self._plain.decode(before)) :
        ].encode()


def _byte_level(made, use_regex=True):
    """Completes a `tokenizers.Tokenizer` over bytes that has our special tokens: prompts start with bos."""
    made.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=use_regex
    )
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing(
        single=f"{_OURS[0]} $A", special_tokens=[(_OURS[0], made.token_to_id(_OURS[0]))]
    )
    return made


def train(texts, vocab_size):
    """Byte-level BPE learned from `texts` (an iterable of str), at most `vocab_size` ids: bytes, 3 specials, merges.

    The same texts in the same order give the same tokenizer. Raises ValueError if `vocab_size` is too small.
    """
    least = 256 + len(_OURS)
    if vocab_size < least:
        raise ConfigError(
            f"vocab_size={vocab_size} is not accepted: it must be at least {least}, "
            f"for 256 bytes and {len(_OURS)} special tokens"
        )
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.train_from_iterator(
        map(_text, texts),
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=_OURS,
            initial_alphabet=sorted(_ALPHABET),
            show_progress=False,
        ),
    )
    return HuggingFace(_byte_level(made).to_str(), dict(zip(NAMES, _OURS)))


def from_json(text):
    """The tokenizer that `to_json` wrote. Raises ValueError for anything else."""
    try:
        values = json.loads(text)
        kind = values["kind"]
        if kind == "bytes":
            return ByteTokenizer()
        if kind == "huggingface":
            return HuggingFace(values["tokenizer"], values["names"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"this is not a tokenizer that to_json wrote: {error!r}"
        ) from None
    raise ValueError(
        f"kind={kind!r} is not a tokenizer: it must be 'bytes' or 'huggingface'"
    )


def load(spec):
    """The tokenizer of `data.tokenizer`: "bytes", or the path of a tokenizer.json or of a folder that holds one.

    tokenizer.json does not say which token ends a text: tokenizer_config.json or special_tokens_map.json beside it
    do, else the first of `NAMES` that it has is taken. Raises ValueError if there is none, or no such file.
    """
    if spec == "bytes":
        return ByteTokenizer()
    path = Path(spec).expanduser()
    path = path / "tokenizer.json" if path.is_dir() else path
    try:
        text = path.read_text(encoding="utf-8")
        return HuggingFace(text, _special_names(text, path.parent))
    except OSError as error:
        raise ConfigError(
            f"data.tokenizer={spec!r} cannot be read ({error.strerror}): it must be 'bytes', or the path "
            "of a tokenizer.json or of a folder that holds one"
        ) from None
    except ValueError as error:
        raise ConfigError(f"data.tokenizer={spec!r} is not accepted: {error}") from None


def _special_names(text, folder):
    """{"eos": name, perhaps "bos" and "pad"} for the tokenizer.json `text` that lies in `folder`."""
    said = {}
    for path in (folder / "special_tokens_map.json", folder / "tokenizer_config.json"):
        if path.exists():
            said |= json.loads(path.read_text(encoding="utf-8"))
    added = {
        token.content for token in _parse(text).get_added_tokens_decoder().values()
    }
    names = {}
    for kind, usual in NAMES.items():
        name = said.get(f"{kind}_token")
        name = name["content"] if isinstance(name, dict) else name
        if name is None and (
            kind == "eos" or f"{kind}_token" not in said
        ):  # null means that there is none
            name = next(
                (usual_name for usual_name in usual if usual_name in added), None
            )
        if name is not None:
            names[kind] = name
    if "eos" not in names:
        raise ConfigError(
            "it has no token that ends a text: name one as eos_token in a tokenizer_config.json beside "
            f"it, or use one of {', '.join(NAMES['eos'])}"
        )
    return names
