"""An engine's chunks have as many iterations as fit in decode.burst_ms.

The tests set the engine's clock, so that the speed of the machine has no effect.
"""

from unittest import mock

import jax
import pytest
from engines import run
from helpers import make_engine, make_requests, tokens_alone

from ladder_jax import decode_state
from ladder_jax.serve import calls

device_get = jax.device_get


class SlowDevice:
    """A clock that goes on while the host waits for a chunk, and at no other time.

    engine: its chunks take `seconds` an iteration, and the host waits for each.
    """

    def __init__(self, engine, seconds):
        self.engine, self.seconds, self.now = engine, seconds, 0.0
        engine.stepper.pace.clock = lambda: self.now

    def get(self, arrays):
        results = device_get(arrays)
        is_chunk = type(results) is tuple and len(results) == 2
        if is_chunk and results[0] is not None:
            busy = (results[0].flag != decode_state.IDLE).any(axis=1)
            fixed = self.engine.programs.spec.fixed_trip_count
            self.now += self.seconds * (len(busy) if fixed else int(busy.sum()))
        return results


@pytest.fixture(autouse=True)
def has_ended():
    """Whether chunks have ended before the host waits for them."""
    with mock.patch.object(calls, "has_ended", return_value=False) as patched:
        yield patched


def chunk_lengths(seconds, requests, **options):
    """The iterations of an engine's chunks, if each takes `seconds`."""
    engine = make_engine(trace=True, **options)
    device = SlowDevice(engine, seconds)
    with mock.patch.object(jax, "device_get", side_effect=device.get):
        run(engine, requests)
    return [len(chunk) for _, chunk, *_ in engine.history]


LONG_REQUESTS = [([i], dict(max_tokens=50, seed=i)) for i in range(3)]


@pytest.mark.parametrize(
    "seconds, burst_ms, loop, expected",
    [
        (0.001, 50, "while", 4),
        (0.015, 50, "while", 3),
        (0.045, 50, "while", 1),
        (0.900, 50, "while", 1),
        (0.900, 0, "while", 4),
        (0.010, 45, "fixed", 4),  # compiled: 1 and 4
        (0.010, 35, "fixed", 1),
        (0.900, 50, "fixed", 1),
    ],
)
def test_a_chunk_has_as_many_iterations_as_fit(seconds, burst_ms, loop, expected):
    lengths = chunk_lengths(seconds, LONG_REQUESTS, burst_ms=burst_ms, loop=loop)
    # The first chunks are short: nothing is known. The last one is short: little is
    # left to do.
    assert set(lengths[6:-2]) == {expected}, lengths
    assert max(lengths) == expected, lengths


@pytest.mark.parametrize("burst_ms", [0.1, 3, 7.5, 20, 0])
def test_tokens_are_the_same_for_every_burst(burst_ms):
    lengths = chunk_lengths(0.002, make_requests(6), burst_ms=burst_ms)
    assert max(lengths) <= max(burst_ms / 2, 1) or not burst_ms


def test_chunks_shrink_when_iterations_become_slow_and_grow_again():
    engine = make_engine(trace=True, burst_ms=50)
    device = SlowDevice(engine, 0.001)
    with mock.patch.object(jax, "device_get", side_effect=device.get):
        request = engine.submit([1], max_tokens=60)
        seen = []
        for seconds in (0.001, 0.030, 0.002):
            device.seconds, before = seconds, len(engine.history)
            while len(engine.history) < before + 6 and engine.step():
                pass
            seen.append([len(chunk) for _, chunk, *_ in engine.history[before:]])
    assert [lengths[-1] for lengths in seen] == [4, 1, 4], seen
    assert request.result().tokens == tokens_alone([1], max_tokens=60)


def test_chunks_grow_while_the_host_does_not_wait_for_them(has_ended):
    """The host needs 60 ms for each chunk; the device is faster."""
    engine = make_engine(trace=True, burst_ms=50)
    device, has_ended.return_value = SlowDevice(engine, 0.0), True

    def get_slowly(arrays):
        device.now += 0.06
        return device_get(arrays)

    with mock.patch.object(jax, "device_get", side_effect=get_slowly):
        request = engine.submit([1], max_tokens=60).result()
    lengths = [len(chunk) for _, chunk, *_ in engine.history]
    assert lengths[0] == 1 and set(lengths[10:-2]) == {4}, lengths
    assert request.tokens == tokens_alone([1], max_tokens=60)


def test_programs_that_compile_are_not_in_the_estimate():
    """The first chunks take 1000 s longer, as other programs are compiled meanwhile."""
    engine = make_engine(burst_ms=50)
    device, count = SlowDevice(engine, 0.001), 0
    run_chunk = engine.programs.run_chunk

    def compile_and_run(cancelled, steps):
        nonlocal count
        if count < 3:
            count, device.now = count + 1, device.now + 1000
        return run_chunk(cancelled, steps)

    engine.programs.compiled = lambda: (count, 9)
    engine.programs.run_chunk = compile_and_run
    with mock.patch.object(jax, "device_get", side_effect=device.get):
        run(engine, LONG_REQUESTS)
    assert count == 3
    assert engine.stepper.pace.seconds(3) == pytest.approx(0.001)


def test_prefill_is_not_in_the_estimate():
    engine = make_engine(burst_ms=50)
    device = SlowDevice(engine, 0.001)

    def wait_for_prefill(arrays):
        device.now += 0.5
        return arrays

    with (
        mock.patch.object(jax, "device_get", side_effect=device.get),
        mock.patch.object(jax, "block_until_ready", side_effect=wait_for_prefill),
    ):
        run(engine, make_requests(12))
    assert engine.counters.prefill_calls > 5
    assert engine.stepper.pace.seconds(3) == pytest.approx(0.001)


# ---------------------------------------------------------------- arrivals


def test_first_tokens_do_not_wait_for_the_chunk_after_the_prompts():
    engine = make_engine(slots=2)
    fetch = calls.Calls.fetch
    waits = []  # for each chunk: how many tokens the request has before it is read

    def watched(self):
        waits.append(len(request.tokens))
        return fetch(self)

    with mock.patch.object(calls.Calls, "fetch", watched):
        request = engine.submit([1], max_tokens=9)
        while engine.step():
            pass
    assert waits[0] == 1 and len(request.tokens) == 9


def waiting_engine(act, **options):
    """An engine, and the times that it waited for arrivals; `act` runs in each wait."""
    engine = make_engine(**options)
    waits = []

    def wait(self):
        waits.append([request.finish for request in engine.requests])
        act(engine)

    engine.requests = []
    patch = mock.patch.object(calls.Calls, "wait_until_nearly_done", wait)
    return engine, waits, patch


def test_a_request_that_arrives_in_the_wait_is_in_the_next_chunk():
    requests = [([i, 5], dict(max_tokens=30, seed=i)) for i in range(3)]
    started = []  # the chunks that were started when a request came and when it began

    def arrive(engine):
        if len(engine.requests) < len(requests):
            prompt, options = requests[len(engine.requests)]
            engine.requests.append(engine.submit(prompt, **options))
            started.append(engine.counters.chunks)

    engine, waits, patch = waiting_engine(arrive, slots=4)
    with patch:
        arrive(engine)
        while engine.step(wait=True):
            pass
    assert len(waits) > 3
    for request, (prompt, options) in zip(engine.requests, requests):
        assert list(request.tokens) == tokens_alone(prompt, **options)
    # A request came while one chunk was on the device, and no other was queued there.
    assert started == [0, 1, 2]


@pytest.mark.parametrize("waits", [True, False])
def test_chunks_are_short_while_slots_are_free(waits):
    """An iteration hides the host's work. Four would fit in burst_ms."""
    engine = make_engine(trace=True, slots=2, burst_ms=50)
    device = SlowDevice(engine, 0.010)
    engine.stepper.pace.add_host = lambda seconds: None  # of the test's clock
    engine.stepper.pace._host.append(0.001)
    request = engine.submit([1], max_tokens=40)
    with (
        mock.patch.object(jax, "device_get", side_effect=device.get),
        mock.patch.object(calls.Calls, "wait_until_nearly_done"),
    ):
        while engine.step(wait=waits):
            pass
    lengths = [len(chunk) for _, chunk, *_ in engine.history]
    assert set(lengths[-8:-3]) == ({1} if waits else {4}), lengths
    assert list(request.tokens) == tokens_alone([1], max_tokens=40)


@pytest.mark.parametrize("change", ["full", "queued", "not asked", "one call a time"])
def test_there_is_no_wait_if_an_arrival_could_not_start(change):
    options = dict(slots=2, staging=1) if change == "queued" else dict(slots=2)
    if change == "one call a time":
        options |= dict(pipelined=False)
    engine, waits, patch = waiting_engine(lambda engine: None, **options)
    count = {"full": 2, "queued": 3}.get(change, 1)
    lengths = [8, 8, 8] if change != "full" else [8, 8]
    engine.requests += [
        engine.submit([i], max_tokens=lengths[i], ignore_eos=True) for i in range(count)
    ]
    with patch:
        while engine.step(wait=change != "not asked"):
            live = sum(not request.finish for request in engine.requests)
            if change in ("full", "queued") and live >= 2:
                assert not waits
    if change in ("not asked", "one call a time"):
        assert not waits
