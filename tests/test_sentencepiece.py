"""SentencePiece's BPE gives SentencePiece's ids, from tokenizer.model and from GGUF.

data/sentencepiece holds a model that sentencepiece 0.2.3 trained on this project's
documentation, and its ids of some texts. tests/hf compares with the library itself.
"""

import json
import random
import struct
from pathlib import Path

import foreign_folder as foreign
import pytest
import tokenizers

import ladder_jax
from ladder_jax.config import ConfigError
from ladder_jax.convert import gguf_tokenizer
from ladder_jax.data import sentencepiece_file
from ladder_jax.data.sentencepiece_bpe import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    USER_DEFINED,
    Piece,
    tokenizer_of,
)

DATA = Path(__file__).parent / "data" / "sentencepiece"
ROWS = [json.loads(line) for line in (DATA / "ids.jsonl").read_text().splitlines()]
NO_BOS = dict(add_bos_token=False)


def reference(pieces, text):
    """SentencePiece's algorithm, for reading: the best pair, the leftmost of equals."""
    ids = {piece.text: i for i, piece in enumerate(pieces)}
    scores = {piece.text: piece.score for piece in pieces if piece.type == NORMAL}
    parts = list(SPACE + text.replace(" ", SPACE)) if text else []
    while True:
        pairs = [a + b for a, b in zip(parts, parts[1:])]
        found = [(-scores[x], i) for i, x in enumerate(pairs) if x in scores]
        if not found:
            break
        i = min(found)[1]
        parts[i : i + 2] = [pairs[i]]
    result = []
    for part in parts:
        if part in scores:
            result.append(ids[part])
        else:
            result += [ids[f"<0x{byte:02X}>"] for byte in part.encode()]
    return result


def vocabulary(words, scores=None):
    """Special tokens, bytes, and these words, the first ones with the best scores."""
    special = [("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL)]
    pieces = [Piece(text, 0.0, kind) for text, kind in special]
    pieces += [Piece(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    scores = scores or [-float(i) for i in range(len(words))]
    return pieces + [Piece(*row, NORMAL) for row in zip(words, scores)]


def random_words(seed, letters="ab" + SPACE):
    """Words that pairs of earlier ones make, in a random order of scores."""
    drawn = random.Random(seed)
    words = list(letters)
    while len(words) < 40:
        word = drawn.choice(words) + drawn.choice(words)
        if word not in words and len(word) < 9:
            words.append(word)
    return words


@pytest.mark.parametrize("seed", range(8))
def test_random_vocabularies_give_the_ids_of_the_plain_algorithm(seed):
    """Words are in the order in which training finds them, as in every real file."""
    pieces = vocabulary(random_words(seed))
    made = tokenizer_of(pieces, "it", prefix=True)
    drawn = random.Random(seed)
    texts = [
        "".join(drawn.choices("aab 🙂", k=drawn.randrange(30))) for _ in range(400)
    ]
    other = [text for text in texts if made.encode(text).ids != reference(pieces, text)]
    # A word that overlaps itself, made of other parts: see sentencepiece_bpe.
    assert len(other) <= len(texts) // 100, other[:3]
    assert all(made.decode(made.encode(text).ids) == text for text in texts)


def test_a_file_gives_the_ids_of_sentencepiece():
    text = sentencepiece_file.tokenizer_json(DATA / "tokenizer.model", NO_BOS)
    made = tokenizers.Tokenizer.from_str(text)
    assert len(ROWS) > 100
    for words, ids in ROWS:
        assert made.encode(words).ids == ids, words
        assert made.decode(ids) == words.replace(SPACE, " ")
    with_bos = sentencepiece_file.tokenizer_json(DATA / "tokenizer.model", {})
    both = tokenizers.Tokenizer.from_str(with_bos).encode("hi<|user|>").tokens
    assert both[0] == "<s>" and both[-1] == "<|user|>"


def test_gguf_metadata_give_the_same_ids():
    pieces, _, _ = sentencepiece_file._read((DATA / "tokenizer.model").read_bytes())
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [piece.text for piece in pieces],
        "tokenizer.ggml.scores": [piece.score for piece in pieces],
        "tokenizer.ggml.token_type": [piece.type for piece in pieces],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 0,
    }
    made = gguf_tokenizer.texts(metadata, len(pieces), "m.gguf")
    encode = tokenizers.Tokenizer.from_str(made["tokenizer.json"]).encode
    for words, ids in ROWS:
        assert encode(words).ids == [1, *ids], words
    assert json.loads(made["tokenizer_config.json"])["add_bos_token"] is True
    for changes, message in (
        ({"tokenizer.ggml.scores": [1.0]}, "no score of every token"),
        ({"tokenizer.ggml.remove_extra_whitespaces": True}, "remove_extra_whitespaces"),
        ({"tokenizer.ggml.precompiled_charsmap": [1, 2]}, "precompiled_charsmap"),
    ):
        with pytest.raises(ConfigError, match=message) as error:
            gguf_tokenizer.texts(metadata | changes, len(pieces), "m.gguf")
        assert "\n" not in str(error.value)


def test_a_folder_with_tokenizer_model_alone_is_imported(tmp_path):
    folder = tmp_path / "model"
    foreign.write(folder, tokens=False, vocab_size=600, bos_token_id=1, eos_token_id=2)
    data = (DATA / "tokenizer.model").read_bytes()
    (folder / "tokenizer.model").write_bytes(data)
    loaded = ladder_jax.load_hf(folder)
    words, ids = ROWS[0]
    assert loaded.tokenizer.prompt(words) == [1, *ids]
    assert (loaded.tokenizer.bos, loaded.tokenizer.eos) == (1, 2)
    ladder_jax.save_hf(loaded, tmp_path / "back")
    assert ladder_jax.load_hf(tmp_path / "back").tokenizer.prompt(words) == [1, *ids]


# ---------------------------------------------------------------- what is refused


def varint(value):
    data = b""
    while value > 127:
        data, value = data + bytes([value & 127 | 128]), value >> 7
    return data + bytes([value])


def field(number, value):
    """A field of a message of Protocol Buffers."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def message(pieces, trainer=((3, 2),), normalizer=((4, 0),)):
    """A file of SentencePiece: BPE that keeps spaces, unless told otherwise."""
    rows = (
        field(1, piece.text.encode()) + field(2, piece.score) + field(3, piece.type)
        for piece in pieces
    )
    return (
        b"".join(field(1, row) for row in rows)
        + field(2, b"".join(field(*pair) for pair in trainer))
        + field(3, b"".join(field(*pair) for pair in normalizer))
    )


WORDS = vocabulary(["ab", "a", "b", SPACE])


@pytest.mark.parametrize(
    "data, says",
    [
        (message(WORDS, trainer=[(3, 1)]), "unigram"),
        (message(WORDS, normalizer=[(4, 0), (2, b"rules")]), "change characters"),
        (message(WORDS, normalizer=[]), "removes spaces"),
        (message(WORDS, normalizer=[(4, 0), (5, 0)]), "keeps spaces as they are"),
        (message(WORDS, trainer=[(3, 2), (24, 1)]), "spaces after words"),
        (message(WORDS[:-4]), "it is not BPE"),
        (message([*WORDS, WORDS[-1]]), "twice"),
        (message([*WORDS, Piece("<u>", 0.0, UNKNOWN)]), "2 unknown tokens"),
        (message(WORDS[:3] + WORDS[4:]), "none of <0x00>"),
        (message([*WORDS, Piece("▁x", 0.0, USER_DEFINED)]), "it has a space"),
        (b"", "is damaged"),
        (b"\x0a\xff\x05", "is damaged"),
        (b"\xff" * 40, "is damaged"),
        (field(1, 7), "is damaged"),
        (field(1, field(1, b"\xff\xfe")), "is damaged"),
    ],
)
def test_what_is_no_such_file_is_one_line(tmp_path, data, says):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=says) as error:
        sentencepiece_file.tokenizer_json(path, {})
    assert "\n" not in str(error.value)


def test_files_that_are_cut_or_changed_are_one_line_or_read(tmp_path):
    whole, drawn = message(WORDS), random.Random(0)
    path = tmp_path / "tokenizer.model"
    refused = 0
    for _ in range(300):
        data = bytearray(whole[: drawn.randrange(len(whole))])
        if data and drawn.random() < 0.5:
            data = bytearray(whole)
            data[drawn.randrange(len(data))] ^= 1 << drawn.randrange(8)
        path.write_bytes(bytes(data))
        try:
            sentencepiece_file.tokenizer_json(path, {})
        except ConfigError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 150


def test_equal_scores_are_told(caplog):
    tokenizer_of(
        vocabulary(["a", "b", "ab", "ba"], [0.0, 0.0, -1.0, -1.0]), "it", prefix=True
    )
    assert "equal scores" in caplog.text
