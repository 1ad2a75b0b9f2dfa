"""Requests share pages: tokens are exact and no page is lost, even if pages run out."""

import dataclasses
import functools
from unittest import mock

import numpy as np
import pytest
from engines import carry_always, check, check_pages, finish, submit_all
from helpers import ENGINE_MODEL, make_engine, make_requests, tokens_alone
from hypothesis import given, settings
from hypothesis import strategies as st

from ladder_jax.config import ConfigError, Decode
from ladder_jax.serve import design
from ladder_jax.serve.page_budget import PageBudget

pytestmark = pytest.mark.usefixtures("fast_compiler")

TOKEN_BYTES = 2 * 2 * 8 * 4 * 4  # of ENGINE_MODEL


@functools.cache
def scarce_engine(page_size, page_count, prefixes, carry_tokens=0):
    """Its longest request takes 64 tokens; all of its slots could take 320.

    With `carry_tokens`, iterations carry every piece that they can.
    """
    blocks = 3 * 8 * TOKEN_BYTES if prefixes else 0
    engine = make_engine(
        slots=3,
        staging=2,
        steps_per_call=3,
        page_size=page_size,
        prefix_block=8,
        prefix_memory=str(blocks),
        kv_memory=str(page_count * page_size * TOKEN_BYTES),
        carry_tokens=carry_tokens,
    )
    if carry_tokens:
        carry_always(engine)
    return engine


def test_requests_that_lose_their_pages_wait_again_and_lose_no_token():
    engine = scarce_engine(4, 18, False)
    requests = [([i, 7, i], dict(max_tokens=45, seed=i)) for i in range(6)]
    requests[2][1].update(temperature=0.9, frequency_penalty=0.4, presence_penalty=-0.2)
    requests[3][1].update(repetition_penalty=1.3, min_tokens=40, stop_token_ids=[3, 5])
    submitted = submit_all(engine, requests)
    while engine.step():
        check_pages(engine)
    assert engine.counters.preempted >= 3
    check(engine, submitted)


def test_a_prompt_waits_for_pages_that_slots_have_taken_since_its_admission():
    """Long chunks of small pages: slots grow a lot before its first prefill call."""
    engine = make_engine(
        steps_per_call=16, page_size=4, kv_memory=str(20 * 4 * TOKEN_BYTES)
    )
    requests = [
        ([i] * (3 if i % 2 else 20), dict(max_tokens=40, seed=i)) for i in range(12)
    ]
    submitted = submit_all(engine, requests)
    finish(engine)
    assert engine.counters.preempted and not engine.counters.failures
    check(engine, submitted)


def test_log_probabilities_go_on_where_a_request_lost_its_pages():
    engine, alone = scarce_engine(4, 18, False), make_engine(max_logprobs=2)
    engine = make_engine(
        slots=3, page_size=4, kv_memory=str(18 * 4 * TOKEN_BYTES), max_logprobs=2
    )
    options = dict(max_tokens=40, logprobs=2, prompt_logprobs=1)
    requests = [engine.submit([i, 9], **options) for i in range(4)]
    finish(engine)
    assert engine.counters.preempted
    for i, request in enumerate(requests):
        expected = alone.submit([i, 9], **options).result()
        assert request.tokens == expected.tokens
        got, wanted = request.take()[0], expected.take()[0]
        del wanted
        assert len(got) == 40
        for mine, theirs in zip(request.prompt_logprobs, expected.prompt_logprobs):
            assert (mine is None) == (theirs is None)
            if mine is not None and theirs is not None:
                assert mine[0] == pytest.approx(theirs[0], abs=1e-4)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_arrivals_cancellations_prefixes_and_too_few_pages_change_no_token(data):
    pages = data.draw(
        st.sampled_from(
            [
                (4, 18, False),
                (4, 24, True),
                (8, 11, False),
                (8, 14, True),
                (8, 40, True),
            ]
        )
    )
    engine = scarce_engine(*pages, data.draw(st.sampled_from([0, 16]), "carry_tokens"))
    shared = list(range(40, 57))
    requests = []
    for i in range(data.draw(st.integers(1, 9), "requests")):
        begin = shared[: data.draw(st.integers(0, 17), "shared")]
        own = data.draw(st.integers(1, 20), "own")
        prompt = [*begin, *[(7 * i + j) % 200 for j in range(own)]]
        most = data.draw(st.integers(1, 64 - len(prompt)), "max_tokens")
        requests.append((prompt, dict(max_tokens=most, seed=i, temperature=i % 2)))
    cancelled = data.draw(st.sets(st.integers(0, 8), max_size=3), "cancelled")
    submitted = []
    for i, (prompt, options) in enumerate(requests):
        submitted.append((engine.submit(prompt, **options), prompt, options))
        for _ in range(data.draw(st.integers(0, 3), "steps")):
            engine.step()
            check_pages(engine)
        if i in cancelled:
            data.draw(st.sampled_from(submitted), "which")[0].cancel()
    while engine.step():
        check_pages(engine)
    whole = [each for each in submitted if each[0].finish != "cancelled"]
    check(engine, whole)
    for request, prompt, options in submitted:
        expected = tokens_alone(prompt, **options)
        assert request.tokens == expected[: len(request.tokens)]


def test_the_budget_counts_at_least_the_pages_that_requests_have():
    engine = scarce_engine(4, 24, True)
    submitted = submit_all(engine, make_requests(12, longest=30))
    while engine.step():
        stepper = engine.stepper
        budget = PageBudget(
            engine.capacity, stepper.tracker, stepper.calls.unread, engine.prefixes
        )
        used = int(np.count_nonzero(np.asarray(engine.programs.state.pool.users)))
        # A request that has ended has pages until the next call.
        assert used <= budget.used + engine.capacity.staging_size * 16
    check(engine, submitted)


def test_a_prefix_is_one_copy_however_many_requests_have_it():
    engine = scarce_engine(8, 40, True)
    finish(engine)
    prompt = list(range(100, 116))
    engine.submit([*prompt, 1], max_tokens=1).result()
    requests = [engine.submit([*prompt, i], max_tokens=20) for i in range(3)]
    for _ in range(3):
        engine.step()
    users = np.asarray(engine.programs.state.pool.users)
    # Two pages of the prefix cache, and of the rows that have begun.
    assert np.sort(users)[-2:].tolist() == [4, 4]
    for i, request in enumerate(requests):
        assert request.result().tokens == tokens_alone([*prompt, i], max_tokens=20)


def test_stored_prefixes_make_room_for_a_prompt():
    engine = scarce_engine(8, 11, True)
    for first in (0, 100):
        engine.submit([first + i for i in range(16)], max_tokens=1).result()
    evicted = engine.prefixes.evicted
    submitted = submit_all(engine, [([i] * 30, dict(max_tokens=30)) for i in range(2)])
    finish(engine)
    assert engine.prefixes.evicted > evicted
    check(engine, submitted)


def test_a_prompt_that_needs_room_evicts_no_prefix_of_a_prompt_before_it():
    engine = scarce_engine(8, 11, True)
    finish(engine)
    while engine.prefixes.blocks():
        engine.prefixes.evict()
    first, other = list(range(100, 116)), list(range(8))
    for prompt in (first, other):
        engine.submit([*prompt, 1], max_tokens=1).result()
    finish(engine)
    assert len(engine.prefixes.blocks()) == 3  # those of `first` are the older ones
    copied = engine.counters.prefix_tokens
    # With 3 pages, of which 2 are stored, with 7 pages, and one for growth: 11.
    requests = [([*first, 2], dict(max_tokens=9)), ([5] * 56, dict(max_tokens=8))]
    submitted = submit_all(engine, requests)
    engine.step()
    assert engine.counters.prefix_tokens == copied + 16
    assert len(engine.stepper.tracker.live()) == 2
    finish(engine)
    check(engine, submitted)


@pytest.mark.parametrize("tensor, residual", [(2, "ladder"), (4, "desync:2")])
def test_pages_on_a_mesh(tensor, residual):
    model_config = dataclasses.replace(ENGINE_MODEL, residual=residual)
    engine = make_engine(
        model_config,
        tensor=tensor,
        slots=3,
        page_size=4,
        kv_memory=str(20 * 4 * TOKEN_BYTES // tensor),
    )
    requests = [([i, 7, i], dict(max_tokens=30, seed=i)) for i in range(5)]
    submitted = submit_all(engine, requests)
    finish(engine)
    assert engine.counters.preempted
    check(engine, submitted, model_config=model_config, tensor=tensor)


def test_a_gpu_without_a_kernel_has_rows():
    with mock.patch.object(design.chips, "platform", return_value="cuda"):
        with pytest.raises(
            ConfigError, match="without a kernel.*: its queries are bfloat16; set it"
        ):
            make_engine(kv_layout="pages")


@pytest.mark.parametrize(
    "slots, length, platform, kernel, layout",
    [
        (16, 1024, "cpu", "xla", "pages"),
        (16, 260, "cpu", "xla", "rows"),  # 16 MiB
        (16, 1024, "tpu", "ragged", "pages"),
        (16, 260, "tpu", "ragged", "rows"),
        (16, 1024, "tpu", "xla", "rows"),
        (16, 1024, "cuda", "triton", "pages"),
        (16, 1024, "rocm", "xla", "rows"),
    ],
)
def test_pages_are_chosen_where_they_are_faster(
    slots, length, platform, kernel, layout
):
    row_bytes = length * 4096
    options = Decode(slots=slots)
    assert design.layout(options, platform, row_bytes, kernel, "") == layout
    memory = Decode(slots=None, kv_memory=str(slots * row_bytes))
    assert design.layout(memory, platform, row_bytes, kernel, "") == layout
