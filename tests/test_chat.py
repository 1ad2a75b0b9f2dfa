"""Conversations: which tokens count, which rows are read, how they are packed."""

import dataclasses
import json
import re

import chat_templates
import numpy as np
import pytest
from helpers import write_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from ladder_jax.config import ConfigError, Data
from ladder_jax.data import chat, chat_rows, chat_template, corpus, packing, tokenizer
from ladder_jax.data.batches import held_out_batches, train_iterator
from ladder_jax.data.chat import ChatEncoder
from ladder_jax.data.chat_rows import Unusable
from ladder_jax.data.formats import Tally

BYTES = tokenizer.ByteTokenizer()


def turns(*contents, system=None):
    """Messages of the user and the assistant in turns."""
    roles = ("user", "assistant") * len(contents)
    first = [dict(role="system", content=system)] if system else []
    return first + [dict(role=r, content=c) for r, c in zip(roles, contents)]


def encode(tok, messages, train_on="assistant"):
    encoder = ChatEncoder(tok, chat.TRAINING_DATE)
    [encoded] = encoder.encode([encoder.find_answers(messages, train_on)])
    return encoded


def counted_texts(tok, encoded):
    """The text of each run of ids that count, which must end in a special token."""
    runs, run = [], []
    for id, counts in zip([*encoded.ids, tok.bos], [*encoded.counted, False]):
        if counts:
            run.append(id)
        elif run:
            assert tok.token_bytes(run[-1], None) is None, "it does not end the turn"
            runs.append(tok.decode(run))
            run = []
    return runs


TOKENIZERS = {
    f"{name}-{kind}-{'bos' if adds_bos else 'plain'}": (template, kind, adds_bos)
    for name, template in chat_templates.TEMPLATES.items()
    for kind in chat_templates.KINDS
    for adds_bos in (False, True)
}
TOKENIZERS |= {"own": (None, "byte_level", False)}


def make_tokenizer(name):
    return BYTES if name == "bytes" else chat_templates.make(*TOKENIZERS[name])


# ---------------------------------------------------------------- which tokens count

content = st.text("ab 1\n<|é\U0001f600:#'", min_size=1, max_size=12).filter(str.strip)


@pytest.mark.parametrize("name", ["bytes", *TOKENIZERS])
@settings(max_examples=15, deadline=None)
@given(contents=st.lists(content, min_size=2, max_size=6))
def test_what_counts_is_the_answers_and_the_ends_of_their_turns(name, contents):
    tok = make_tokenizer(name)
    messages = turns(*contents)
    encoded = encode(tok, messages)
    answers = [m["content"].strip() for m in messages if m["role"] == "assistant"]
    seen = counted_texts(tok, encoded)
    assert [text.strip() for text in seen] == answers
    assert encoded.ids.count(tok.bos) <= 1 or tok is BYTES
    [last] = counted_texts(tok, encode(tok, messages, "last"))
    assert last.strip() == answers[-1]
    everything = encode(tok, messages, "all")
    if messages[-1]["role"] == "user":  # nothing is learnt from it
        assert encoded.ids == encode(tok, messages[:-1]).ids
    assert everything.ids == encoded.ids and not everything.counted[0]
    assert sum(everything.counted) >= len(everything.ids) - 2  # bos, a last line end


@pytest.mark.parametrize("name", ["bytes", *TOKENIZERS])
def test_the_mask_is_that_of_a_slow_walk_over_characters(name):
    """Finds answers by their text, which occurs once; a token counts if one of its
    characters does, found by decoding longer and longer beginnings."""
    tok = make_tokenizer(name)
    messages = turns("one?", "alpha beta", "two,\nthree?", "gamma: 42\ndelta")
    encoder = ChatEncoder(tok, chat.TRAINING_DATE)
    text = encoder.template.render(messages).text
    end = re.search(r"alpha beta(<[^>]*>)", text)[1]
    answers = []
    for message in messages[1::2]:
        start = text.index(message["content"])
        answers.append((start, start + len(message["content"] + end)))
    encoded = encode(tok, messages)
    ids = encoded.ids[1:] if encoded.ids[0] == tok.bos else encoded.ids
    pieces, position = [], 0
    while position < len(text):
        special = re.match("|".join(map(re.escape, specials(tok))), text[position:])
        size = len(special[0]) if special else 1
        pieces.append((position, position + size))
        position += size
    # Every character (or special token) of an answer is in some id that counts, and
    # every id that counts has one: the texts of both are equal.
    wanted = "".join(
        text[a:b] if b - a == 1 else "|"
        for a, b in pieces
        if any(a < stop and b > start for start, stop in answers)
    )
    counted = encoded.counted[len(encoded.ids) - len(ids) :]
    seen = ""
    for id, counts in zip(ids, counted):
        if counts:
            is_special = tok.token_bytes(id, None) is None
            seen += "|" if is_special else tok.token_bytes(id, id).decode()
    spaces = str.maketrans("", "", " ")  # a space may join the token after it
    assert seen.translate(spaces) == wanted.translate(spaces)


def specials(tok):
    return list(tok.special.names.values()) if tok is BYTES else chat_templates.SPECIAL


@pytest.mark.parametrize("kind", chat_templates.KINDS)
@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("written", [0, 1, 2])
def test_there_is_one_bos_however_template_and_tokenizer_disagree(
    kind, adds_bos, written
):
    template = "{{ bos_token }}" * written + chat_templates.CHATML
    tok = chat_templates.make(template, kind, adds_bos)
    expected = [tok.bos] if written or adds_bos else []
    for ids in (
        encode(tok, turns("q", "a")).ids,
        ChatEncoder(tok).prompt("q"),
    ):
        assert ids[: len(expected)] == expected and ids.count(tok.bos) == len(expected)


def test_eos_ends_a_turn_that_the_template_does_not_end():
    tok = chat_templates.make(chat_templates.PLAIN_TEXT)
    encoded = encode(tok, turns("q", "one", "q", "two"))
    counted = [id for id, counts in zip(encoded.ids, encoded.counted) if counts]
    assert counted[-1] == encoded.ids[-1] == tok.eos
    assert tok.decode(counted) == "one\ntwo\n"


def test_the_end_of_a_turn_behind_a_generation_block_counts():
    template = (
        "{% for m in messages %}{{ m.role }}:{% generation %}{{ m.content }}"
        "{% endgeneration %}{{ eos_token }}{% endfor %}"
    )
    tok = chat_templates.make(template)
    messages = [dict(role="assistant", content="abc")]
    encoded = encode(tok, messages)
    assert counted_texts(tok, encoded) == ["abc"]
    assert encoded.bytes == 3


def test_a_template_that_changes_earlier_turns_accepts_the_last_one():
    tok = chat_templates.make(chat_templates.THINKING)
    with pytest.raises(Unusable, match="changes earlier turns"):
        encode(tok, turns("q", "one", "q", "two"))
    [text] = counted_texts(tok, encode(tok, turns("q", "one", "q", "two"), "last"))
    assert text == "<think>\n\n</think>\n\ntwo"


def test_generation_blocks_of_the_last_answer_alone():
    tok = chat_templates.make(chat_templates.GENERATION)
    messages = [*turns("q", "one", "q", "two"), dict(role="assistant", content="three")]
    assert counted_texts(tok, encode(tok, messages, "last")) == ["three"]
    assert counted_texts(tok, encode(tok, messages)) == ["one", "two", "three"]


def test_training_has_one_date_and_a_prompt_todays():
    tok = chat_templates.make(chat_templates.LLAMA3)
    assert "Today: 26 Jul 2024" in tok.decode(encode(tok, turns("q", "a")).ids)
    assert "26 Jul 2024" not in tok.decode(ChatEncoder(tok).prompt("q"))


@pytest.mark.parametrize(
    "template, end",
    [
        (chat_templates.LLAMA3, "<|eot_id|>"),
        (chat_templates.CHATML, "<|im_end|>"),
        (chat_templates.PLAIN_TEXT, "</s>"),
        ("{{ raise_exception('no') }}", "</s>"),
    ],
)
def test_an_answer_ends_at_the_end_of_a_turn_and_at_eos(template, end):
    tok = chat_templates.make(template)
    [[end_id], _] = tok.encode_rendered([end])[0]
    assert ChatEncoder(tok).end_ids == tuple(dict.fromkeys([end_id, tok.eos]))


def test_the_default_template_suits_the_vocabulary():
    assert chat_template.default_template(BYTES) == chat_template.PLAIN
    tok = chat_templates.make(None)
    assert chat_template.default_template(tok) == chat_template.CHATML


@pytest.mark.parametrize(
    "template, message",
    [
        ("{% for %}", "not a valid Jinja template: .*line 1"),
        ("{% generation %}", "not a valid Jinja template"),
    ],
)
def test_a_template_that_is_not_valid_is_one_line(template, message):
    with pytest.raises(ConfigError, match=message) as caught:
        ChatEncoder(chat_templates.make(template))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "template, reason",
    [
        ("{{ raise_exception('not\nso') }}", "not so"),
        ("{{ messages[7].content }}", "no element 7"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages.append(1) }}", "not safely callable|unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ 'x' + none }}", "can only concatenate"),
    ],
)
def test_what_a_template_raises_is_one_line(template, reason):
    encoder = ChatEncoder(chat_templates.make(template))
    with pytest.raises(ConfigError, match=reason) as caught:
        encoder.prompt("a question")
    assert "\n" not in str(caught.value)


def test_without_jinja2_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    chat_template._environment.cache_clear()
    with pytest.raises(ConfigError, match=r"pip install 'ladder_jax\[hf\]'"):
        ChatEncoder(BYTES)
    chat_template._environment.cache_clear()


# ---------------------------------------------------------------- rows

USER, ASSISTANT = dict(role="user", content="q"), dict(role="assistant", content="a")
GOOD = {
    "messages": dict(messages=[USER, ASSISTANT]),
    "more fields": dict(
        messages=[USER | dict(name=None, tool_calls=None), ASSISTANT], id=7, tools=[]
    ),
    "parts": dict(
        messages=[dict(role="user", content=[dict(type="text", text="q")]), ASSISTANT]
    ),
    "sharegpt": dict(
        conversations=[{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    ),
    "conversations with roles": dict(conversations=[USER, ASSISTANT]),
    "JSON in a string": dict(messages=json.dumps([USER, ASSISTANT])),
    "completion": dict(prompt="q", completion="a"),
    "lists": dict(prompt=[USER], completion=[ASSISTANT]),
    "response": dict(prompt="q", response="a", messages=None),
    "alpaca": dict(instruction="q", input="", output="a"),
    "alpaca without input": dict(instruction="q", output="a"),
    "dolly": dict(instruction="q", context=" ", response="a"),
}
BAD = [
    (dict(title="no chat"), chat_rows.NO_MESSAGES),
    (dict(messages=[]), chat_rows.NO_MESSAGES),
    (dict(messages=None), chat_rows.NO_MESSAGES),
    ([USER, ASSISTANT], chat_rows.NO_MESSAGES),
    ("text", chat_rows.NO_MESSAGES),
    (dict(prompt="q"), chat_rows.NO_MESSAGES),
    (dict(messages="text"), chat_rows.NOT_MESSAGES),
    (dict(messages=["q", "a"]), chat_rows.NOT_MESSAGES),
    (dict(messages={"role": "user"}), chat_rows.NOT_MESSAGES),
    (dict(messages=7), chat_rows.NOT_MESSAGES),
    (dict(messages=[USER]), chat_rows.NO_ANSWER),
    (dict(messages=[dict(content="q"), ASSISTANT]), chat_rows.NO_ROLE),
    (dict(messages=[dict(role="pirate", content="q"), ASSISTANT]), chat_rows.NO_ROLE),
    (dict(messages=[dict(role=["user"], content="q"), ASSISTANT]), chat_rows.NO_ROLE),
    (dict(messages=[USER, dict(role="assistant", content=None)]), chat_rows.NOT_TEXT),
    (dict(messages=[USER, dict(role="assistant")]), chat_rows.NOT_TEXT),
    (dict(messages=[USER, dict(role="assistant", content=4.5)]), chat_rows.NOT_TEXT),
    (dict(messages=[USER, dict(role="assistant", content={})]), chat_rows.NOT_TEXT),
    (dict(prompt=["q"], completion="a"), chat_rows.NOT_TEXT),
    (dict(instruction="q", input=5, output="a"), chat_rows.NOT_TEXT),
    (dict(messages=[USER, dict(role="assistant", content=" \n")]), chat_rows.EMPTY),
    (dict(prompt="", completion="a"), chat_rows.EMPTY),
    (
        dict(messages=[USER, ASSISTANT | dict(tool_calls=[dict(id=1)])]),
        chat_rows.TOOLS,
    ),
    (dict(messages=[USER, dict(role="tool", content="r"), ASSISTANT]), chat_rows.TOOLS),
    (dict(messages=[USER, ASSISTANT], tools=[dict(name="f")]), chat_rows.TOOLS),
    (
        dict(
            messages=[
                dict(role="user", content=[dict(type="image_url", image_url="x")]),
                ASSISTANT,
            ]
        ),
        chat_rows.PICTURES,
    ),
]


@pytest.mark.parametrize("row", GOOD.values(), ids=GOOD)
def test_every_form_of_row_has_the_same_messages(row):
    tally = Tally()
    assert chat_rows.looks_like_chat(row)
    assert chat_rows.to_messages(row, tally) == [USER, ASSISTANT]
    assert not tally.noted and not tally.repaired


def test_the_system_message_and_the_input_of_a_row():
    tally = Tally()
    conversations = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    row = dict(conversations=conversations, system="s")
    assert chat_rows.to_messages(row, tally) == turns("q", "a", system="s")
    row = dict(instruction="q", input="more", output="a")
    assert chat_rows.to_messages(row, tally) == turns("q\n\nmore", "a")


@pytest.mark.parametrize("row, kind", BAD)
def test_a_row_that_cannot_be_used_is_named(row, kind):
    with pytest.raises(Unusable) as caught:
        chat_rows.to_messages(row, Tally())
    assert str(caught.value) == kind


def test_half_of_a_surrogate_pair_is_repaired_and_a_weight_is_noted():
    tally = Tally()
    row = dict(messages=[USER, ASSISTANT | dict(content="\ud800a", weight=0)])
    assert chat_rows.to_messages(row, tally)[1]["content"] == "\ufffda"
    assert tally.repaired == 1 and tally.noted == {chat_rows.FLAGGED: 1}


# ---------------------------------------------------------------- a source


@pytest.fixture
def open_corpus(tmp_path):
    def call(source, tok=BYTES, length=None, **fields):
        own = dict(token_cache=str(tmp_path / "cache"), held_out_fraction=0.5)
        opened = corpus.prepare(Data(source=str(source), **own | fields), tok)
        return opened if length is None else opened.cut(length)

    return call


def conversations(side):
    """(ids, counted) of each conversation of a side."""
    return [
        (side.ids[a : a + n + 1].tolist(), side.counted[a : a + n + 1].tolist())
        for a, n in zip(side.starts_D, side.targets_D)
    ]


def both(opened):
    return sorted(conversations(opened.train) + conversations(opened.held_out))


def exchanges(count):
    return [turns(f"question {i}?", f"answer {'x' * (i % 7)}{i}") for i in range(count)]


FORMATS = {
    "a.jsonl": lambda ms: "".join(json.dumps(dict(messages=m)) + "\n" for m in ms),
    "a": lambda ms: "".join(json.dumps(dict(messages=m)) + "\n" for m in ms),
    "a.json": lambda ms: json.dumps(
        [dict(instruction=m[0]["content"], output=m[1]["content"]) for m in ms],
        indent=1,
    ),
    "b.json": lambda ms: json.dumps([dict(conversations=m) for m in ms]),
}


@pytest.mark.parametrize("name", [*FORMATS, "a.parquet", "b.parquet"])
def test_every_kind_of_file_has_the_same_conversations(tmp_path, open_corpus, name):
    many = exchanges(30)
    path = tmp_path / name
    if name.endswith(".parquet"):
        import pyarrow
        from pyarrow import parquet

        rows = [dict(messages=m, id=i) for i, m in enumerate(many)]
        if name == "b.parquet":
            rows = [
                dict(prompt=m[0]["content"], completion=m[1]["content"]) for m in many
            ]
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text(FORMATS[name](many))
    opened = open_corpus(path)
    expected = [encode(BYTES, messages)[:2] for messages in many]
    assert both(opened) == sorted(expected)
    assert "left out" not in opened.report
    assert opened.train.tokens == sum(sum(c) for _, c in conversations(opened.train))
    size = sum(len(m[1]["content"]) for m in many)
    assert opened.train.bytes + opened.held_out.bytes == size


def test_bad_rows_are_counted_and_do_not_end_the_run(tmp_path, open_corpus):
    rows = [row for row, _ in BAD] + [dict(messages=m) for m in exchanges(20)]
    path = write_rows(tmp_path / "a.jsonl", rows)
    with open(path, "a") as file:
        file.write("{broken\n\n7\n")
    (tmp_path / "b.txt").write_text("a text")
    opened = open_corpus(tmp_path, format="chat")
    assert len(both(opened)) == 20
    kinds = [kind for _, kind in BAD]
    for kind in set(kinds) - {chat_rows.NO_MESSAGES}:
        assert f"left out: {kinds.count(kind)} {kind}" in opened.report
    for text in (
        f"left out: {kinds.count(chat_rows.NO_MESSAGES) + 1} {chat_rows.NO_MESSAGES}",
        "left out: 1 rows that are not JSON",
        "left out: 1 files without rows",
    ):
        assert text in opened.report, opened.report
    assert open_corpus(tmp_path, format="chat").report == opened.report  # cached


def test_what_the_template_refuses_is_counted(tmp_path, open_corpus):
    tok = chat_templates.make(chat_templates.MISTRAL)
    rows = [dict(messages=m) for m in exchanges(20)]
    rows.append(dict(messages=[USER, USER, ASSISTANT]))
    opened = open_corpus(write_rows(tmp_path / "a", rows), tok)
    assert len(both(opened)) == 20
    assert (
        "left out: 1 conversations that the chat template refuses: Roles must alternate"
    ) in opened.report


@pytest.mark.parametrize(
    "rows, template, message",
    [
        ([dict(messages=[USER])] * 3, None, "3 conversations without an assistant"),
        ([dict(messages=[])] * 2, None, "2 rows without messages.*it must hold rows"),
        (
            [dict(messages=turns("q", "a", "q", "b"))],
            chat_templates.THINKING,
            "changes earlier turns .data.train_on='last' or 'all' may",
        ),
        ([GOOD["messages"]], "{# #}", "makes no text"),
    ],
)
def test_a_source_without_a_usable_conversation_is_one_line(
    tmp_path, open_corpus, rows, template, message
):
    path = write_rows(tmp_path / "a.jsonl", rows)
    with pytest.raises(ConfigError, match=message) as caught:
        open_corpus(path, chat_templates.make(template), format="chat")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").glob("tokens-*"))


def test_auto_is_chat_if_the_first_rows_are(tmp_path, open_corpus):
    (tmp_path / "README.md").write_text("[about] the data")
    rows = [dict(messages=m) for m in exchanges(20)]
    write_rows(tmp_path / "a.jsonl", rows)
    assert open_corpus(tmp_path).train.counted is not None
    # Rows that have the text field are text, as they always were.
    write_rows(tmp_path / "a.jsonl", [row | dict(text=str(row)) for row in rows])
    assert open_corpus(tmp_path).train.counted is None
    assert open_corpus(tmp_path, format="chat").train.counted is not None
    with pytest.raises(ConfigError, match="train_on='last' is not accepted.*text"):
        open_corpus(tmp_path, train_on="last")


def test_caches_differ_by_what_counts_and_by_template(tmp_path, open_corpus):
    rows = [dict(messages=turns(f"q{i}", "a", "b?", "cd")) for i in range(20)]
    path = write_rows(tmp_path / "a.jsonl", rows)
    sizes = [open_corpus(path, train_on=t).train.tokens for t in ("all", "last")]
    assert sizes[0] > open_corpus(path).train.tokens > sizes[1]
    digests = set()
    for template in (chat_templates.CHATML, chat_templates.DEFAULT_SYSTEM):
        opened = open_corpus(path, chat_templates.make(template))
        digests.add(opened.digest)
        text = chat_templates.make(template).decode(opened.train.ids[:].tolist())
        assert ("default" in text) == (template == chat_templates.DEFAULT_SYSTEM)
    assert len(digests) == 2


def test_the_tokenizer_is_trained_on_the_messages_of_the_training_side(
    tmp_path, open_corpus
):
    path = write_rows(tmp_path / "a", [dict(messages=m) for m in exchanges(30)])
    texts = list(corpus.documents(Data(source=str(path), held_out_fraction=0.5)))
    assert len(texts) == len(open_corpus(path).train.starts_D)
    assert all(text.startswith("question") and "\nanswer" in text for text in texts)


# ---------------------------------------------------------------- cut, packed


def make_side(sizes, counted=None):
    """Conversations of these numbers of targets, with ids that count up."""
    stops = np.cumsum(np.array(sizes) + 1)
    if counted is None:
        counted = np.ones(stops[-1], np.uint8)
    ids = np.arange(100, 100 + stops[-1]).astype(np.uint32)
    starts = stops - np.array(sizes) - 1
    return corpus.Side(ids, starts, np.array(sizes), 1000, 0, counted)


def test_a_long_conversation_is_cut_and_a_useless_one_left_out():
    counted = np.concatenate(
        [[0, 1, 1], [0, 0, 0, 0, 1], [0, 1, 0, 1, 1]]  # 2, 4 and 4 targets
    ).astype(np.uint8)
    side = make_side([2, 4, 4], counted)
    short, notes = side.cut(3)
    assert short.targets_D.tolist() == [2, 3] and short.tokens == 4
    assert short.bytes == round(1000 * 4 / 6)
    assert notes == [
        "2 of 6 tokens that count cut off",
        "1 conversations cut after 3 tokens",
        "1 conversations left out, as none of their first 3 tokens counts",
    ]
    assert side.cut(4) == (side, []) and short.cut(3) == (short, [])
    whole = corpus.Corpus(side, make_side([5]), "digest", "report")
    assert "train: 1 conversations cut after 3 tokens" in whole.cut(3).report
    none = dataclasses.replace(side, counted=np.array([0] * 12 + [1], np.uint8))
    with pytest.raises(ConfigError, match="train.seq_len=2 is not accepted"):
        dataclasses.replace(whole, train=none).cut(2)


sizes = st.lists(st.integers(1, 12), min_size=1, max_size=30)


@settings(max_examples=60, deadline=None)
@given(sizes=sizes, length=st.integers(12, 20))
def test_best_fit_is_that_of_a_slow_search(sizes, length):
    sizes = np.array(sorted(sizes, reverse=True))
    rooms = []
    for size, row in zip(sizes, packing.best_fit(sizes, length)):
        fits = [room for room in rooms if room >= size]
        if not fits:
            assert row == len(rooms)
            rooms.append(length)
        assert rooms[row] == min(fits, default=length)
        rooms[row] -= size


@settings(max_examples=40, deadline=None)
@given(sizes=sizes, length=st.integers(6, 20), batch=st.integers(1, 3))
def test_an_epoch_has_every_conversation_once_and_whole(sizes, length, batch):
    rng = np.random.default_rng(len(sizes))
    counted = rng.integers(0, 2, sum(sizes) + len(sizes)).astype(np.uint8)
    starts = np.cumsum([0, *(n + 1 for n in sizes[:-1])])
    counted[starts], counted[starts + 1] = 0, 1
    side = make_side(sizes, counted)
    both = corpus.Corpus(side, side, "digest", "report")
    rows = packing.WholeRows(side, length, 0)
    expected = sorted(
        (side.ids[s : s + n + 1].tolist(), counted[s + 1 : s + n + 1].tolist())
        for s, n in zip(side.starts_D, np.minimum(sizes, length))
    )
    epochs = [[rows[i + e * len(rows)] for i in range(len(rows))] for e in range(2)]
    held_out = held_out_batches(both, batch=batch, length=length)
    epochs.append(
        [{k: v[b] for k, v in one.items()} for one in held_out for b in range(batch)]
    )
    for epoch in epochs:
        seen = []
        for row in epoch:
            assert not row["weights"][row["segments"] == 0].any()
            for segment in range(1, row["segments"].max() + 1):
                at = np.flatnonzero(row["segments"] == segment)
                assert row["positions"][at].tolist() == list(range(len(at)))
                assert (np.diff(at) == 1).all()
                ids = [row["tokens"][at[0]], *row["targets"][at]]
                assert row["tokens"][at].tolist() == ids[:-1]
                seen.append((ids, row["weights"][at].astype(int).tolist()))
        assert sorted(seen) == expected
    iterator = train_iterator(both, batch=batch, length=length, seed=3)
    state = iterator.get_state()
    first = [next(iterator) for _ in range(3)]
    iterator.set_state(state)
    for one in first:
        np.testing.assert_array_equal(one["tokens"], next(iterator)["tokens"])


def test_epochs_put_other_conversations_of_a_length_together():
    rows = packing.WholeRows(make_side([4] * 40), 8, seed=0)
    pairs = [
        frozenset(row["tokens"][row["positions"] == 0].tolist())
        for row in (rows[i] for i in range(2 * len(rows)))
    ]
    assert len(rows) == 20 and set(pairs[:20]) != set(pairs[20:])
