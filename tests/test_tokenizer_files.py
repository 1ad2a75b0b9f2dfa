"""The files of a tokenizer: what each says, and what is refused."""

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from ladder_jax.config import ConfigError
from ladder_jax.data import tokenizer


def write(folder, added, **config):
    """A byte-level tokenizer.json with the special tokens `added`.

    Beside it, `config` as a tokenizer_config.json.
    """
    library_tokenizer = tokenizers.Tokenizer(models.BPE(tokenizer.byte_alphabet(), []))
    library_tokenizer.add_special_tokens(added)
    library_tokenizer.enable_truncation(2)
    library_tokenizer.enable_padding(length=9)
    library_tokenizer.save(str(folder / "tokenizer.json"))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder / "tokenizer.json")


def test_eos_is_what_the_files_say(tmp_path):
    path = write(
        tmp_path,
        ["<|endoftext|>", "<|im_end|>"],
        eos_token={"content": "<|im_end|>"},
        bos_token=None,
    )
    tok = tokenizer.load(path)
    assert (tok.eos, tok.bos, tok.pad) == (257, 257, 257)
    # The file's truncation and padding are off.
    assert tok.encode("abcd") == [97, 98, 99, 100]


def test_eos_by_its_usual_name(tmp_path):
    tok = tokenizer.load(write(tmp_path, ["<s>", "</s>"]))
    assert (tok.bos, tok.eos) == (256, 257)


@pytest.mark.parametrize(
    "added, config, message",
    [
        (["<|other|>"], {}, "no token that ends a text: name one as eos_token"),
        (["</s>"], {"eos_token": "<|gone|>"}, "eos='<|gone|>' is not a token"),
    ],
)
def test_no_eos(tmp_path, added, config, message):
    with pytest.raises(ValueError) as error:
        tokenizer.load(write(tmp_path, added, **config))
    assert (
        message in str(error.value)
        and "data.tokenizer=" in str(error.value)
        and "\n" not in str(error.value)
    )


def test_what_is_no_tokenizer(tmp_path):
    with pytest.raises(
        ValueError, match="data.tokenizer='nowhere.json' does not exist"
    ):
        tokenizer.load("nowhere.json")
    for i, text in enumerate(["", "{}", "[]", "not json"]):
        (tmp_path / f"{i}.json").write_text(text)
        with pytest.raises(ValueError, match="data.tokenizer=.* is not accepted"):
            tokenizer.load(str(tmp_path / f"{i}.json"))


# ------------------------------------------------------------------ SentencePiece


def test_a_tokenizer_model_is_a_tokenizer(tmp_path):
    """A folder that has it alone, and the file itself, whatever its name."""
    data = Path(__file__).parent / "data" / "sentencepiece"
    words, ids = json.loads((data / "ids.jsonl").read_text().splitlines()[0])
    model = (data / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(model)
    (tmp_path / "mine.model").write_bytes(model)
    for name in ("", "tokenizer.model", "mine.model"):
        tok = tokenizer.load(str(tmp_path / name))
        assert tok.prompt(words) == [1, *ids] and (tok.bos, tok.eos) == (1, 2)
    settings = dict(add_bos_token=False, eos_token="</s>", chat_template="{{ 1 }}")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tok = tokenizer.load(str(tmp_path))
    assert tok.prompt(words) == ids and tok.chat_template == "{{ 1 }}"
    # tokenizer.json goes first; it must be one.
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="no.*tokenizer.json that can be read"):
        tokenizer.load(str(tmp_path))
    assert tokenizer.load(str(tmp_path / "tokenizer.model")).prompt(words) == ids


@pytest.mark.parametrize("name", ["", "tokenizer.model"])
def test_what_is_no_tokenizer_model_says_what_to_do(tmp_path, name):
    # Llama 3's is a list of tokens in base64, of tiktoken.
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    with pytest.raises(ConfigError, match="tiktoken's.*save a tokenizer.json") as error:
        tokenizer.load(str(tmp_path / name))
    assert str(error.value).startswith("data.tokenizer=")


def test_a_folder_without_a_tokenizer_says_what_is_missing(tmp_path):
    with pytest.raises(ConfigError, match="no tokenizer.json and no tokenizer.model"):
        tokenizer.load(str(tmp_path))


# ------------------------------------------------------------------ chat templates


@pytest.mark.parametrize(
    "setting, template",
    [
        (None, None),
        ("one", "one"),
        ([dict(name="default", template="one")], "one"),
        (
            [dict(name="tool_use", template="t"), dict(name="default", template="one")],
            "one",
        ),
        ([dict(name="default", template="one")] * 2, "one"),
        ([], None),
    ],
)
def test_the_template_of_one_or_several(tmp_path, setting, template):
    folder = write(tmp_path, ["</s>"], chat_template=setting)
    assert tokenizer.load(folder).chat_template == template
    (tmp_path / "chat_template.jinja").write_text("a file")
    assert tokenizer.load(folder).chat_template == "a file"


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(chat_template=5), "chat_template=5 is not accepted: it must be text"),
        (dict(chat_template={"default": "x"}), "must be text, or a list"),
        (dict(chat_template=["x"]), "must be text, or a list"),
        (dict(chat_template=[dict(name="default")]), "must be text, or a list"),
        (dict(chat_template=[dict(name="default", template=5)]), "must be text, or a"),
        (
            dict(chat_template=[dict(name="tool_use", template="x")]),
            r"\['tool_use'\], and none is named default",
        ),
        (
            dict(chat_template=[dict(name="default", template=x) for x in "ab"]),
            "two templates that are named default",
        ),
        (dict(add_bos_token="yes"), "add_bos_token='yes' is not accepted"),
        (dict(add_bos_token=1), "add_bos_token=1 is not accepted"),
    ],
)
def test_settings_of_a_wrong_type(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message) as error:
        tokenizer.load(write(tmp_path, ["</s>"], **settings))
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- files of chat models

IM_END = {"content": "<|im_end|>"}
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def chat_folder(folder, **files):
    """A folder of a chat model's tokenizer; `files` by name, dots as __, JSON."""
    bpe = tokenizers.Tokenizer(models.BPE(tokenizer.byte_alphabet(), []))
    bpe.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    folder.mkdir()
    bpe.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("__", ".")).write_text(text)
    return str(folder)


@pytest.mark.parametrize(
    "files, ids",
    [
        ({}, (258,)),
        (dict(tokenizer_config__json={"eos_token": IM_END}), (257,)),
        (dict(config__json={"eos_token_id": 257}), (257,)),
        (
            dict(
                generation_config__json={"eos_token_id": [257, 258]},
                config__json={"eos_token_id": 256},
            ),
            (257, 258),
        ),
        (
            dict(
                generation_config__json={"eos_token_id": None},
                config__json={"eos_token_id": [256]},
            ),
            (256,),
        ),
    ],
)
def test_a_generation_ends_at_the_ids_of_the_nearest_file(tmp_path, files, ids):
    tok = tokenizer.load(chat_folder(tmp_path / "chat", **files))
    assert tok.eos_ids == ids
    assert tokenizer.from_json(tok.to_json()).eos_ids == ids


def test_template_and_bos_setting_travel_with_a_checkpoint(tmp_path):
    settings = {"bos_token": "<|im_start|>", "chat_template": "old"}
    folder = chat_folder(
        tmp_path / "chat",
        tokenizer_config__json=settings | {"add_bos_token": True},
        chat_template__jinja=TEMPLATE,
    )
    tok = tokenizer.from_json(tokenizer.load(folder).to_json())
    assert tok.chat_template == TEMPLATE  # the file wins
    assert tok.prompt("ab")[0] == 256  # tokenizer.json alone would add no bos
    several = [dict(name="tool_use", template="x"), dict(name="default", template="d")]
    (tmp_path / "chat" / "chat_template.jinja").unlink()
    (tmp_path / "chat" / "tokenizer_config.json").write_text(
        json.dumps(settings | {"chat_template": several, "add_bos_token": False})
    )
    tok = tokenizer.load(folder)
    assert tok.chat_template == "d" and tok.prompt("ab") == tok.encode("ab")


def test_settings_of_prompts_do_not_change_the_ids_of_documents(tmp_path):
    plain = tokenizer.load(chat_folder(tmp_path / "a"))
    chat = tokenizer.load(chat_folder(tmp_path / "b", chat_template__jinja=TEMPLATE))
    assert plain.to_json() != chat.to_json()
    assert plain.documents_json() == chat.documents_json()
    old = json.loads(plain.documents_json())
    assert tokenizer.from_json(json.dumps(old)).eos_ids == plain.eos_ids


@pytest.mark.parametrize(
    "files, message",
    [
        (dict(generation_config__json={"eos_token_id": "x"}), "an id or a list of ids"),
        (dict(generation_config__json={"eos_token_id": 999}), "eos_token_id=999"),
        (dict(generation_config__json="{"), "generation_config.json is not JSON"),
        (dict(tokenizer_config__json="[]"), "must be a JSON object"),
        (dict(tokenizer_config__json={"eos_token": 3}), "eos_token=3"),
        (dict(tokenizer_config__json={"eos_token": "no"}), "is not a token"),
    ],
)
def test_damaged_files_beside_a_tokenizer(tmp_path, files, message):
    with pytest.raises(ConfigError, match=message) as error:
        tokenizer.load(chat_folder(tmp_path / "chat", **files))
    assert "\n" not in str(error.value)
