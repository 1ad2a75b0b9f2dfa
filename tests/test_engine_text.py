"""The text and the log-probabilities of an output, token by token.

The texts of the tokens, joined, are one decode of the ids, however chunks divide them.
"""

import asyncio

import jax
import numpy as np
import pytest
from engines import finish, log_softmax_of, text_engine
from helpers import make_engine, text_after
from hypothesis import given, settings
from hypothesis import strategies as st

from ladder_jax import decode_state
from ladder_jax.data import tokenizer
from ladder_jax.data.tokenizer import ByteTokenizer
from ladder_jax.serve.counters import Counters
from ladder_jax.serve.events import deliver_events
from ladder_jax.serve.request import Request
from ladder_jax.serve.stop_strings import StopStringFilter
from ladder_jax.serve.submission import Accepts, check_request
from ladder_jax.serve.tracker import Tracker

pytestmark = pytest.mark.usefixtures("fast_compiler")

BYTES = ByteTokenizer()


# ---------------------------------------------------------------- chunks of any length

TOKENIZERS = {
    "bytes": BYTES,
    "bpe": tokenizer.train(["naïve café — 東京 🙂🙂", "the cat sat"] * 4, 290),
}


@st.composite
def ids_of(draw, tok):
    """Ids of text with bytes missing or repeated, and any ids."""
    ids = tok.encode(draw(st.text("aé東🙂\ufffd", max_size=8)))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(ids)))
        ids[at : at + draw(st.integers(0, 2))] = draw(
            st.lists(st.integers(0, tok.size - 1), max_size=2)
        )
    return ids


def deliver(tok, prompt, ids, sizes, stop=(), logprobs=None):
    """(request, its tokens): `ids` come in chunks of these sizes, the rest in one.

    Each chunk has another request's events in the first slot, and empty iterations.
    """
    accepts = Accepts(tok, tok.size, 99, 2, 0, 5, True)
    options = dict(max_tokens=len(ids), stop=stop, stop_token_ids=[], logprobs=logprobs)
    submission = check_request(prompt, options, accepts)
    text_filter = StopStringFilter(tok.stream(after=prompt), submission.stop)
    request = Request(None, 7, submission, text_filter)
    tracker = Tracker(1)
    tracker.stage(tracker.admit(request, 0, 1), 0)
    start, tokens = 0, []
    for size in [*sizes, len(ids)]:
        chunk = ids[start : start + size]
        events = decode_state.Events(
            *(np.zeros((len(chunk) + 1, 2), np.int32) for _ in range(3)),
            np.zeros((len(chunk) + 1, 2), np.float32),
            *(np.zeros((len(chunk) + 1, 2, 5), dtype) for dtype in "if"),
        )
        events.request[:] = 7
        events.request[:, 0], events.flag[:, 0] = 8, decode_state.TOKEN
        for i, token in enumerate(chunk):
            number = start + i
            is_last = number == len(ids) - 1
            events.token[i, 1] = token
            events.flag[i, 1] = decode_state.LENGTH if is_last else decode_state.TOKEN
            events.logprob[i, 1] = -number
            events.top_ids[i, 1] = number + np.arange(5)
            events.top_logprobs[i, 1] = -number - np.arange(5)
        start += size
        deliver_events(events, tracker, Counters())
        tokens += list(iter(request._take, None))
    return request, tokens


@pytest.mark.parametrize("tok", TOKENIZERS.values(), ids=TOKENIZERS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_deltas_are_one_decode_however_chunks_divide_the_ids(tok, data):
    """A prompt may end inside a character. `stop` cuts text, and `top` stays right."""
    prompt = data.draw(ids_of(tok)) or [97]
    ids = data.draw(ids_of(tok)) or [98]
    sizes = data.draw(st.lists(st.integers(1, 4), max_size=len(ids)))
    stop = data.draw(st.lists(st.text("aé東", min_size=1, max_size=2), max_size=2))
    logprobs = data.draw(st.sampled_from([None, 0, 2]))
    request, tokens = deliver(tok, prompt, ids, sizes, stop, logprobs)
    whole = text_after(tok, prompt, ids)
    starts = [whole.index(text) for text in stop if text in whole]
    if not starts:
        assert request.finish == "length" and request.tokens == ids
        assert request.text == whole
    else:
        assert request.finish == "stop"
        assert whole.startswith(request.text)
        assert not any(text in request.text for text in stop)
    assert "".join(token.text for token in tokens) == request.text
    assert [token.id for token in tokens] == request.tokens
    for number, token in enumerate(tokens):
        top = tuple((number + i, -float(number + i)) for i in range(logprobs or 0))
        assert (token.logprob, token.top) == (
            (None, ()) if logprobs is None else (-number, top)
        )
    again, tokens_again = deliver(tok, prompt, ids, [], stop, logprobs)
    assert tokens_again == tokens and again.finish == request.finish
    one_by_one, tokens_of_one = deliver(tok, prompt, ids, [1] * 99, stop, logprobs)
    assert tokens_of_one == tokens and one_by_one.text == request.text


@pytest.mark.parametrize("start", range(1, 8))
def test_a_prompt_that_ends_inside_a_character(start):
    """The character comes with its last byte, and nothing else of the prompt."""
    ids = list("東🙂é".encode())
    request, tokens = deliver(BYTES, ids[:start], ids[start:], [2, 1])
    whole = bytes(ids[:start]).decode("utf-8", "ignore")
    assert whole + request.text == "東🙂é"
    assert "".join(token.text for token in tokens) == request.text
    request, _ = deliver(BYTES, ids[:start], list(b"abc"), [1])
    assert request.text == "abc"


# ---------------------------------------------------------------- on the device


def fields(tokens):
    return [(token.id, token.text, token.logprob, token.top) for token in tokens]


def test_streaming_is_not_streaming_field_by_field():
    """Chunks of 4 tokens. One request is read token by token, one by a coroutine, one
    at the end; another serves beside them.
    """
    engine = text_engine()
    prompt = [*b"so ", *"東".encode()[:2]]
    options = dict(
        max_tokens=21, temperature=1.5, seed=4, logprobs=3, stop_token_ids=()
    )
    beside = engine.submit(b"beside".decode(), max_tokens=40)
    streamed = engine.submit(prompt, **options)
    tokens = []
    while not streamed.finish:
        engine.step()
        tokens += list(iter(streamed._take, None))

    async def read(request):
        return [token async for token in request]

    request = engine.submit(prompt, **options)
    assert fields(asyncio.run(read(request))) == fields(tokens)
    engine.close()
    whole = engine.submit(prompt, **options)
    finish(engine)
    assert fields(whole) == fields(tokens)
    for other in (request, streamed):
        assert (other.text, other.tokens, other.finish) == (
            whole.text,
            whole.tokens,
            "length",
        )
    assert whole.text == text_after(BYTES, prompt, whole.tokens)
    expected = log_softmax_of((*prompt, *whole.tokens), 259)[len(prompt) - 1 :]
    for token, row in zip(tokens, expected):
        assert abs(token.logprob - row[token.id]) < 1e-4
        likeliest = np.argsort(-row, kind="stable")[:3]
        assert [id for id, _ in token.top] == likeliest.tolist()
        assert [value for _, value in token.top] == pytest.approx(
            row[likeliest], abs=1e-4
        )
    beside.result()
    finish(engine)


def test_log_probabilities_are_the_models_own():
    engine = make_engine()
    prompt = [3, 1, 4, 1, 5]
    request = engine.submit(
        prompt, max_tokens=6, temperature=1.0, seed=3, logprobs=2, logit_bias={7: 2.0}
    )
    beside = engine.submit(prompt, max_tokens=6)
    tokens = list(request)
    expected = log_softmax_of((*prompt, *request.tokens))
    for i, token in enumerate(tokens):
        row = expected[len(prompt) + i - 1]
        assert abs(token.logprob - row[token.id]) < 1e-4
        top_ids, top_logprobs = zip(*token.top)
        assert list(top_ids) == np.argsort(-row)[:2].tolist()
        np.testing.assert_allclose(top_logprobs, -np.sort(-row)[:2], atol=1e-4)
    assert all(token.logprob is None and token.top == () for token in beside)


def test_stop_strings_cut_exactly_and_free_the_slot():
    engine = text_engine()
    options = dict(max_tokens=30, temperature=1.0, seed=5, stop_token_ids=())
    whole = engine.submit("ab", **options).result()
    assert whole.text == BYTES.decode(whole.tokens)
    for start, size in ((3, 1), (4, 3), (10, 2)):
        stop = whole.text[start : start + size]
        cut = whole.text.index(stop)
        request = engine.submit("ab", stop=("never there", stop), **options)
        pieces = [token.text for token in request]
        assert "".join(pieces) == request.text == whole.text[:cut]
        assert request.finish == "stop"
        assert whole.tokens[: len(request.tokens)] == request.tokens
    finish(engine)
    assert not engine.on_device
    assert not jax.device_get(engine.programs.state.slots.state.active).any()
