"""Errors of the device and of requests: who fails, and that the engine goes on.

A request never waits for ever: the engine serves it, or it fails with the cause.
"""

import functools
import sys
import threading
import time
from unittest import mock

import jax
import pytest
from engines import LONG, WAITERS, finish, long_engine, submit_all
from helpers import make_engine, tokens_alone
from hypothesis import given, settings
from hypothesis import strategies as st

from ladder_jax.serve.request import EngineFailed, RequestFailed
from ladder_jax.serve.stepper import MOST_ERRORS

pytestmark = pytest.mark.usefixtures("fast_compiler")


def broken(engine, *names, error=None, times=None):
    """Makes methods of engine.programs raise `error`, `times` times (None: always).

    Afterwards they work again.
    """
    error = error or RuntimeError("device lost")
    left = [times]
    patch = mock.patch.multiple(
        engine.programs,
        **{
            name: failing(getattr(engine.programs, name), error, left) for name in names
        },
    )
    return patch


def failing(method, error, left):
    @functools.wraps(method)
    def call(*arguments, **options):
        if left[0] == 0:
            return method(*arguments, **options)
        if left[0] is not None:
            left[0] -= 1
        raise error

    return call


def works(engine):
    """The engine serves a new request exactly."""
    return engine.submit([5, 6], max_tokens=6).result().tokens == tokens_alone(
        [5, 6], max_tokens=6
    )


def fails_with(request, message):
    with pytest.raises(RequestFailed, match=message):
        request.result()
    return request.finish == "error"


def test_an_error_of_one_request_fails_no_other():
    engine = make_engine()
    good, bad = (engine.submit([i], max_tokens=9) for i in (1, 2))
    bad.text_filter = mock.Mock(push=mock.Mock(side_effect=ArithmeticError("its own")))
    with pytest.raises(RequestFailed, match="its own"):
        list(bad)
    assert bad.finish == "error" and good.result().tokens == tokens_alone(
        [1], max_tokens=9
    )


def test_an_exception_on_the_device_fails_its_requests_and_the_engine_goes_on():
    engine = make_engine()
    live = [
        engine.submit([i], max_tokens=30) for i in range(2)
    ]  # as many as staging has rows
    engine.step()
    waiting = engine.submit([9], max_tokens=5)
    with mock.patch.object(
        engine.programs, "run_chunk", side_effect=RuntimeError("device lost")
    ):
        engine.step()
    for request in live:
        with pytest.raises(RequestFailed, match="device lost"):
            request.result()
    assert engine.counters.failures == 1
    again = engine.submit([1], max_tokens=30)
    assert again.result().tokens == tokens_alone([1], max_tokens=30)
    assert waiting.result().tokens == tokens_alone([9], max_tokens=5)


def test_an_exception_that_no_request_can_report_is_raised():
    def broken(load, limits):
        raise ArithmeticError("of the scheduler")

    engine = make_engine(scheduler=broken)
    with pytest.raises(ArithmeticError, match="of the scheduler"):
        engine.submit([1], max_tokens=2).result()


def test_requests_fail_whose_shape_cannot_be_allocated():
    """Otherwise the engine would try to allocate it for ever."""
    engine = make_engine()
    request = engine.submit([1], max_tokens=2)
    no_memory = RuntimeError("no memory")
    with mock.patch.object(engine.programs, "reshape", side_effect=no_memory):
        with pytest.raises(RequestFailed, match="no memory"):
            request.result()


@pytest.mark.parametrize("name", ["run_chunk", "run_prefill", "pack", "reshape"])
def test_errors_with_a_success_between_them_never_end_the_engine(name):
    engine = make_engine()
    for _ in range(2 * MOST_ERRORS):
        live = [engine.submit([i], max_tokens=20) for i in range(2)]
        with broken(engine, name, times=1):
            while not all(request.finish for request in live):
                engine.step()
        assert all(fails_with(request, "device lost") for request in live)
        assert works(engine) and engine.failed is None
    assert engine.counters.failures == 2 * MOST_ERRORS


@pytest.mark.parametrize("has_thread", [False, True])
@pytest.mark.parametrize("names", [["run_prefill"], ["run_prefill", "reset"]], ids=str)
def test_errors_in_a_row_end_the_engine_and_every_request(names, has_thread):
    """Also those that wait on the host and those that a thread waits for."""
    engine = make_engine()
    error = RuntimeError("device lost")
    requests = [engine.submit([i], max_tokens=20) for i in range(12)]
    ended = []

    def wait(request):
        with pytest.raises(RequestFailed, match="device lost") as caught:
            request.result()
        ended.append(caught.value.__cause__)

    with broken(engine, *names, error=error):
        if has_thread:
            threads = [
                threading.Thread(target=wait, args=[request]) for request in requests
            ]
            engine.start()
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(30)
        else:
            for request in requests:
                wait(request)
    assert ended == [error] * 12 and engine.failed is error
    deadline = time.time() + 30
    while engine.running and time.time() < deadline:
        time.sleep(0.01)
    assert not engine.running and not engine.waiting and not engine.on_device
    # It has ended for good, although the device works again.
    assert not engine.step()
    for call in (lambda: engine.submit([1], max_tokens=2), engine.start):
        with pytest.raises(EngineFailed, match="ended by an error: device lost"):
            call()
    assert engine.counters.finished == engine.counters.submitted == 12
    assert engine.snapshot().waiting == 0


def test_an_error_without_a_request_to_report_it_is_not_lost_in_the_thread():
    """The scheduler fails in every step: the waiting request ends with the cause."""

    def scheduler(load, limits):
        raise ArithmeticError("of the scheduler")

    engine = make_engine(scheduler=scheduler)
    with engine:
        request = engine.submit([1], max_tokens=2)
        assert fails_with(request, "of the scheduler")
    assert isinstance(engine.failed, ArithmeticError)


def test_a_thread_that_ends_by_another_exception_leaves_no_request_waiting():
    engine = make_engine()
    requests = [engine.submit([i], max_tokens=20) for i in range(5)]
    with mock.patch.object(engine.stepper, "_plan", side_effect=SystemExit("stop")):
        with mock.patch.object(threading, "excepthook"):
            engine.start()
            assert all(fails_with(request, "stop") for request in requests)
    assert isinstance(engine.failed, SystemExit)


def test_an_empty_state_that_cannot_be_allocated_at_once_is_allocated_later():
    engine = make_engine()
    live = engine.submit([1], max_tokens=20)
    with broken(engine, "run_chunk", "reset", times=2):
        assert fails_with(live, "device lost")
    assert engine.failed is None and works(engine)


def test_interrupts_never_end_the_engine():
    engine = make_engine()
    for _ in range(MOST_ERRORS + 1):
        request = engine.submit([1], max_tokens=20)
        with broken(engine, "run_prefill", error=KeyboardInterrupt(), times=1):
            with pytest.raises(KeyboardInterrupt):
                request.result()
        assert fails_with(request, "interrupted halfway")
    assert engine.failed is None and works(engine)


def test_a_full_device_and_a_full_prefix_cache_make_requests_wait_and_no_more():
    """16 times as many requests as slots and staging hold; one block of prefixes."""
    engine = make_engine(prefix_memory="4KiB", prefix_block=8)
    assert engine.prefixes.room == 1
    prompts = [[i % 7] * (1 + i % 20) for i in range(80)]
    requests = [engine.submit(prompt, max_tokens=3) for prompt in prompts]
    seen = 0
    while engine.step():
        snapshot = engine.snapshot()
        seen = max(seen, snapshot.prefilling + snapshot.staged)
        assert snapshot.prefilling + snapshot.staged <= snapshot.staging_size
        assert snapshot.kv_used_bytes <= snapshot.kv_total_bytes
        assert snapshot.prefix_used_bytes <= engine.prefixes.budget
    assert seen == engine.capacity.staging_size
    for request, prompt in zip(requests, prompts):
        assert request.tokens == tokens_alone(prompt, max_tokens=3)
    assert engine.counters.failures == 0 and engine.prefixes.evicted


def test_a_device_error_while_the_host_reads_a_chunk():
    engine = make_engine()
    live = engine.submit([1], max_tokens=30)
    waiting = [engine.submit([i], max_tokens=4) for i in range(2, 8)]
    engine.step()
    with mock.patch.object(jax, "device_get", side_effect=RuntimeError("device lost")):
        while not live.finish:
            engine.step()
    assert fails_with(live, "device lost")
    results = [request.finish for request in waiting if not request.finish]
    assert results, "some requests waited on the host"
    for i, request in enumerate(waiting, 2):
        if not request.finish:
            assert request.result().tokens == tokens_alone([i], max_tokens=4)


# ---------------------------------------------------------------- interrupts


@pytest.mark.parametrize("max_tokens", [12, 60])
def test_an_interrupt_while_the_host_waits_for_the_device_loses_nothing(max_tokens):
    """When the interrupt comes, the device has decoded 12 tokens, but not yet 60."""
    engine = make_engine(slots=2)
    request = engine.submit([1, 2], max_tokens=max_tokens)
    for _ in range(3):
        engine.step()
    with mock.patch.object(jax, "device_get", side_effect=KeyboardInterrupt):
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                engine.step()
    assert request.result().tokens == tokens_alone([1, 2], max_tokens=max_tokens)
    assert engine.counters.failures == 0
    finish(engine)
    assert not engine.on_device


class InterruptAt:
    """A profile function: KeyboardInterrupt at the n-th call or return in serve/.

    Python looks for signals at these places.
    """

    def __init__(self, n):
        self.remaining = n

    def __call__(self, frame, event, argument):
        if event in ("call", "c_return") and "/serve/" in frame.f_code.co_filename:
            self.remaining -= 1
            if self.remaining == 0:
                raise KeyboardInterrupt


@functools.cache
def interrupted_engine(fit_shapes):
    """Shared by no other test: chunks that an interrupt drops stay in its counters."""
    return long_engine.__wrapped__(fit_shapes, 3)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5000), st.booleans())
def test_after_an_interrupt_at_any_moment_tokens_are_exact_or_the_request_fails(
    at, fit
):
    engine = interrupted_engine(fit)
    submitted = submit_all(engine, [*WAITERS[:2], WAITERS[5], WAITERS[2]])
    submitted[1][0].cancel()
    sys.setprofile(InterruptAt(at))
    try:
        while engine.step():
            pass
    except KeyboardInterrupt:
        pass
    finally:
        sys.setprofile(None)
    for i, (request, prompt, options) in enumerate(submitted):
        try:
            request.result()
        except RequestFailed as error:
            assert "interrupted" in str(error)
        else:
            whole = tokens_alone(prompt, model_config=LONG, **options)
            assert request.tokens == whole or request.finish == "cancelled", i
    prompt, options = WAITERS[3]
    again = engine.submit(prompt, **options)
    assert again.result().tokens == tokens_alone(prompt, model_config=LONG, **options)
    finish(engine)
    assert not engine.on_device and not engine.waiting
