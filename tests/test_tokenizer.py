"""Tokenizers: every one is exact, streams what it decodes, and fits inside a checkpoint."""

import json

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from ladder_jax.data import tokenizer

TEXTS = [
    "the cat sat on the mat, the cat sat",
    "naïve café — 東京 🙂🙂",
    "def f(x):\n    return x + 1\n",
] * 4


def sentencepiece():
    """As Llama 2's: "▁" for spaces, one before the text, bytes for characters that have no token."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *"▁abcdehst",
        "th",
        "the",
        "▁the",
    ]
    merges = [("t", "h"), ("th", "e"), ("▁", "the")]
    made = tokenizers.Tokenizer(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)},
            merges,
            byte_fallback=True,
            unk_token="<unk>",
            fuse_unk=True,
        )
    )
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return made


def wordpiece():
    """As BERT's: words are joined by spaces, "##" continues one; not exact, but it must stream what it decodes."""
    pieces = ["[UNK]", "[EOS]", "the", "cat", "##s", "##é", "é", ".", "!"]
    made = tokenizers.Tokenizer(
        models.WordPiece(
            {piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"
        )
    )
    made.add_special_tokens(["[UNK]", "[EOS]"])
    made.pre_tokenizer, made.decoder = (
        pre_tokenizers.BertPreTokenizer(),
        decoders.WordPiece(),
    )
    return made


EXACT = {
    "bytes": tokenizer.ByteTokenizer(),
    "bpe": tokenizer.train(TEXTS, 320),
    "sentencepiece": tokenizer.HuggingFace(
        sentencepiece().to_str(), {"bos": "<s>", "eos": "</s>"}
    ),
}
ALL = EXACT | {
    "wordpiece": tokenizer.HuggingFace(wordpiece().to_str(), {"eos": "[EOS]"})
}
exact = pytest.mark.parametrize("tok", EXACT.values(), ids=EXACT)
every = pytest.mark.parametrize("tok", ALL.values(), ids=ALL)
fast = settings(max_examples=60, deadline=None)


@exact
@fast
@given(text=st.text())
@example(text=" the  the")
@example(text="<|eos|></s><s>")
def test_round_trip(tok, text):
    ids = tok.encode(text)
    assert all(0 <= i < tok.size for i in ids) and not {
        tok.bos,
        tok.eos,
        tok.pad,
    } & set(ids)
    assert tok.decode(ids) == text
    assert tok.encode_batch([text, "the"]) == [ids, tok.encode("the")]


@exact
@fast
@given(text=st.text(alphabet="the é東🙂"))
def test_stream_gives_each_character_with_its_last_byte(tok, text):
    stream, given_text = tok.stream(), ""
    for end, token in enumerate(tok.encode(text), 1):
        given_text += stream.push(token)
        whole = tok.decode(tok.encode(text)[:end]).rstrip("\ufffd")
        assert given_text == whole and text.startswith(given_text)
    assert given_text == text and stream.flush() == ""


@every
@fast
@given(data=st.data())
def test_stream_equals_decode_for_any_ids(tok, data):
    ids = data.draw(st.lists(st.integers(0, tok.size + 5), max_size=30))
    stream = tok.stream()
    assert "".join(map(stream.push, ids)) + stream.flush() == tok.decode(ids)


@pytest.mark.parametrize("name", ["bpe", "wordpiece"])
@fast
@given(data=st.data())
def test_decode_is_the_library_s(name, data):
    tok = ALL[name]
    ids = data.draw(st.lists(st.integers(0, tok.size + 5), max_size=30))
    assert tok.decode(ids) == tokenizers.Tokenizer.from_str(
        tok.tokenizer_json()
    ).decode(ids)


@fast
@given(ids=st.lists(st.integers(0, 300)))
def test_bytes_decode_is_utf8_with_replacement(ids):
    expected = bytes(i for i in ids if i < 256).decode("utf-8", "replace")
    assert tokenizer.ByteTokenizer().decode(ids) == expected


def test_half_a_character_waits_and_is_replaced_at_the_end():
    stream = tokenizer.ByteTokenizer().stream()
    assert [stream.push(byte) for byte in "a東".encode()[:-1]] == ["a", "", ""]
    assert stream.flush() == "\ufffd"


@every
def test_lone_surrogates_do_not_crash(tok):
    assert isinstance(tok.encode("the \ud83d"), list) and isinstance(
        tok.prompt("\ud83d"), list
    )


@every
def test_json_carries_the_tokenizer(tok):
    copy = tokenizer.from_json(tok.to_json())
    assert (copy.size, copy.bos, copy.eos, copy.pad) == (
        tok.size,
        tok.bos,
        tok.eos,
        tok.pad,
    )
    assert copy.encode("the cat") == tok.encode("the cat") and copy.prompt(
        "the"
    ) == tok.prompt("the")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"kind": "other"}',
        '{"kind": "huggingface", "names": {}}',
        '{"kind": "huggingface", "names": {"eos": "x"}, "tokenizer": "{}"}',
    ],
)
def test_from_json_of_something_else(text):
    with pytest.raises(ValueError, match="tokenizer"):
        tokenizer.from_json(text)


def test_special_tokens_are_text_in_encode_and_read_in_prompt():
    tok = EXACT["sentencepiece"]
    assert tok.eos not in tok.encode("the</s>")
    assert tok.prompt("the") == [tok.bos, *tok.encode("the")]
    assert (
        tok.prompt("<s>the")[0] == tok.bos and tok.prompt("<s>the").count(tok.bos) == 1
    )
    assert tok.prompt("the</s>")[-1] == tok.eos
    assert ALL["wordpiece"].prompt("the") == ALL["wordpiece"].encode(
        "the"
    )  # its post-processor adds no bos


def test_bytes_as_a_tokenizer_json_give_the_same_ids(tmp_path):
    tok = tokenizer.ByteTokenizer()
    tok.save(tmp_path / "tokenizer.json")
    copy = tokenizer.load(str(tmp_path))
    assert (copy.size, copy.bos, copy.eos, copy.pad) == (
        tok.size,
        tok.bos,
        tok.eos,
        tok.pad,
    )
    for text in TEXTS:
        assert copy.encode(text) == tok.encode(text) and copy.prompt(
            text
        ) == tok.prompt(text)


def test_training_is_repeatable_and_saved_whole(tmp_path, monkeypatch):
    tok = tokenizer.train(iter(TEXTS), 320)
    assert tok.to_json() == EXACT["bpe"].to_json()
    assert 259 < tok.size <= 320 and len(tok.encode(TEXTS[0])) < len(TEXTS[0])
    path = tmp_path / "new" / "tokenizer.json"
    tok.save(path)
    assert [p.name for p in path.parent.iterdir()] == ["tokenizer.json"]
    loaded = tokenizer.load(str(path))
    assert loaded.to_json() == tok.to_json() and loaded.eos != loaded.bos

    monkeypatch.setattr(tokenizer.HuggingFace, "tokenizer_json", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tok.save(path)
    assert tokenizer.load(str(path)).size == tok.size  # the old file is untouched


def test_saving_where_it_cannot(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="out=.*cannot be written"):
        tokenizer.ByteTokenizer().save(tmp_path / "file" / "tokenizer.json")


def test_vocab_size_too_small():
    with pytest.raises(
        ValueError, match="vocab_size=258 is not accepted: it must be at least 259"
    ):
        tokenizer.train(TEXTS, 258)
    assert tokenizer.train(TEXTS, 259).size == 259


def write(folder, added, **config):
    """A byte-level tokenizer.json with the special tokens `added`, and a tokenizer_config.json of `config`."""
    made = tokenizers.Tokenizer(models.BPE(tokenizer._ALPHABET, []))
    made.add_special_tokens(added)
    made.enable_truncation(2)
    made.enable_padding(length=9)
    made.save(str(folder / "tokenizer.json"))
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
    assert tok.encode("abcd") == [
        97,
        98,
        99,
        100,
    ]  # the file's truncation and padding are off


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
        ValueError, match="data.tokenizer='nowhere.json' cannot be read"
    ):
        tokenizer.load("nowhere.json")
    for i, text in enumerate(["", "{}", "[]", "not json"]):
        (tmp_path / f"{i}.json").write_text(text)
        with pytest.raises(ValueError, match="data.tokenizer=.* is not accepted"):
            tokenizer.load(str(tmp_path / f"{i}.json"))
