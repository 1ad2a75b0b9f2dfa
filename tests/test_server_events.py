"""The bytes of a stream's events, which are written without pydantic."""

from hypothesis import given
from hypothesis import strategies as st

from ladder_jax.server import protocol, streaming

TEXT = st.text() | st.sampled_from(['"choices":[]', '\\"', "\u2028", "😀", "\x00\x7f"])
FINISH = st.sampled_from([None, "stop", "length"])
USAGE = st.sampled_from([{}, dict(usage=None)])
LOGPROB = st.floats(-100, 0)


@st.composite
def completion_logprobs(draw):
    return protocol.CompletionLogprobs(
        tokens=[draw(TEXT)],
        token_logprobs=[draw(LOGPROB)],
        top_logprobs=[{draw(TEXT): draw(LOGPROB)}],
        text_offset=[draw(st.integers(0, 9))],
    )


@st.composite
def chat_logprobs(draw):
    one = dict(
        token=draw(TEXT), logprob=draw(LOGPROB), bytes=[draw(st.integers(0, 255))]
    )
    top = [protocol.TokenLogprob(**one)]
    content = [protocol.ContentLogprob(**one, top_logprobs=top)]
    return protocol.ChatLogprobs(content=content, refusal=None)


@given(TEXT, TEXT, FINISH, USAGE, st.none() | completion_logprobs(), st.integers(0, 99))
def test_an_event_of_completions_is_what_pydantic_writes(
    model, text, finish, usage, logprobs, index
):
    common = dict(id="cmpl-1", object="text_completion", created=1, model=model)
    choice = protocol.CompletionChoice(
        index=index, text=text, logprobs=logprobs, finish_reason=finish
    )
    expected = protocol.Completion(**common, choices=[choice], **usage)
    events = streaming.Events(protocol.Completion(**common, choices=[], **usage))
    content = streaming.text_json(text)
    written = events.write(index, b"text", content, logprobs, finish)
    assert written == streaming.event(expected)


@given(TEXT, TEXT, FINISH, USAGE, st.none() | chat_logprobs(), st.booleans())
def test_an_event_of_chat_is_what_pydantic_writes(
    model, text, finish, usage, logprobs, is_first
):
    common = dict(id="c-1", object="chat.completion.chunk", created=1, model=model)
    fields = dict(role="assistant", content=text) if is_first else dict(content=text)
    delta = protocol.Delta(**fields) if is_first or text else protocol.Delta()
    choice = protocol.ChatChunkChoice(
        index=3, delta=delta, logprobs=logprobs, finish_reason=finish
    )
    expected = protocol.ChatChunk(**common, choices=[choice], **usage)
    events = streaming.Events(protocol.ChatChunk(**common, choices=[], **usage))
    written = events.write(
        3, b"delta", streaming.delta_json(text, is_first), logprobs, finish
    )
    assert written == streaming.event(expected)
