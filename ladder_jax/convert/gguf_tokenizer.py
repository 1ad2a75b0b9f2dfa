"""Makes tokenizer.json and the texts beside it from the metadata of a GGUF file.

GGUF stores a tokenizer's vocabulary, its merges and the name of its pre-tokenizer, a
set of rules that split a text before the merges. The rules themselves are here.
"""

import json
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from ladder_jax.config import ConfigError, require, short_repr
from ladder_jax.data import sentencepiece_bpe
from ladder_jax.data.sentencepiece_bpe import (
    BYTE,
    CONTROL,
    NORMAL,
    UNUSED,
    USER_DEFINED,
)

log = logging.getLogger(__name__)


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The pre-tokenizers by the regular expression that splits a text. "" is GPT-2's own,
# "digits" the same after every digit has become a part of its own.
SPLITS = {
    **dict.fromkeys(("gpt-2", "olmo", "phi-2", "jais", "mpt"), ""),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell"), "digits"),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "smaug-bpe", "dbrx"), LLAMA3
    ),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), QWEN2),
    "tekken": TEKKEN,
}
# Pre-tokenizers whose models take a part that is a token without applying merges, and
# put bos before a text where the file does not say whether to.
IGNORE_MERGES = {"llama-bpe", "llama3", "llama-v3", "falcon3", "tekken"}
# Control tokens that end a turn of a chat, for files that name no such token.
END_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|eom_id|>")
Check = Callable[[Any], bool]


def _list_of(fits: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(fits, value))


_is_text: Check = lambda x: isinstance(x, str)
_is_flag: Check = lambda x: isinstance(x, bool)
_is_type: Check = lambda x: type(x) is int and 0 <= x <= BYTE  # 0: not defined
_is_score: Check = lambda x: type(x) in (int, float) and not math.isnan(x)
# What the keys of a tokenizer hold, in a check and in words.
TYPES: dict[str, tuple[Check, str]] = {
    "chat_template": (_is_text, "text"),
    "ggml.model": (_is_text, "text"),
    "ggml.pre": (_is_text, "text"),
    "ggml.tokens": (_list_of(_is_text), "a list of texts"),
    "ggml.merges": (_list_of(_is_text), "a list of texts"),
    "ggml.token_type": (_list_of(_is_type), f"a list of numbers from 0 to {BYTE}"),
    "ggml.scores": (_list_of(_is_score), "a list of numbers"),
    "ggml.add_bos_token": (_is_flag, "true or false"),
    "ggml.add_eos_token": (_is_flag, "true or false"),
    "ggml.add_space_prefix": (_is_flag, "true or false"),
}
KINDS = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}


def texts(metadata: Mapping[str, Any], rows: int, name: str) -> dict[str, str]:
    """Returns the texts of a Hugging Face folder that a GGUF file's metadata make.

    Args:
      metadata: of the file.
      rows: of the embedding.
      name: the file's name in messages.

    Returns:
      {"tokenizer.json": ..., "tokenizer_config.json", "generation_config.json", and,
      where the file has one, "chat_template.jinja"}.

    Raises:
      ConfigError: one line, if the tokenizer is of a kind that cannot be made.
    """
    _check_types(metadata, name)
    vocabulary = _Vocabulary(metadata, rows, name)
    make = {"gpt2": _byte_level, "llama": _sentencepiece}.get(vocabulary.kind)
    if make is None:
        raise ConfigError(
            f"{name}: tokenizer.ggml.model={short_repr(vocabulary.kind)} is not "
            "supported: it must be gpt2 (byte-level BPE) or llama (SentencePiece's); "
            "for others give the tokenizer.json of its Hugging Face folder"
        )
    tokenizer = make(vocabulary, metadata)
    sentencepiece_bpe.surround(
        tokenizer,
        vocabulary.tokens,
        vocabulary.special["bos"] if vocabulary.add_bos else None,
        vocabulary.special["eos"] if vocabulary.add_eos else None,
    )
    result = {
        "tokenizer.json": tokenizer.to_str(),
        "tokenizer_config.json": json.dumps(vocabulary.settings, ensure_ascii=False),
        "generation_config.json": json.dumps(vocabulary.generation),
    }
    template = metadata.get("tokenizer.chat_template")
    if template:
        result["chat_template.jinja"] = template
    return result


def _check_types(metadata: Mapping[str, Any], name: str) -> None:
    """Raises ConfigError where a key that is there holds another type of value."""
    for key, (fits, accepted) in TYPES.items():
        value = metadata.get(f"tokenizer.{key}")
        if value is not None:
            require(fits(value), f"{name}: tokenizer.{key}", value, accepted)


class _Vocabulary:
    """The tokens of a file with their types, and which of them are special."""

    def __init__(self, metadata: Mapping[str, Any], rows: int, name: str) -> None:
        self.name = name
        get = lambda key, default=None: metadata.get(f"tokenizer.ggml.{key}", default)
        self.kind = get("model")
        if self.kind is None:
            raise ConfigError(f"{name} has no tokenizer.ggml.model")
        tokens = get("tokens")
        if not tokens:
            raise ConfigError(f"{name} has no tokenizer.ggml.tokens: it is damaged")
        if len(tokens) > rows:
            raise ConfigError(
                f"{name} has {len(tokens)} tokens, but its embedding has {rows} rows"
            )
        types = get("token_type") or [NORMAL] * len(tokens)
        if len(types) != len(tokens):
            raise ConfigError(
                f"{name} has {len(tokens)} tokens, but {len(types)} types of tokens"
            )
        # Unused ids fill a vocabulary up: no text becomes one of them.
        self.ids: dict[str, int] = {}
        for id, (token, type) in enumerate(zip(tokens, types)):
            if type == UNUSED:
                continue
            if token in self.ids:
                raise ConfigError(
                    f"{name} has the token {short_repr(token)} twice: ids "
                    f"{self.ids[token]} and {id}"
                )
            self.ids[token] = id
        self.types = dict(zip(tokens, types))
        self.tokens, self.listed_types = tokens, types
        self.special = {
            kind: self._id(get(f"{key}_token_id"), key) for kind, key in KINDS.items()
        }
        self.pre = self._pre_tokenizer(get("pre"), metadata)
        starts = self.pre in IGNORE_MERGES or self.kind == "llama"
        self.add_bos: bool = get("add_bos_token", starts)
        self.add_eos: bool = get("add_eos_token", False)
        self._ends = [self._id(get(f"{key}_token_id"), key) for key in ("eot", "eom")]

    def _id(self, id: Any, key: str) -> int | None:
        """Returns a special token's id; None where the file names none."""
        if id is None or id == 2**32 - 1 or id == -1:
            return None
        if type(id) is not int or not 0 <= id < len(self.tokens):
            raise ConfigError(
                f"{self.name}: tokenizer.ggml.{key}_token_id={short_repr(id)} is not "
                f"accepted: it must be an id from 0 to {len(self.tokens) - 1}"
            )
        return id

    def _pre_tokenizer(self, pre: Any, metadata: Mapping[str, Any]) -> str:
        """Returns the name of the pre-tokenizer; it is guessed where none is given."""
        if pre not in (None, "default"):
            return pre
        if self.kind != "gpt2":
            return "default"
        if str(metadata.get("general.architecture")).startswith("qwen"):
            return "qwen2"
        if "<|begin_of_text|>" in self.ids and "<|eot_id|>" in self.ids:
            return "llama-bpe"
        log.warning(
            "%s does not name its pre-tokenizer: GPT-2's is used, and some texts may "
            "be split otherwise than the model was trained with",
            self.name,
        )
        return "gpt-2"

    @property
    def settings(self) -> dict[str, Any]:
        """The content of tokenizer_config.json."""
        named = {
            f"{kind}_token": None if id is None else self.tokens[id]
            for kind, id in self.special.items()
        }
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **named,
            "add_bos_token": self.add_bos,
            "add_eos_token": self.add_eos,
            "clean_up_tokenization_spaces": False,
        }

    @property
    def generation(self) -> dict[str, Any]:
        """The content of generation_config.json: where a text starts and ends."""
        ends = [self.special["eos"], *self._ends]
        if self._ends[0] is None:  # llama.cpp, too, then looks for the usual names
            ends += [
                self.ids[token]
                for token in END_OF_TURN
                if self.types.get(token) == CONTROL
            ]
        unique = list(dict.fromkeys(end for end in ends if end is not None))
        return {
            "bos_token_id": self.special["bos"],
            "eos_token_id": unique[0] if len(unique) == 1 else unique,
            "pad_token_id": self.special["pad"],
        }


def _byte_level(
    vocabulary: _Vocabulary, metadata: Mapping[str, Any]
) -> tokenizers.Tokenizer:
    """Returns the library's tokenizer for a vocabulary of byte-level BPE."""
    merges = metadata.get("tokenizer.ggml.merges")
    if merges is None:
        raise ConfigError(f"{vocabulary.name} has no tokenizer.ggml.merges")
    split = SPLITS.get(vocabulary.pre)
    if split is None:
        raise ConfigError(
            f"{vocabulary.name}: tokenizer.ggml.pre={short_repr(vocabulary.pre)} is "
            f"not supported: it must be one of {', '.join(SPLITS)}"
        )
    pairs = [tuple(merge.split(" ")) for merge in merges]
    for pair in pairs:
        if len(pair) != 2 or not {*pair, "".join(pair)} <= vocabulary.ids.keys():
            raise ConfigError(
                f"{vocabulary.name} is damaged: {short_repr(' '.join(pair))} of "
                "tokenizer.ggml.merges does not merge two tokens into a third"
            )
    model = models.BPE(
        vocabulary.ids, pairs, ignore_merges=vocabulary.pre in IGNORE_MERGES
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = _pre_tokenizer(split)
    if split == QWEN2:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    _add_special(tokenizer, vocabulary)
    return tokenizer


def _sentencepiece(
    vocabulary: _Vocabulary, metadata: Mapping[str, Any]
) -> tokenizers.Tokenizer:
    """Returns the library's tokenizer for a vocabulary of SentencePiece's BPE.

    As in llama.cpp, a text after a special token gets a space in front, too.
    """
    name = vocabulary.name
    scores = metadata.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(vocabulary.tokens):
        raise ConfigError(f"{name} has no score of every token: it is damaged")
    for key in ("remove_extra_whitespaces", "precompiled_charsmap"):
        if metadata.get(f"tokenizer.ggml.{key}"):
            raise ConfigError(f"{name}: tokenizer.ggml.{key} is not supported")
    rows = zip(vocabulary.tokens, scores, vocabulary.listed_types)
    pieces = [sentencepiece_bpe.Piece(*row) for row in rows]
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    return sentencepiece_bpe.tokenizer_of(pieces, name, prefix=prefix)


def _pre_tokenizer(split: str) -> pre_tokenizers.PreTokenizer:
    """Returns the pre-tokenizer of a value of SPLITS."""
    if split == "":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if split == "digits":
        parts = [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    else:
        parts = [
            pre_tokenizers.Split(tokenizers.Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    return pre_tokenizers.Sequence(parts)


def _add_special(tokenizer: tokenizers.Tokenizer, vocabulary: _Vocabulary) -> None:
    """Adds the tokens that a text names whole."""
    for type, special in ((CONTROL, True), (USER_DEFINED, False)):
        added = [
            tokenizers.AddedToken(token, normalized=False, special=special)
            for token in vocabulary.ids
            if vocabulary.types[token] == type
        ]
        add = tokenizer.add_special_tokens if special else tokenizer.add_tokens
        add(added)
