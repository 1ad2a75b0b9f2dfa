"""Bos in the post-processor of a tokenizer.json, beside what was there before."""

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from ladder_jax.data.post_processor import set_bos
from ladder_jax.data.tokenizer import byte_alphabet

BOS, EOS, CLS = 256, 257, 258
A, B = [97], [98]


def template(single, pair, *names):
    ids = {"<s>": BOS, "</s>": EOS, "[C]": CLS}
    special = [(name, ids[name]) for name in names]
    return processors.TemplateProcessing(single, pair, special)


# Each with what it makes of a text and of a pair, without bos.
PLAIN = {
    "none": (None, A, A + B),
    "bytes": (processors.ByteLevel(), A, A + B),
    "eos": (
        template("$A </s>", "$A </s> $B:1 </s>:1", "</s>"),
        [*A, EOS],
        [*A, EOS, *B, EOS],
    ),
    "bytes and eos": (
        processors.Sequence(
            [
                processors.ByteLevel(),
                template("$A </s>", "$A $B:1 </s>:1", "</s>"),
            ]
        ),
        [*A, EOS],
        [*A, *B, EOS],
    ),
    "bert": (
        processors.BertProcessing(("</s>", EOS), ("[C]", CLS)),
        [CLS, *A, EOS],
        [CLS, *A, EOS, *B, EOS],
    ),
}
# Each with what remains when bos is taken away.
WITH_BOS = {
    "template": (template("<s> $A", "<s> $A <s>:1 $B:1", "<s>"), A, A + B),
    "both": (
        template("<s> $A </s>", "<s> $A </s> $B:1 </s>:1", "<s>", "</s>"),
        [*A, EOS],
        [*A, EOS, *B, EOS],
    ),
    "llama 3": (
        processors.Sequence(
            [processors.ByteLevel(), template("<s> $A", "<s> $A <s>:1 $B:1", "<s>")]
        ),
        A,
        A + B,
    ),
    "bert": (
        processors.BertProcessing(("</s>", EOS), ("<s>", BOS)),
        [*A, EOS],
        [*A, EOS, *B, EOS],
    ),
    "roberta": (
        processors.RobertaProcessing(("</s>", EOS), ("<s>", BOS)),
        [*A, EOS],
        [*A, EOS, EOS, *B, EOS],
    ),
}


def with_processor(processor):
    """A tokenizer of bytes."""
    made = tokenizers.Tokenizer(models.BPE(byte_alphabet(), []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens(["<s>", "</s>", "[C]"])
    if processor is not None:
        made.post_processor = processor
    return made.to_str()


def ids_of(text):
    made = tokenizers.Tokenizer.from_str(text)
    return made.encode("a").ids, made.encode("a", "b").ids


@pytest.mark.parametrize("kind", PLAIN)
def test_bos_comes_before_what_the_processor_does(kind):
    processor, single, pair = PLAIN[kind]
    before = with_processor(processor)
    assert ids_of(before) == (single, pair)
    assert set_bos(before, "<s>", False) == before
    after = set_bos(before, "<s>", True)
    got, got_pair = ids_of(after)
    assert got == [BOS, *single]
    where = got_pair.index(B[0])
    assert got_pair[0] == got_pair[where - 1] == BOS
    assert [x for x in got_pair if x != BOS] == pair
    assert set_bos(after, "<s>", True) == after
    assert ids_of(set_bos(after, "<s>", False)) == (single, pair)


@pytest.mark.parametrize("kind", WITH_BOS)
def test_bos_goes_and_the_rest_stays(kind):
    processor, single, pair = WITH_BOS[kind]
    before = with_processor(processor)
    assert ids_of(before)[0] == [BOS, *single]
    assert set_bos(before, "<s>", True) == before
    after = set_bos(before, "<s>", False)
    assert ids_of(after) == (single, pair)
