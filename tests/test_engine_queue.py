"""Who goes first, who waits, and what a cancelled request leaves behind."""

import pytest
from engines import LONG, WAITERS, check, finish, long_engine
from helpers import make_engine, tokens_alone
from hypothesis import given, settings
from hypothesis import strategies as st

from ladder_jax.serve.request import QueueFull, Token

pytestmark = pytest.mark.usefixtures("fast_compiler")


def test_first_come_first_served_but_for_priority():
    engine = make_engine(slots=1, staging=1)
    order = []
    requests = [engine.submit([i], max_tokens=3, priority=i // 4) for i in range(8)]
    while engine.step():
        order += [i for i, r in enumerate(requests) if r.tokens and i not in order]
    assert order == [4, 5, 6, 7, 0, 1, 2, 3]


@pytest.mark.parametrize("staging", [1, 6])
def test_priorities_order_the_queue_and_staging_alike(staging):
    """Over all that is accepted; with 6 rows of staging, the device orders them."""
    engine = make_engine(slots=1, staging=staging)
    blocker = engine.submit([1], max_tokens=40)
    while not blocker.tokens:
        engine.step()
    priorities = [-1000, 127, 128, 0, 1000, 129]
    requests = [
        engine.submit([i], max_tokens=3, priority=p) for i, p in enumerate(priorities)
    ]
    finish(engine)
    # Prefill emits the first token, the slot the second one.
    decoded = sorted(requests, key=lambda r: r.times[1])
    assert [r.priority for r in decoded] == sorted(priorities, reverse=True)


def test_equal_priorities_stay_in_order_when_the_tickets_start_again(monkeypatch):
    monkeypatch.setattr("ladder_jax.serve.calls.TICKETS", 7)
    engine = make_engine(slots=1, staging=6)
    requests = [engine.submit([i], max_tokens=3, priority=i % 2) for i in range(12)]
    finish(engine)
    decoded = sorted(range(12), key=lambda i: requests[i].times[1])
    assert decoded == [*range(1, 12, 2), *range(0, 12, 2)]
    for i, request in enumerate(requests):
        assert request.tokens == tokens_alone([i], max_tokens=3)


def test_the_queue_is_bounded_and_cancelling_makes_room():
    engine = make_engine(queue_size=2)
    first, second = engine.submit([1], max_tokens=2), engine.submit([2], max_tokens=2)
    with pytest.raises(QueueFull, match="decode.queue_size=2"):
        engine.submit([3], max_tokens=2)
    second.cancel()
    assert list(second) == [] and second.finish == "cancelled"
    assert first.result().tokens == tokens_alone([1], max_tokens=2)
    engine.submit([3], max_tokens=2).result()


def test_generate_keeps_order_beyond_the_queue():
    engine = make_engine(queue_size=2)
    prompts = [[i] for i in range(7)]
    assert [r.tokens for r in engine.generate(prompts, max_tokens=4)] == [
        tokens_alone(p, max_tokens=4) for p in prompts
    ]


def test_cancelling_a_request_that_waits_frees_its_place_at_once():
    engine = make_engine(queue_size=2)
    for _ in range(3):  # without a step
        requests = [engine.submit([i], max_tokens=2) for i in (1, 2)]
        with pytest.raises(QueueFull, match="2 requests wait already"):
            engine.submit([3], max_tokens=2)
        for request in requests:
            request.cancel()
    assert engine.submit([1], max_tokens=2).result().tokens == tokens_alone(
        [1], max_tokens=2
    )
    assert engine.counters.finished == engine.counters.submitted == 7


def test_a_cancelled_request_ignores_later_tokens():
    request = make_engine().submit([1, 2], max_tokens=9)
    request.put([Token(5, "a"), Token(None, "b")])
    request.cancel()
    request.put([Token(6, "c")], "length")  # from a chunk that the host reads now
    assert (request.tokens, request.text) == ([5], "ab")
    assert (request.finish, len(request.times)) == ("cancelled", 1)
    assert [token.id for token in request] == [5, None]


@settings(max_examples=25, deadline=None)
@given(
    shapes=st.sampled_from([(True, 1), (True, 3), (False, 3)]),
    plans=st.lists(
        st.tuples(
            st.sampled_from(WAITERS),
            st.sampled_from([-1000, 0, 0, 1000]),
            st.sampled_from([None, None, 0, 0, 1, 3]),
        ),
        min_size=3,
        max_size=7,
    ),
)
def test_cancelled_requests_never_change_the_others(shapes, plans):
    """shapes: of `long_engine`. plans: (prompt and options, priority, steps until it is
    cancelled or None).
    """
    engine = long_engine(*shapes)
    submitted = [
        (engine.submit(prompt, **options, priority=priority), prompt, options)
        for (prompt, options), priority, _ in plans
    ]
    for step in range(4):
        for (request, *_), (_, _, cancelled_at) in zip(submitted, plans):
            if cancelled_at == step:
                request.cancel()
        engine.step()
    for request, *_ in submitted:
        request.result()
    for request, prompt, options in submitted:
        whole = tokens_alone(prompt, model_config=LONG, **options)
        assert request.tokens == whole[: len(request.tokens)]
        assert request.finish == "cancelled" or request.tokens == whole
    check(
        engine, [x for x in submitted if x[0].finish != "cancelled"], model_config=LONG
    )


@pytest.mark.parametrize("staging", [1, 3])
@pytest.mark.parametrize("prompt, options", WAITERS[2:5], ids=["60", "30", "100"])
def test_a_request_is_decoded_in_a_state_that_is_long_enough_for_it(
    prompt, options, staging
):
    """Two requests wait before one that needs a longer state, and are cancelled."""
    engine = long_engine(True, staging)
    cancelled = [engine.submit([i], max_tokens=4) for i in (1, 2)]
    request = engine.submit(prompt, **options)
    for other in cancelled:
        other.cancel()
    assert request.result().tokens == tokens_alone(prompt, LONG, **options)
    assert [other.finish for other in cancelled] == ["cancelled"] * 2
