"""Tokenizers of SentencePiece that are trained here, against the library itself."""

import random

import pytest
import tokenizers

from ladder_jax.data import python_docs
from ladder_jax.data.sentencepiece_file import tokenizer_json

sentencepiece = pytest.importorskip("sentencepiece")

OPTIONS = {
    "llama": dict(byte_fallback=True, split_digits=True),
    "no bytes": dict(byte_fallback=False),
    "no space in front": dict(byte_fallback=True, add_dummy_prefix=False),
    "words with spaces": dict(byte_fallback=True, split_by_whitespace=False),
}


@pytest.fixture(scope="module")
def texts():
    path = next(x for x in python_docs.files() if x.name == "argparse.py")
    lines = "\n".join(python_docs.read_file(path)).splitlines()
    return [
        *lines,
        *["été naïve 你好 Привет 🙂", "ababab aaaa banana", "    four"] * 20,
    ]


@pytest.mark.parametrize("name", OPTIONS)
def test_ids_are_those_of_sentencepiece(name, texts, tmp_path):
    path = tmp_path / "tokenizer.model"
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([text for text in texts if text.strip()]),
            model_writer=file,
            model_type="bpe",
            vocab_size=700,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=2,
            **OPTIONS[name],
        )
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ours = tokenizers.Tokenizer.from_str(tokenizer_json(path, {}))
    drawn = random.Random(0)
    letters = "ab aA1.\n\t▁é你🙂 n(s"
    cases = [
        "".join(drawn.choices(letters, k=drawn.randrange(40))) for _ in range(2000)
    ]
    for text in [*texts, *cases]:
        assert ours.encode(text).ids == theirs.encode(text, add_bos=True), text
