"""What an engine says of itself while it serves."""

import threading

import pytest
from helpers import make_engine

from ladder_jax.serve.snapshot import SlotView

pytestmark = pytest.mark.usefixtures("fast_compiler")


def test_slots_are_those_of_the_last_chunk_that_the_host_has_read():
    """Without a chunk that the host has not read, they are the device's own."""
    engine = make_engine(pipelined=False, slots=3, staging=2, fit_shapes=True)
    requests = [engine.submit([i, 2], max_tokens=3 + 5 * i) for i in range(8)]
    requests[4].cancel()
    counts = set()
    while engine.step():
        snapshot = engine.snapshot()
        state = engine.programs.state.slots.state
        on_device = [
            int(number) if active else None
            for number, active in zip(state.request, state.active)
        ]
        views = snapshot.slots
        assert [view and view.request for view in views] == on_device + [None] * (
            3 - len(on_device)
        )
        for view in filter(None, views):
            request = requests[view.request - 1]
            expected = view.request, 2, len(request.tokens), request.max_tokens
            assert view == SlotView(*expected)
        assert snapshot.waiting == engine.waiting
        assert len(snapshot.slots) == 3 == engine.capacity.slots
        unfinished = snapshot.prefilling + snapshot.staged + snapshot.busy_slots
        assert unfinished == engine.on_device
        live = [r for r in requests if r.admitted and not r.finish]
        tokens = sum(len(r.prompt) + len(r.tokens) for r in live if r.tokens)
        not_read = sum(len(r.prompt) for r in live if not r.tokens)
        used = snapshot.kv_used_bytes // engine.capacity.token_bytes
        assert tokens <= used <= tokens + not_read
        counts.add(snapshot.busy_slots)
    assert counts == {0, 1, 2, 3}
    last = engine.snapshot()
    assert last.kv_used_bytes == last.busy_slots == last.staged == last.waiting == 0
    assert last.kv_total_bytes == 5 * 64 * engine.capacity.token_bytes
    assert last.counters == engine.counters and last.counters is not engine.counters
    assert last.programs_compiled == engine.compiled()[0]
    assert last.queue_size == engine.options.queue_size


def test_a_request_says_when_the_device_took_it():
    engine = make_engine(slots=1, staging=1)
    requests = [engine.submit([i], max_tokens=4) for i in range(4)]
    assert [request.admitted for request in requests] == [None] * 4
    requests[2].cancel()
    for request in requests:
        request.result()
    assert requests[2].admitted is None
    times = [requests[i].admitted for i in (0, 1, 3)]
    assert times == sorted(times)
    for request in (requests[i] for i in (0, 1, 3)):
        assert request.submitted <= request.admitted <= request.times[0]


def test_another_thread_may_look_at_any_time():
    engine = make_engine(fit_shapes=True)
    errors, done = [], threading.Event()

    def look():
        while not done.is_set():
            try:
                snapshot = engine.snapshot()
                assert snapshot.busy_slots <= 3 and snapshot.waiting <= 40
            except Exception as error:
                errors.append(error)

    threads = [threading.Thread(target=look) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        engine.generate([[i] for i in range(40)], max_tokens=3)
    finally:
        done.set()
        for thread in threads:
            thread.join(30)
    assert not errors
