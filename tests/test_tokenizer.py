"""Tokenizers: each is exact, streams what it decodes, and fits into a checkpoint."""

import json
import os

import pytest
import tokenizers
from helpers import text_after
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from ladder_jax.config import ConfigError
from ladder_jax.data import tokenizer
from ladder_jax.data.tokenizer_files import Special

TEXTS = [
    "the cat sat on the mat, the cat sat",
    "naïve café — 東京 🙂🙂",
    "def f(x):\n    return x + 1\n",
] * 4


def sentencepiece():
    """As Llama 2's: "▁" for spaces, one before the text, bytes for other characters."""
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
    library_tokenizer = tokenizers.Tokenizer(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)},
            merges,
            byte_fallback=True,
            unk_token="<unk>",
            fuse_unk=True,
        )
    )
    library_tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    library_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    library_tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    library_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return library_tokenizer


def wordpiece():
    """As BERT's: words are joined by spaces, "##" continues one.

    It is not exact, but it must stream what it decodes.
    """
    pieces = ["[UNK]", "[EOS]", "the", "cat", "##s", "##é", "é", ".", "!"]
    library_tokenizer = tokenizers.Tokenizer(
        models.WordPiece(
            {piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"
        )
    )
    library_tokenizer.add_special_tokens(["[UNK]", "[EOS]"])
    library_tokenizer.pre_tokenizer, library_tokenizer.decoder = (
        pre_tokenizers.BertPreTokenizer(),
        decoders.WordPiece(),
    )
    return library_tokenizer


def word_ends():
    """As GPT-1's: "</w>" ends a word, and a decoder puts spaces between words."""
    pieces = ["<unk>", "</s>", *"acehst", *(f"{c}</w>" for c in "acehst"), "th"]
    model = models.BPE(
        {piece: i for i, piece in enumerate(pieces)},
        [("t", "h")],
        unk_token="<unk>",
        end_of_word_suffix="</w>",
    )
    library_tokenizer = tokenizers.Tokenizer(model)
    library_tokenizer.add_special_tokens(["<unk>", "</s>"])
    library_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    library_tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    return library_tokenizer


def unigram():
    """As T5's, but without a token for characters that are not in its vocabulary."""
    pieces = [("<s>", 0.0), ("</s>", 0.0), ("▁the", 0.0)]
    pieces += [(character, -2.0) for character in "▁abcehst\ufffd"]
    library_tokenizer = tokenizers.Tokenizer(models.Unigram(pieces))
    library_tokenizer.add_special_tokens(["<s>", "</s>"])
    library_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    library_tokenizer.decoder = decoders.Metaspace()
    return library_tokenizer


def ctc():
    """Its decoder drops repeated tokens, unless a pad is between them."""
    pieces = ["<pad>", "</s>", "|", *"abc"]
    model = models.WordLevel({piece: i for i, piece in enumerate(pieces)}, "<pad>")
    library_tokenizer = tokenizers.Tokenizer(model)
    library_tokenizer.decoder = decoders.CTC(pad_token="<pad>", cleanup=False)
    return library_tokenizer


EXACT = {
    "bytes": tokenizer.ByteTokenizer(),
    "bpe": tokenizer.train(TEXTS, 320),
    "sentencepiece": tokenizer.HuggingFace(
        sentencepiece().to_str(), Special({"bos": "<s>", "eos": "</s>"})
    ),
}
ALL = EXACT | {
    "wordpiece": tokenizer.HuggingFace(wordpiece().to_str(), Special({"eos": "[EOS]"})),
    "word ends": tokenizer.HuggingFace(word_ends().to_str(), Special({"eos": "</s>"})),
    "unigram": tokenizer.HuggingFace(
        unigram().to_str(),
        Special({"bos": "<s>", "eos": "</s>"}),
        "data.tokenizer='x.json'",
    ),
    "ctc": tokenizer.HuggingFace(ctc().to_str(), Special({"eos": "</s>"})),
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


@every
@fast
@given(data=st.data())
def test_a_stream_after_a_prompt_gives_what_the_ids_add_to_its_text(tok, data):
    ids = data.draw(st.lists(st.integers(0, tok.size + 5), max_size=30))
    start = data.draw(st.integers(0, len(ids)))
    check_stream_after(tok, ids[:start], ids[start:])


@exact
@pytest.mark.parametrize("text", ["the 東🙂", "🙂é\ufffd", "東\U0010ffff\u0800"])
def test_a_stream_after_every_beginning_of_a_text(tok, text):
    """Also where a prompt ends inside a character, and other ids follow."""
    ids = tok.encode(text)
    for start in range(len(ids) + 1):
        given_text = check_stream_after(tok, ids[:start], ids[start:])
        whole = tok.decode(ids[:start]).rstrip("\ufffd")
        assert whole + given_text == text or "\ufffd" in text
        for other in [tok.encode("a"), ids, ids[::-1], []]:
            check_stream_after(tok, ids[:start], other)


def check_stream_after(tok, prompt, ids):
    """The text is exact, and each character comes with its last byte."""
    stream, given_text = tok.stream(after=prompt), ""
    for end, token in enumerate(ids, 1):
        given_text += stream.push(token)
        assert text_after(tok, prompt, ids[:end]).startswith(given_text)
        assert len(text_after(tok, prompt, ids[:end])) - len(given_text) <= 1
    given_text += stream.flush()
    assert given_text == text_after(tok, prompt, ids)
    return given_text


@pytest.mark.parametrize("second", range(0x7F, 0xC1))
@pytest.mark.parametrize("first", [0xC1, 0xC2, 0xE0, 0xED, 0xEE, 0xF0, 0xF4, 0xF5])
def test_two_bytes_that_begin_a_character_or_cannot(first, second):
    """Python's incremental decoder waits after the half of a surrogate (ED A0)."""
    tok, ids = tokenizer.ByteTokenizer(), [0x61, first, second, 0x62]
    for start in range(4):
        for end in range(start, 5):
            check_stream_after(tok, ids[:start], ids[start:end])


@pytest.mark.parametrize("name", ["bpe", "wordpiece", "word ends", "unigram", "ctc"])
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
    # The post-processor of this tokenizer adds no bos.
    wordpiece = ALL["wordpiece"]
    assert wordpiece.prompt("the") == wordpiece.encode("the")


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


@pytest.mark.parametrize("size", [258, 10**7 + 1, 2**31 - 1, 10**20])
def test_vocab_size_too_small_or_too_large(size):
    with pytest.raises(
        ValueError, match=f"vocab_size={size} is not accepted: it must be at least 259"
    ):
        tokenizer.train(TEXTS, size)


def test_a_vocabulary_may_be_larger_than_the_texts_need():
    assert tokenizer.train(TEXTS, 259).size == 259
    assert tokenizer.train(TEXTS, 10**6).size < 10**5
    assert tokenizer.train(TEXTS, 259).size == 259


# ------------------------------------------------------------------ unusual tokenizers


def test_words_that_end_in_a_suffix_are_decoded_with_spaces():
    tok = ALL["word ends"]
    ids = tok.encode("the cat cat sat")
    assert tok.decode(ids) == "the cat cat sat"
    stream = tok.stream()
    texts = [stream.push(token) for token in ids]
    # A space is decoded with the token after it.
    assert texts == ["th", "e", " c", "a", "t", " c", "a", "t", " s", "a", "t"]


@pytest.mark.parametrize("names", [{"bos": "<s>", "eos": "</s>"}, {"eos": "</s>"}])
def test_an_empty_prompt_is_the_begin_token_or_else_the_end_token(names):
    library_tokenizer = tokenizers.Tokenizer(models.BPE(tokenizer.byte_alphabet(), []))
    library_tokenizer.add_special_tokens(["<s>", "</s>"])
    library_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok = tokenizer.HuggingFace(library_tokenizer.to_str(), Special(names))
    assert tok.prompt("") == [256 if "bos" in names else 257]
    assert tok.prompt("a") == tok.encode("a")  # its post-processor adds no token


@every
def test_no_prompt_is_empty(tok):
    assert tok.prompt("") == [tok.bos]


def test_a_character_that_a_tokenizer_has_no_token_for_is_an_error_of_one_line():
    tok = ALL["unigram"]
    assert tok.decode(tok.encode("the cats")) == "the cats"
    for call in (tok.encode, tok.prompt, lambda text: tok.encode_batch(["a", text])):
        with pytest.raises(ConfigError) as error:
            call("the 東")
        message = str(error.value)
        assert message.startswith("data.tokenizer='x.json' cannot encode")
        assert "unk_id" in message and "\n" not in message


def test_a_tokenizer_with_dropout_gives_the_same_ids_every_time(tmp_path):
    values = json.loads(ALL["bpe"].tokenizer_json())
    values["model"]["dropout"] = 0.5
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(values))
    tok, text = tokenizer.load(str(path)), "the cats and the dogs " * 20
    assert tok.encode(text) == tok.prompt(text, bos=False) == ALL["bpe"].encode(text)


def test_a_panic_of_the_library_is_an_error_of_one_line(tmp_path, capfd):
    """The library cuts a prefix off each merge, and panics if the merge is shorter."""
    library_tokenizer = json.loads(ALL["bpe"].tokenizer_json())
    library_tokenizer["model"]["continuing_subword_prefix"] = "#" * 400
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(library_tokenizer))
    with pytest.raises(ConfigError) as error:
        tokenizer.load(str(path))
    message = str(error.value)
    assert message.startswith(f"data.tokenizer={str(path)!r} is not accepted: ")
    assert "out of range" in message and "\n" not in message
    assert capfd.readouterr().err == ""


def test_an_interrupt_is_not_taken_for_an_error_of_the_library(monkeypatch):
    def interrupt(text):
        raise KeyboardInterrupt

    monkeypatch.setattr(tokenizers.Tokenizer, "from_str", interrupt)
    with pytest.raises(KeyboardInterrupt):
        tokenizer.from_json(ALL["bpe"].to_json())


def test_what_is_written_to_stderr_while_a_tokenizer_loads_is_not_lost(
    monkeypatch, capfd
):
    from_str = tokenizers.Tokenizer.from_str

    def warn(text):
        os.write(2, b"a warning")
        return from_str(text)

    monkeypatch.setattr(tokenizers.Tokenizer, "from_str", warn)
    tokenizer.from_json(ALL["bpe"].to_json())
    assert capfd.readouterr().err == "a warning"
