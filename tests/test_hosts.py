"""Engines of several processes take the same steps: with a channel in memory, and with
processes of their own.
"""

import dataclasses
import functools
import queue
import threading
import time

import helpers
import numpy as np
import pytest
from helpers import make_requests, tokens_alone
from hypothesis import given, settings
from hypothesis import strategies as st

from ladder_jax.data.tokenizer import ByteTokenizer
from ladder_jax.hardware import channel as channels
from ladder_jax.hardware.roll_call import Missing
from ladder_jax.serve import hosts
from ladder_jax.serve.request import EngineFailed, QueueFull, RequestFailed
from ladder_jax.serve.submission import check_request

TOKENIZER = ByteTokenizer()


class Store:
    """What a coordination service stores; `Channel`s of several processes share it."""

    def __init__(self, count=2):
        self.count, self.values, self.changed = count, {}, threading.Condition()
        self.puts = 0


class MemoryChannel:
    """A channel between engines of one process."""

    def __init__(self, store, number):
        self.store, self.number, self.count = store, number, store.count

    def put(self, key, value):
        with self.store.changed:
            self.store.values[key] = value
            self.store.puts += 1
            self.store.changed.notify_all()

    def get(self, key, seconds):
        with self.store.changed:
            there = lambda: key in self.store.values
            return self.store.values[key] if self._wait(there, seconds) else None

    def _wait(self, condition, seconds):
        return self.store.changed.wait_for(condition, seconds)

    def folder(self, key):
        with self.store.changed:
            found = self.store.values.items()
            return {
                name.removeprefix(f"{key}/"): value
                for name, value in found
                if name.startswith(f"{key}/")
            }

    def delete(self, key):
        with self.store.changed:
            for name in list(self.store.values):
                if name == key or name.startswith(f"{key}/"):
                    del self.store.values[name]


class StillWatch:
    """A watch that nobody is lost to. step, steps: as of channel.Watch."""

    def __init__(self, lost=None):
        self.step, self.steps, self.lost = 0, {}, lost
        self.stopping = False

    def least_step(self):
        return min(self.steps.values(), default=0)

    def wait_for_lost(self, seconds=None):
        return self.lost


@functools.cache
def pair():
    """A leading and a following engine, compiled."""
    store = Store()
    made = []
    for number, kind in enumerate((hosts.LeadingEngine, hosts.FollowingEngine)):
        channel, watch = MemoryChannel(store, number), StillWatch()
        mesh = helpers.make_mesh(tensor=1)
        engine = kind(
            channel,
            watch,
            helpers.initial_parameters(helpers.ENGINE_MODEL, mesh),
            helpers.ENGINE_MODEL,
            mesh,
            dataclasses.replace(helpers.ENGINE_OPTIONS, queue_size=8),
            TOKENIZER,
        )
        engine.warm_up()
        made.append(engine)
    return made


def catch_up(follower):
    """Takes the follower's steps until there is no message left."""
    while (
        message := follower._channel.get(hosts._key(follower._watch.step), 0)
    ) is not None:
        follower._watch.step += 1
        arrivals = hosts.decode(message)
        assert arrivals.end is None
        follower._apply(arrivals)
        follower.stepper.step(arrivals.fitting)


def state_of(engine):
    """What two engines must agree on after each step."""
    tracker = engine.stepper.tracker
    return dict(
        records=[
            (r.request.number, r.phase, r.staging_index, r.ticket, r.computed, r.cancel)
            for r in tracker
        ],
        tokens=[(r.request.number, r.request.tokens, r.request.text) for r in tracker],
        waiting=[request.number for request in engine.stepper.queue],
        shape=(engine.programs.width, engine.programs.length),
        chunks=engine.counters.chunks,
        prefills=engine.counters.prefill_calls,
        failures=engine.counters.failures,
    )


# ---------------------------------------------------------------- the same steps


def test_arrivals_survive_the_way():
    accepts = pair()[0]._accepts
    options = dict(
        max_tokens=7,
        stop=["a", "béd"],
        stop_token_ids=[3, 9],
        temperature=0.1 + 0.2,
        seed=2**32 - 1,
        logit_bias={5: 1.5, "9": -2},
        priority=-3,
        logprobs=2,
    )
    submissions = [
        check_request("hello", {}, accepts),
        check_request([1, 2, 3], options, accepts),
    ]
    numbered = [(7, submissions[0]), (2**40, submissions[1])]
    sent = hosts.Arrivals(numbered, [1, 2**40], {1: 16, 4: 3})
    got = hosts.decode(hosts.encode(sent))
    assert got.cancelled == sent.cancelled and got.end is None
    assert got.fitting == sent.fitting
    for (number, before), (same, after) in zip(sent.submitted, got.submitted):
        assert number == same
        for field in dataclasses.fields(before):
            x, y = getattr(before, field.name), getattr(after, field.name)
            if field.name == "params":
                for a, b in zip(x, y, strict=True):
                    assert a.dtype == b.dtype and np.array_equal(a, b)
            elif field.name == "prompt":
                assert x.dtype == y.dtype and np.array_equal(x, y)
            else:
                assert x == y and type(x) is type(y), field.name
    assert hosts.decode(hosts.encode(hosts.Arrivals([], [], {}, "x"))).end == "x"
    # No message makes this process run code: it holds numbers and text alone.
    with pytest.raises(Exception, match=r"unpack|extra|Unpack|msgpack"):
        hosts.decode(b"\x80\x04\x95cos\nsystem\n.")


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_a_follower_takes_the_same_steps_whatever_arrives_and_is_cancelled(data):
    leader, follower = pair()
    drawn = data.draw(st.permutations(make_requests(8, longest=30)), "order")
    requests = [([i % 256 for i in prompt], options) for prompt, options in drawn]
    cancel_at = data.draw(
        st.dictionaries(st.integers(0, 7), st.integers(0, 6), max_size=4), "cancelled"
    )
    gaps = data.draw(st.lists(st.integers(0, 3), min_size=8, max_size=8), "gaps")
    lag = data.draw(st.integers(1, 4), "steps that the follower is late")
    stop = data.draw(st.integers(0, 7), "a request with a stop string")
    fits = data.draw(st.lists(st.none() | st.integers(1, 4)), "what fits, step by step")
    submitted, steps = [], 0
    width = leader.capacity.slots

    def step():
        nonlocal steps
        # The leader alone knows what fits.
        fitting = fits[steps % len(fits)] if fits else None
        leader.stepper.pace.fitting = {} if fitting is None else {width: fitting}
        had_work, steps = leader.step(), steps + 1
        for i, when in list(cancel_at.items()):
            if i < len(submitted) and when <= steps:
                submitted[i][0].cancel()
                del cancel_at[i]
        if steps % lag == 0:
            catch_up(follower)
            assert state_of(leader) == state_of(follower)
        return had_work

    for i, ((prompt, options), gap) in enumerate(zip(requests, gaps)):
        if i == stop:
            expected = TOKENIZER.decode(alone(prompt, options))
            options = options | dict(stop=expected[1:3] or "x")
        submitted.append((leader.submit(prompt, **options), prompt, options))
        for _ in range(gap):
            step()
    while step() or leader.waiting:
        pass
    catch_up(follower)
    assert state_of(leader) == state_of(follower)
    assert not list(follower.stepper.tracker)
    for request, prompt, options in submitted:
        assert request.finish in ("length", "stop", "cancelled")
        if "stop" in options or request.finish == "cancelled":
            continue
        assert request.tokens == alone(prompt, options)
    assert leader.counters.failures == 0
    assert leader.counters.finished == leader.counters.submitted


def alone(prompt, options):
    return tokens_alone(
        prompt, stop_token_ids=TOKENIZER.eos_ids, vocabulary=TOKENIZER.size, **options
    )


def test_a_cancelled_request_that_nobody_has_seen_ends_at_once():
    leader, follower = pair()
    messages = leader._channel.store.puts
    request = leader.submit("hello")
    assert leader.waiting == 1
    request.cancel()
    assert request.finish == "cancelled" and not leader.waiting
    assert not leader.step() and leader._channel.store.puts == messages
    request.cancel()  # it has ended: nothing to send
    assert not leader.step() and leader._channel.store.puts == messages
    catch_up(follower)


def test_an_idle_engine_sends_nothing_and_old_messages_are_deleted():
    leader, follower = pair()
    store = leader._channel.store
    with leader_thread(leader):
        for _ in range(2 * hosts.BLOCK):
            leader.submit([1], max_tokens=1).result()
        time.sleep(0.2)
        messages = store.puts
        time.sleep(0.5)
        assert store.puts == messages
        catch_up(follower)
        before = len(store.values)
        leader._watch.steps = {1: follower._watch.step}
        leader.submit([1], max_tokens=1).result()
        time.sleep(0.2)
        assert len(store.values) < before - hosts.BLOCK
    catch_up(follower)


class leader_thread:
    """Runs the engine's thread; `close` would end the pair for good."""

    def __init__(self, engine):
        self.engine = engine

    def __enter__(self):
        self.engine.start()

    def __exit__(self, *_):
        self.engine._closing = True
        self.engine._wake.set()
        self.engine._thread.join()


def test_the_queue_counts_what_has_not_been_sent():
    leader, follower = pair()
    requests = [leader.submit([1], max_tokens=1) for _ in range(8)]
    with pytest.raises(QueueFull, match="8 requests wait already"):
        leader.submit([1])
    for request in requests:
        request.cancel()
    assert leader.submit([1], max_tokens=1).result().finish == "length"
    catch_up(follower)


# ---------------------------------------------------------------- the end


def fresh_pair(lost=None):
    """A pair of its own, which may end. It shares the compiled programs."""
    pair()
    make = pair.__wrapped__
    leader, follower = make()
    leader._watch.lost = lost
    return leader, follower


def test_close_ends_the_followers():
    leader, follower = fresh_pair()
    with leader_thread(leader):
        assert leader.submit([1], max_tokens=3).result().finish == "length"
    leader.close()
    leader.close()
    follower.follow()
    assert follower.counters.tokens == leader.counters.tokens == 3
    with pytest.raises(RuntimeError, match="closed for good"):
        leader.start()


def test_an_error_of_a_step_ends_all_and_names_the_lost_process(monkeypatch):
    line = "process 1 of 2 (host, pid 7) is lost"
    leader, follower = fresh_pair(lost=line)
    request = leader.submit([1], max_tokens=30)
    leader.step()

    def broken(*_):
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(leader.programs, "run_chunk", broken)
    while leader.failed is None:
        leader.step()
    assert str(leader.failed) == line and request.finish == "error"
    with pytest.raises(RequestFailed):
        list(request)
    with pytest.raises(EngineFailed, match="is lost"):
        leader.submit([1])
    with pytest.raises(RuntimeError, match="process 0 ended: process 1 .* is lost"):
        follower.follow()


def test_a_lost_process_fails_requests_although_the_device_never_answers(monkeypatch):
    leader, _ = fresh_pair()
    hangs = threading.Event()
    monkeypatch.setattr(leader.programs, "run_chunk", lambda *_: hangs.wait(60))
    requests = [leader.submit([1], max_tokens=30) for _ in range(3)]
    leader.start()
    late = leader.submit([2])
    time.sleep(0.3)
    leader._watch.lost = "process 1 of 2 is lost"
    start = time.monotonic()
    leader._watch.on_lost(leader._watch.lost)
    for request in [*requests, late]:
        with pytest.raises(RequestFailed, match="process 1 of 2 is lost"):
            list(request)
    leader.close()
    assert time.monotonic() - start < 25
    hangs.set()


def test_an_error_of_a_follower_ends_it(monkeypatch):
    leader, follower = fresh_pair()
    request = leader.submit([1], max_tokens=2)

    def broken(*_):
        raise RuntimeError("device lost")

    monkeypatch.setattr(follower.programs, "run_prefill", broken)
    request.result()
    with pytest.raises(RuntimeError, match="a step failed"):
        follower.follow()


# ---------------------------------------------------------------- signs of life


def test_a_process_that_does_not_answer_is_lost_once_and_named(monkeypatch):
    monkeypatch.setattr(channels, "BEAT", 0.05)
    store, found, stops = Store(3), queue.Queue(), []
    watches = [channels.Watch(MemoryChannel(store, n), 2.0) for n in range(3)]
    for watch in watches:
        watch.starting = False
    watches[0].on_lost = found.put
    watches[0].on_stop = lambda: stops.append(time.monotonic())
    watches[1].step, watches[2].step = 5, 9
    time.sleep(0.4)
    assert watches[0].least_step() == 5 and watches[0].lost is None and not stops
    watches[1].stopping = True
    watches[2].end()  # its thread ends: it shows no sign of life any more
    line = found.get(timeout=10)
    assert line.startswith("process 2 of 3 (") and "pid " in line
    assert line.endswith("is lost: it has not answered for 2 s")
    assert watches[0].wait_for_lost(0) == line and stops
    for watch in watches:
        watch.end()
    assert found.empty()


def test_exchange_names_the_process_that_does_not_answer():
    channel = channels.Channel.__new__(channels.Channel)
    memory = MemoryChannel(Store(2), 0)
    channel.number, channel.count = 0, 2
    channel.put, channel.get = memory.put, memory.get
    with pytest.raises(Missing, match="process 1 of 2 did not say its check wit"):
        channel.exchange("check", "a", 0.1)
    memory.put("check/1", b"b")
    assert channel.exchange("check", "a", 5) == ["a", "b"]
