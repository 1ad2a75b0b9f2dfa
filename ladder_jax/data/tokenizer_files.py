"""The texts beside a tokenizer.json: special tokens, end ids, bos, chat template.

tokenizer.json encodes; it does not say which token ends a text. Hugging Face's folders
say it in tokenizer_config.json (or special_tokens_map.json), and which ids end a
generation in generation_config.json or config.json.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from ladder_jax.config import ConfigError, short_repr

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
    return Special(
        _names(settings, set(added)),
        eos_ids,
        _template(text("chat_template.jinja"), settings.get("chat_template")),
        add_bos if isinstance(add_bos, bool) else None,
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
    if content is None:
        return {}
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{file} is {short_repr(value)}: it must be a JSON object")
    return value


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
    if file is not None:
        return file
    if isinstance(setting, list):
        named = {
            row.get("name"): row.get("template")
            for row in setting
            if isinstance(row, dict)
        }
        setting = named.get("default")
    return setting if isinstance(setting, str) else None
