"""The texts beside a tokenizer.json: special tokens, end ids, bos, chat template.

tokenizer.json encodes; it does not say which token ends a text. Hugging Face's folders
say it in tokenizer_config.json (or special_tokens_map.json), and which ids end a
generation in generation_config.json or config.json.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ladder_jax.config import ConfigError, require, short_repr
from ladder_jax.data import sentencepiece_file
from ladder_jax.data.foreign_files import is_file, parse_object, read_text

TOKENIZER = "tokenizer.json"
SENTENCEPIECE = "tokenizer.model"

# The usual names of special tokens. The first one that a tokenizer.json has counts.
# Tokenizers of this project use the first name of each kind.
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


class Special(NamedTuple):
    """What a tokenizer needs beside its tokenizer.json."""

    names: dict[str, str]  # {kind: name}: "eos", and perhaps "bos" and "pad"
    # The ids that end a generation; (): eos alone.
    eos_ids: tuple[int, ...] = ()
    chat_template: str | None = None  # Jinja
    # Whether prompts start with bos. None: as tokenizer.json says.
    add_bos: bool | None = None


Text = Callable[[str], str | None]  # the content of a file of the folder, or None


def texts_of(path: Path) -> Text:
    """The files of a tokenizer, whose tokenizer.json SentencePiece's file stands for.

    Args:
      path: a folder, or a file of it that is its tokenizer.json, whatever its name, or
        SentencePiece's, NAME.model.

    The function that is returned raises ConfigError, one line, where a file cannot be
    read.
    """
    folder = path if path.is_dir() else path.parent

    def text(name: str) -> str | None:
        if name != TOKENIZER:
            return read_text(folder / name)
        file = folder / TOKENIZER if path.is_dir() else path
        if path.is_dir() and not is_file(file):
            file = folder / SENTENCEPIECE
        if file.suffix != ".model" or not is_file(file):
            return read_text(file)
        settings = read_object(text, "tokenizer_config.json")
        return sentencepiece_file.tokenizer_json(file, settings)

    return text


def read_special(text: Text, added: Iterable[str]) -> Special:
    """Reads the files beside a tokenizer.json.

    Args:
      text: gives the content of a file by its name, None if there is no such file.
      added: the added tokens of tokenizer.json, among which usual names are looked for.

    Raises ConfigError, one line, where a file is damaged or no token ends a text.
    """
    settings: dict[str, Any] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        settings |= read_object(text, file)
    eos_ids: tuple[int, ...] = ()
    for file in ("generation_config.json", "config.json"):
        eos_ids = eos_ids or _ids(read_object(text, file).get("eos_token_id"), file)
    add_bos = settings.get("add_bos_token")
    accepted = "true, false or null"
    is_flag = add_bos is None or isinstance(add_bos, bool)
    require(is_flag, "tokenizer_config.json: add_bos_token", add_bos, accepted)
    return Special(
        _names(settings, set(added)),
        eos_ids,
        _template(text("chat_template.jinja"), settings.get("chat_template")),
        add_bos,
    )


def write_special(special: Special) -> dict[str, str]:
    """The files that `read_special` reads, but config.json: {name: content}.

    AutoTokenizer of transformers then gives the same ids as tokenizer.json.
    """
    settings: dict[str, Any] = {
        f"{kind}_token": name for kind, name in special.names.items()
    }
    # This class takes tokenizer.json as it is.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings["clean_up_tokenization_spaces"] = False
    if special.add_bos is not None:
        settings["add_bos_token"] = special.add_bos
    files = {"tokenizer_config.json": dump(settings)}
    if special.chat_template is not None:
        files["chat_template.jinja"] = special.chat_template
    return files


def dump(values: Mapping[str, Any]) -> str:
    """The text of a JSON file beside a checkpoint's weights."""
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def read_object(text: Text, file: str) -> dict[str, Any]:
    """The JSON object in a file; {} if there is no such file."""
    content = text(file)
    return {} if content is None else parse_object(content, file)


def _names(settings: Mapping[str, Any], added: set[str]) -> dict[str, str]:
    """{kind: name} of the special tokens: "eos", perhaps "bos" and "pad"."""
    names = {}
    for kind, usual_names in NAMES.items():
        field = f"{kind}_token"
        name = settings.get(field)
        if isinstance(name, dict):
            name = name.get("content")
        if name is not None and not isinstance(name, str):
            raise ConfigError(
                f"{field}={short_repr(name)} is not accepted: it must be a token's name"
            )
        # A null says that there is no such token. It does not count for eos, which
        # every tokenizer needs.
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


def _ids(value: Any, file: str) -> tuple[int, ...]:
    """eos_token_id as a tuple; an id, a list of ids and null are accepted."""
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if not all(type(id) is int and id >= 0 for id in ids):
        raise ConfigError(
            f"{file}: eos_token_id={short_repr(value)} is not accepted: it must be an "
            "id or a list of ids"
        )
    return tuple(dict.fromkeys(ids))


def _template(file: str | None, setting: Any) -> str | None:
    """The chat template: the file's, else the setting's; of several the default."""
    if file is not None or setting is None:
        return file
    where = "tokenizer_config.json: chat_template"
    accepted = "text, or a list of objects with name and template, both text"
    if isinstance(setting, list):
        rows = [row if isinstance(row, dict) else {} for row in setting]
        pairs = [(row.get("name"), row.get("template")) for row in rows]
        is_text = all(isinstance(x, str) for pair in pairs for x in pair)
        require(is_text, where, setting, accepted)
        named = dict(pairs)
        if len({text for name, text in pairs if name == "default"}) > 1:
            raise ConfigError(f"{where} has two templates that are named default")
        if named and "default" not in named:
            names = short_repr(list(named))
            raise ConfigError(f"{where} has {names}, and none is named default")
        setting = named.get("default")
    require(setting is None or isinstance(setting, str), where, setting, accepted)
    return setting
