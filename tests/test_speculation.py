"""Drafted tokens change no request: the engine's tokens stay those it has without."""

import collections
import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engines import check, check_pages, finish, log_softmax_of, run, submit_all
from helpers import ENGINE_MODEL, make_engine, make_requests, tokens_alone
from hypothesis import given, settings
from hypothesis import strategies as st

from ladder_jax import decode_pages, decode_state, speculation
from ladder_jax.config import ConfigError, Decode
from ladder_jax.serve.page_budget import PageBudget

pytestmark = pytest.mark.usefixtures("fast_compiler")

TOKEN_BYTES = 2 * 2 * 8 * 4 * 4  # of ENGINE_MODEL


# ---------------------------------------------------------------- drafts


def draft_by_reading(tokens, size):
    """The draft of one request, by looking at every earlier place in turn."""
    last = len(tokens) - 1
    best = (0, None)
    for place in range(last):
        length = 0
        while length < speculation.LONGEST and place - length >= 0:
            if tokens[place - length] != tokens[last - length]:
                break
            length += 1
        if length >= speculation.SHORTEST and length >= best[0]:
            best = length, place
    place = best[1]
    if place is None:
        return []
    following = tokens[place + 1 :]
    return [following[i % len(following)] for i in range(size)]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=3, max_size=3
    )
)
def test_a_draft_follows_the_latest_place_with_most_of_the_last_tokens(rows):
    drafting = speculation.empty(3, 12)
    stale = np.full((3, 12), 1, np.int32)  # what comes after the last token counts not
    for row, tokens in zip(stale, rows):
        row[: len(tokens)] = tokens
    drafting = drafting._replace(tokens=stale, allowed=np.array([True, True, False]))
    position = np.array([len(tokens) - 1 for tokens in rows])
    drafts = propose(drafting, position, np.array([9, 3, 9]))
    for i, most in enumerate((5, 3, 0)):
        expected = draft_by_reading(rows[i], 5)[:most]
        assert drafts.length[i] == len(expected)
        assert drafts.tokens[i, : len(expected)].tolist() == expected


propose = jax.jit(functools.partial(speculation.propose, size=5))


def test_drafts_are_tried_while_they_promise_more_than_they_cost():
    drafting = speculation.empty(2, 8)._replace(rate=jnp.array([1.0, 0.0]))
    drafts = speculation.Drafts(jnp.zeros((2, 4), jnp.int32), jnp.array([4, 4]))
    runs = jnp.array([True, True])
    assert speculation.pays(drafting, drafts, runs, least=2.0)
    assert not speculation.pays(drafting, drafts, runs, least=2.1)
    failed = drafting
    for _ in range(6):
        failed = speculation.learn(failed, drafts, jnp.array([0, 4]))
    assert failed.rate[0] < 0.15 and failed.rate[1] > 0.85
    # It is tried again, after many passes; a request without a draft keeps its rate.
    later, one = failed, drafts._replace(length=jnp.array([4, 0]))
    rates = []
    for _ in range(100):
        later = speculation.recover(later, one)
        rates.append(float(later.rate[0]))
    assert rates[20] < 0.3 < rates[-1] and later.rate[1] == failed.rate[1]
    # With few rows, drafts cost little; with many, as much as other requests.
    assert speculation.least_gain(1, 4, balance=256) < 0.02
    assert speculation.least_gain(1000, 4, balance=12) > 3.9


# ---------------------------------------------------------------- the engine

# With these biases an output has two ids alone: many drafts of it are right, many are
# not, and a sampled one is seldom right to its end.
TWO_IDS = {5: 40.0, 9: 40.0}


@functools.cache
def engine_with_rows():
    """Its compiled shape follows the requests."""
    longer = dataclasses.replace(ENGINE_MODEL, max_length=96)
    return make_engine(
        longer,
        speculate=4,
        kv_layout="rows",
        fit_shapes=True,
        slots=3,
        max_length=None,
        trace=True,
    )


@functools.cache
def engine_with_scarce_pages():
    """Its longest request takes 64 tokens; pages hold 96, of which 24 are prefixes."""
    return make_engine(
        speculate=3,
        steps_per_call=3,
        page_size=4,
        prefix_block=8,
        prefix_memory=str(3 * 8 * TOKEN_BYTES),
        kv_memory=str(24 * 4 * TOKEN_BYTES),
        max_logprobs=0,
    )


def draw_requests(data, length):
    """Up to 8 requests, which sample, are penalised and repeat themselves."""
    requests = []
    shared = [*range(40, 48), 5, 9, 5, 5, 9, 5, 9, 5]
    for i in range(data.draw(st.integers(1, 8), "requests")):
        begin = shared[: data.draw(st.sampled_from([0, 8, 16]), "shared")]
        own = data.draw(st.lists(st.sampled_from([5, 9]), min_size=1, max_size=12))
        prompt = begin + own
        options = dict(
            max_tokens=data.draw(st.integers(1, length - len(prompt)), "max_tokens"),
            seed=i,
            temperature=data.draw(st.sampled_from([0.0, 0.7, 3.0]), "temperature"),
            logit_bias=data.draw(st.sampled_from([TWO_IDS, {5: 3.0}]), "bias"),
        )
        if data.draw(st.booleans(), "penalised"):
            options.update(repetition_penalty=1.2, frequency_penalty=0.4, top_k=9)
        requests.append((prompt, options))
    return requests


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_drafts_change_no_token_whatever_else_happens(data):
    pages = data.draw(st.booleans(), "pages")
    engine = engine_with_scarce_pages() if pages else engine_with_rows()
    model_config = engine.model_config
    requests = draw_requests(data, 64)
    cancelled = data.draw(st.sets(st.integers(0, 7), max_size=2), "cancelled")
    submitted = []
    for i, (prompt, options) in enumerate(requests):
        allowed = data.draw(st.sampled_from([True, True, False]), "speculate")
        request = engine.submit(prompt, speculate=allowed, **options)
        submitted.append((request, prompt, options))
        for _ in range(data.draw(st.integers(0, 2), "steps")):
            engine.step()
            check_pages(engine)
        if i in cancelled:
            data.draw(st.sampled_from(submitted), "which")[0].cancel()
    while engine.step():
        check_pages(engine)
    whole = [each for each in submitted if each[0].finish != "cancelled"]
    check(engine, whole, model_config=model_config)
    for request, prompt, options in submitted:
        expected = tokens_alone(prompt, model_config=model_config, **options)
        assert request.tokens == expected[: len(request.tokens)]


def test_accepted_tokens_are_counted_and_slots_are_occupied_once_an_iteration():
    engine = engine_with_rows()
    finish(engine)
    engine.counters.reset()
    engine.history.clear()
    requests = [
        ([5, 9] * 8, dict(max_tokens=30, logit_bias=TWO_IDS, seed=i, temperature=i % 2))
        for i in range(5)
    ]
    submitted = run(engine, requests, model_config=engine.model_config)
    counters = engine.counters
    assert 0 < counters.accepted < counters.drafted
    decoded = counters.tokens - len(submitted)  # prefill emits the first token of each
    assert counters.busy + counters.accepted == decoded
    assert counters.accepted_length == decoded / counters.busy > 1.2
    traced = sum(int((chunk.requests >= 0).sum()) for chunk in engine.history)
    assert traced == counters.busy <= counters.slot_iterations
    # Without drafts, the same tokens take as many iterations as there are tokens.
    engine.counters.reset()
    for prompt, options in requests[:2]:
        engine.submit(prompt, speculate=False, **options).result()
    assert engine.counters.drafted == engine.counters.accepted == 0
    assert engine.counters.busy == engine.counters.tokens - 2


def test_stop_ids_least_tokens_penalties_and_log_probabilities_are_exact():
    """Each at every accepted position, beside an engine without drafts."""
    engine, plain = engine_with_rows(), make_engine(engine_with_rows().model_config)
    prompt, stops = [5, 9, 5, 9, 5, 5, 9] * 3, dict(stop_token_ids=(9, 77))
    bias = dict(logit_bias=TWO_IDS, logprobs=2, max_tokens=40)
    cases = [
        bias,
        bias | dict(temperature=1.0, seed=3),
        bias | stops | dict(logit_bias={5: 40.0, 9: 38.0}, min_tokens=17),
        bias | stops | dict(temperature=2.0, seed=1, min_tokens=9),
        bias | dict(presence_penalty=1.5, frequency_penalty=0.6),
        bias | dict(repetition_penalty=1.3, max_tokens=11),
    ]
    engine.counters.reset()
    for options in cases:
        got, wanted = (e.submit(prompt, **options).result() for e in (engine, plain))
        assert got.tokens == wanted.tokens and got.finish == wanted.finish
        for mine, theirs in zip(got.take()[0], wanted.take()[0], strict=True):
            assert mine.id == theirs.id
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)
            assert [i for i, _ in mine.top] == [i for i, _ in theirs.top]
    assert engine.counters.accepted > 40


def test_sampled_tokens_have_the_models_distribution():
    """All outputs of three tokens, of two ids each: as often as the model says."""
    engine, prompt, count = engine_with_rows(), [5, 9, 9, 5, 9] * 3, 1000
    finish(engine)
    engine.counters.reset()
    options = dict(max_tokens=3, temperature=1.0, logit_bias=TWO_IDS)
    requests = [engine.submit(prompt, seed=seed, **options) for seed in range(count)]
    finish(engine)
    assert engine.counters.accepted > 50
    assert engine.counters.drafted > engine.counters.accepted + 50
    outcomes = list(itertools.product(TWO_IDS, repeat=3))
    probability = np.array([probability_of(outcome, prompt) for outcome in outcomes])
    assert probability.sum() == pytest.approx(1, abs=1e-4)
    seen = collections.Counter(tuple(request.tokens) for request in requests)
    seen = np.array([seen[outcome] for outcome in outcomes])
    assert seen.sum() == count
    expected = count * probability
    # Chi squared of 7 degrees of freedom: above 24.3 once in a thousand.
    assert ((seen - expected) ** 2 / expected).sum() < 24.3


def probability_of(output, prompt):
    """Of an output of TWO_IDS, by one forward pass over each of its beginnings."""
    total = 1.0
    model_config = engine_with_rows().model_config
    for i, token in enumerate(output):
        ids = (*prompt, *output[:i])
        logits = log_softmax_of(ids, model_config=model_config)[-1]
        two = {each: np.exp(logits[each]) for each in TWO_IDS}
        total *= two[token] / sum(two.values())
    return total


def test_the_budget_counts_pages_of_drafts():
    engine = engine_with_scarce_pages()
    requests = [
        ([5, 9, i], dict(max_tokens=50, logit_bias=TWO_IDS, seed=i, temperature=i % 2))
        for i in range(6)
    ]
    engine.counters.reset()
    submitted = submit_all(engine, requests)
    while engine.step():
        stepper = engine.stepper
        budget = PageBudget(
            engine.capacity, stepper.tracker, stepper.calls.unread, engine.prefixes
        )
        used = int(np.count_nonzero(np.asarray(engine.programs.state.pool.users)))
        assert used <= budget.used
    assert engine.counters.preempted and engine.counters.accepted
    check(engine, submitted)


def test_drafts_take_no_page_that_another_request_may_need():
    spec = engine_with_scarce_pages().spec
    state = decode_state.empty(spec, 2, 1, 64, 8)
    slots = state.slots.state
    table = slots.table.at[0, 0].set(0).at[1, :2].set(jnp.array([1, 2]))
    slots = slots._replace(
        active=jnp.array([True, True]), position=jnp.array([2, 5]), table=table
    )
    users = jnp.array([1, 1, 1, 0, 0, 0, 0, 0])
    for free, room in ((5, [4, 4]), (4, [4, 4]), (3, [1, 2])):
        used = users.at[3 + free :].set(1)
        given = decode_state.DecodeState(
            state.slots._replace(state=slots),
            state.staging,
            state.pool._replace(users=used),
        )
        after, drafted = decode_pages.grow_for_drafts(given, jnp.array([4, 4]), 4)
        assert drafted.tolist() == room
        assert (after.pool.users == 0).sum() == (free - 2 if room == [4, 4] else free)


@pytest.mark.parametrize(
    "changes, tensor",
    [
        (dict(kv_layout="pages", unroll_layers=False), 2),
        (dict(kv_layout="rows", loop="fixed", kv_dtype="int8"), 4),
    ],
    ids=str,
)
def test_drafts_on_a_mesh(changes, tensor):
    """With int8 keys and values, the tokens are those of the same engine without."""
    engine = make_engine(tensor=tensor, speculate=4, max_logprobs=0, **changes)
    requests = make_requests(3, longest=12)
    requests += [
        ([5, 9, i] * 4, dict(max_tokens=30, logit_bias=TWO_IDS, seed=i, temperature=i))
        for i in range(2)
    ]
    if "kv_dtype" not in changes:
        run(engine, requests)
    else:
        plain = make_engine(tensor=tensor, max_logprobs=0, **changes)
        for prompt, options in requests:
            expected = plain.submit(prompt, **options).result().tokens
            assert engine.submit(prompt, **options).result().tokens == expected
    assert engine.counters.accepted


def test_without_the_option_the_programs_know_of_no_drafts():
    engine = make_engine()
    assert engine.spec.speculate == 0 and engine.spec.most_tokens == 1
    state = engine.programs.state
    assert state.slots.state.drafting is state.staging.state.drafting is None
    with pytest.raises(ConfigError, match="decode.speculate=-1 .* from 0 to 64"):
        Decode(speculate=-1)
