"""Log-probabilities of prompts are those of one forward pass over the whole prompt.

The engine computes them in pieces, beside other requests.
"""

import dataclasses
import functools

import numpy as np
import pytest
from engines import log_softmax_of
from helpers import ENGINE_MODEL, make_engine, tokens_alone
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ladder_jax import decode_scores
from ladder_jax.config import ConfigError
from ladder_jax.serve.request import RequestFailed

pytestmark = pytest.mark.usefixtures("fast_compiler")

LENGTH = ENGINE_MODEL.max_length


def check(request, alternatives, **reference):
    """Every entry is what the model says of the prompt's own next token."""
    prompt = [int(id) for id in request.prompt]
    expected = log_softmax_of(tuple(prompt), **reference)
    first, *entries = request.prompt_logprobs
    assert first is None and len(entries) == len(prompt) - 1
    for token, row, (logprob, top) in zip(prompt[1:], expected, entries):
        assert abs(logprob - row[token]) < 1e-4
        likeliest = np.argsort(-row, kind="stable")[:alternatives]
        assert [id for id, _ in top] == likeliest.tolist()
        assert [value for _, value in top] == pytest.approx(row[likeliest], abs=1e-4)


def finish(engine):
    while engine.step():
        pass
    assert not list(engine.stepper.tracker) and not engine.waiting


@functools.cache
def small_engine():
    """Every piece has at most 16 tokens."""
    return make_engine(prefill_budget=16)


@functools.cache
def other_engine():
    """Pieces of several widths, rows of several lengths, stored prefixes."""
    model_config = dataclasses.replace(ENGINE_MODEL, max_length=128)
    engine = make_engine(
        model_config,
        fit_shapes=True,
        slots=1,
        staging=3,
        prefill_budget=32,
        max_length=None,
        prefix_memory="1MiB",
        prefix_block=8,
    )
    engine.warm_up()
    return engine


@pytest.mark.parametrize("max_tokens", [0, 1, 5])
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 49, 58])
def test_at_every_boundary_of_a_piece(length, max_tokens):
    """A piece's last token is followed by the first one of the next piece."""
    engine = small_engine()
    prompt = np.random.default_rng(length).integers(0, 264, length).tolist()
    request = engine.submit(prompt, max_tokens=max_tokens, prompt_logprobs=3)
    neighbours = [
        engine.submit(prompt[::-1], max_tokens=2, prompt_logprobs=0),
        engine.submit([7] * length, max_tokens=4),
    ]
    seen = 0
    for _ in request:  # they are complete when the first token arrives
        seen = max(seen, len(request.prompt_logprobs))
        assert seen == length
    assert request.finish == "length" and len(request.tokens) == max_tokens
    assert request.tokens == tokens_alone(prompt, max_tokens=max_tokens)
    check(request, 3)
    check(neighbours[0].result(), 0)
    assert neighbours[1].result().prompt_logprobs == []
    assert neighbours[1].tokens == tokens_alone([7] * length, max_tokens=4)
    finish(engine)


def test_a_prompt_that_fills_the_row_can_be_scored_and_no_more():
    engine = small_engine()
    prompt = np.random.default_rng(1).integers(0, 264, LENGTH).tolist()
    request = engine.submit(prompt, prompt_logprobs=1)
    assert request.max_tokens == 0
    check(request.result(), 1)
    with pytest.raises(ConfigError, match="prompt=65 or more .* fewer than 65 tokens"):
        engine.submit([*prompt, 1], max_tokens=0, prompt_logprobs=1)
    with pytest.raises(ConfigError, match="max_tokens=1 .* an integer from 0 to 0: 64"):
        engine.submit(prompt, max_tokens=1, prompt_logprobs=1)
    with pytest.raises(ConfigError, match="prompt=64 or more .* fewer than 64 tokens"):
        engine.submit(prompt, max_tokens=1)
    finish(engine)


PLANS = st.lists(
    st.tuples(
        st.sampled_from([1, 8, 9, 16, 30, 33, 64, 65, 100, 127]),  # tokens
        st.integers(0, 1),  # which beginning it shares with others
        st.sampled_from([0, 0, 1, 6]),  # max_tokens
        st.sampled_from([None, 0, 2]),  # prompt_logprobs
        st.sampled_from([None, None, None, 1, 2]),  # cancelled after so many steps
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=20, deadline=None)
@given(PLANS)
@example([(33, 0, 1, None, None), (33, 0, 0, 2, None), (65, 0, 1, None, None)])
def test_beside_shared_prefixes_other_requests_and_cancellations(plans):
    engine = other_engine()
    model_config = engine.model_config
    compiled = engine.compiled()[0]
    prompts = [np.random.default_rng(i).integers(0, 264, 128).tolist() for i in (0, 1)]
    submitted = []
    for tokens, kind, max_tokens, prompt_logprobs, _ in plans:
        max_tokens = min(max_tokens, 128 - tokens)
        if prompt_logprobs is None:
            max_tokens = max(max_tokens, 1)
        prompt = prompts[kind][: tokens - 1] + [tokens]
        options = dict(max_tokens=max_tokens, prompt_logprobs=prompt_logprobs)
        submitted.append((engine.submit(prompt, **options), prompt, options))
    for step in (1, 2):
        engine.step()
        for (request, *_), (*_, cancelled) in zip(submitted, plans):
            if cancelled == step:
                request.cancel()
    for request, prompt, options in submitted:
        request.result()
        if request.finish == "cancelled":
            continue
        expected = tokens_alone(
            prompt, model_config, max_tokens=max(options["max_tokens"], 1)
        )
        assert request.tokens == expected[: options["max_tokens"]]
        if options["prompt_logprobs"] is None:
            assert request.prompt_logprobs == []
        else:
            check(request, options["prompt_logprobs"], model_config=model_config)
    finish(engine)
    assert engine.compiled()[0] == compiled, "a program was compiled after warm_up"


def test_scores_come_without_a_chunk_and_prompts_still_fill_the_prefix_cache():
    engine = make_engine(prefix_memory="1MiB", prefix_block=8)
    before, _ = engine.compiled()
    prompt = list(range(30))
    check(engine.submit(prompt, max_tokens=0, prompt_logprobs=1).result(), 1)
    finish(engine)
    assert engine.counters.chunks == engine.counters.iterations == 0
    assert engine.counters.prefix_tokens == 0
    again = engine.submit([*prompt, 1, 2], max_tokens=3)
    assert again.result().tokens == tokens_alone([*prompt, 1, 2], max_tokens=3)
    assert engine.counters.prefix_tokens == 24
    # The blocks have no scores: the whole prompt is computed again.
    computed = engine.counters.prefill_tokens
    check(engine.submit(prompt, max_tokens=0, prompt_logprobs=1).result(), 1)
    assert engine.counters.prefill_tokens - computed == 30
    assert engine.compiled()[0] - before <= engine.compiled()[1]


@pytest.mark.parametrize("residual, tensor", [("ladder", 8), ("dtp:2", 4)])
def test_on_tensor_shards(residual, tensor):
    model_config = dataclasses.replace(ENGINE_MODEL, residual=residual)
    engine = make_engine(model_config, tensor)
    prompt = np.random.default_rng(2).integers(0, 264, 40).tolist()
    request = engine.submit(prompt, max_tokens=2, prompt_logprobs=2).result()
    own_streams = tensor if residual.startswith("dtp") else 1
    check(request, 2, model_config=model_config, tensor=own_streams)


def test_logits_of_a_few_tokens_at_a_time_give_the_same(monkeypatch):
    """Of 3 tokens: pieces of 16 end inside a part."""
    monkeypatch.setattr(decode_scores, "LOGITS_BYTES", 3 * 4 * 264)
    engine = make_engine(max_logprobs=2)  # no other test compiles for 2
    prompt = np.random.default_rng(3).integers(0, 264, 37).tolist()
    check(engine.submit(prompt, max_tokens=0, prompt_logprobs=2).result(), 2)


def test_a_failed_request_keeps_the_entries_that_it_has():
    engine = small_engine()
    request = engine.submit(list(range(40)), max_tokens=0, prompt_logprobs=0)
    with pytest.MonkeyPatch.context() as patch:
        calls = []

        def run_prefill(*arguments):
            calls.append(1)
            if len(calls) == 3:
                raise RuntimeError("device lost")
            return original(*arguments)

        original = engine.programs.run_prefill
        patch.setattr(engine.programs, "run_prefill", run_prefill)
        with pytest.raises(RequestFailed, match="device lost"):
            request.result()
    assert request.prompt_logprobs == [None]
    again = engine.submit(list(range(40)), max_tokens=0, prompt_logprobs=0)
    check(again.result(), 0)


def test_an_engine_can_do_without_the_programs():
    engine = make_engine(prompt_logprobs=False)
    with pytest.raises(ConfigError, match="prompt_logprobs=0 .* None, as this engine"):
        engine.submit([1], prompt_logprobs=0)
    assert engine.capacity.scored_shapes(64) == []
    most = make_engine().capacity.most_programs()
    assert engine.capacity.most_programs() == most - 1
