"""Prompts of conversations: every style of template, and exactly one begin token."""

import types

import chat_templates
import pytest
from chat_templates import KINDS, TEMPLATES

from ladder_jax.server.chat import encode_messages
from ladder_jax.server.completions import encode_prompt
from ladder_jax.server.errors import APIError
from ladder_jax.server.protocol import ChatRequest
from ladder_jax.server.serving import Served

USER = dict(role="user", content="What is it?")


def make_served(tokenizer):
    """A model without an engine that runs."""
    engine = types.SimpleNamespace(tokenizer=tokenizer, length=1000)
    return Served(engine, "tiny")


def encode(served, messages):
    body = ChatRequest.model_validate(dict(messages=messages))
    return encode_messages(body.messages, served).ids


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", [*TEMPLATES, None])
def test_there_is_one_begin_token_whatever_adds_it(template, kind, adds_bos):
    source = TEMPLATES.get(template)
    tokenizer = chat_templates.make(source, kind, adds_bos)
    served = make_served(tokenizer)
    ids = encode(served, [USER])
    has_bos = adds_bos or "bos_token" in (source or "")
    assert ids.count(tokenizer.bos) == has_bos
    assert ids[:1] == [tokenizer.bos] or not has_bos
    assert "What is it?" in tokenizer.decode(ids)
    for text in ("a text", "<s>a text"):
        prompt = encode_prompt(text, served)
        assert prompt.ids.count(tokenizer.bos) == (adds_bos or "<s>" in text)


def test_an_answer_ends_where_the_template_ends_a_turn():
    tokenizer = chat_templates.make(chat_templates.LLAMA3)
    served = make_served(tokenizer)
    ends = [tokenizer.token_name(id) for id in served.chat_end_ids]
    assert ends == ["<|eot_id|>", "</s>"]


def test_parts_of_text_are_joined_and_a_developer_is_the_system():
    served = make_served(chat_templates.make(chat_templates.CHATML))
    parts = [dict(type="text", text="What "), dict(type="text", text="is it?")]
    plain = [dict(role="system", content="Be brief."), USER]
    assert encode(served, plain) == encode(
        served,
        [
            dict(role="developer", content="Be brief."),
            dict(role="user", content=parts),
        ],
    )


def test_an_answer_of_the_api_can_be_sent_back():
    served = make_served(chat_templates.make(chat_templates.CHATML))
    answer = dict(role="assistant", content="It.", refusal=None, tool_calls=None)
    answer |= dict(annotations=[], audio=None, function_call=None)
    plain = dict(role="assistant", content="It.")
    assert encode(served, [USER, answer, USER]) == encode(served, [USER, plain, USER])


@pytest.mark.parametrize(
    "messages, word",
    [
        ([USER, USER], "alternate"),
        ([dict(role="system", content="x"), USER], "alternate"),
    ],
)
def test_what_the_template_refuses_is_a_mistake_of_the_client(messages, word):
    served = make_served(chat_templates.make(chat_templates.MISTRAL))
    with pytest.raises(APIError, match=word) as error:
        encode(served, messages)
    assert (error.value.status, error.value.param) == (400, "messages")


def test_the_bytes_of_a_prompt_bound_its_tokens_before_it_is_encoded():
    """No token stands for more: a text that passes the limit is certainly too long."""
    for kind in KINDS:
        tokenizer = chat_templates.make(None, kind)
        served = make_served(tokenizer)
        for text in ("a question " * 30, "<|start_header_id|>" * 30, "🙂" * 100):
            ids = tokenizer.prompt(text)
            assert len(text.encode()) <= len(ids) * served.longest_token
        with pytest.raises(APIError, match="at least 1001 tokens"):
            encode_prompt("x" * (served.longest_token * 1000 + 1), served)
