"""The engine's tokens are those that `generate` gives for one request alone.

Whatever runs beside a request, and whatever happens to its neighbours.
"""

import asyncio
import dataclasses
import functools
import gc
import json
import os
import socket
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ladder_jax import decode, generate, sharding
from ladder_jax import model as transformer
from ladder_jax.config import ConfigError, Decode, Mesh, Model, to_bytes
from ladder_jax.data.tokenizer import ByteTokenizer
from ladder_jax.serve.engine import Engine
from ladder_jax.serve.request import EngineClosed, QueueFull, RequestFailed, Token
from ladder_jax.serve.scheduler import plan_step

CONFIG = Model(
    vocab_size=264,
    dim=32,
    layers=2,
    heads=8,
    kv_heads=8,
    head_dim=4,
    ffn_dim=48,
    residual="ladder",
    dtype="float32",
    max_length=64,
    init_std=0.3,
)
OPTIONS = Decode(
    slots=3,
    staging=2,
    steps_per_call=4,
    prefill_budget=16,
    max_length=64,
    fit_shapes=False,
    max_logprobs=3,
    max_stop_ids=2,
    max_logit_bias=2,
)


@functools.cache
def mesh(tensor=1):
    return sharding.make_mesh(Mesh(data=1, tensor=tensor), jax.devices()[:tensor])


@functools.cache
def model(config=CONFIG, tensor=1):
    init = functools.partial(transformer.init, config)
    specs = sharding.parameter_specs(jax.eval_shape(init, jax.random.key(0)))
    return jax.jit(init, out_shardings=sharding.named_shardings(mesh(tensor), specs))(
        jax.random.key(0)
    )


def make_engine(config=CONFIG, tensor=1, tokenizer=None, **options):
    options = {
        name: options.pop(name)
        for name in ("trace", "pipelined", "scheduler")
        if name in options
    } | dict(options=dataclasses.replace(OPTIONS, **options))
    return Engine(
        model(config, tensor), config, mesh(tensor), tokenizer=tokenizer, **options
    )


@functools.cache
def _alone(config, tensor, prompt, options):
    """As many tokens as fit, so that few shapes are compiled.

    A request with fewer max_tokens has the beginning of them.
    """
    return list(
        generate.generate(
            model(config, tensor),
            config,
            mesh(tensor),
            prompt,
            max_tokens=config.max_length - len(prompt),
            **json.loads(options),
        )
    )


def alone(prompt, config=CONFIG, tensor=1, stop_token_ids=(), max_tokens=16, **options):
    """The reference's tokens for one request by itself."""
    options = json.dumps(options, sort_keys=True)  # as text, for the cache's key
    tokens = _alone(config, tensor, tuple(prompt), options)[:max_tokens]
    stops = [i for i, token in enumerate(tokens) if token in stop_token_ids]
    return tokens[: stops[0]] if stops else tokens


def requests(count, seed=0, longest=40):
    """(prompt, options) of all kinds."""
    rng = np.random.default_rng(seed)
    kinds = [
        dict(),
        dict(temperature=1.0),
        dict(temperature=0.8, top_k=7),
        dict(temperature=1.1, top_p=0.7),
        dict(repetition_penalty=1.4, presence_penalty=0.3, frequency_penalty=0.2),
        dict(temperature=1.0, min_p=0.1, logit_bias={5: 4.0, 9: -3.0}),
    ]
    asked = []
    for i in range(count):
        prompt = rng.integers(0, 264, rng.integers(1, longest)).tolist()
        options = dict(max_tokens=int(rng.integers(1, 25)), seed=i)
        asked.append((prompt, kinds[i % len(kinds)] | options))
    return asked


def check(engine, submitted, **where):
    """Every request has exactly its reference's tokens; the state is empty again."""
    for request, prompt, options in submitted:
        assert request.tokens == alone(prompt, **options, **where), (prompt, options)
        assert request.finish == (
            "length" if len(request.tokens) == options["max_tokens"] else "stop"
        )
    while engine.step():
        pass
    state = jax.device_get(engine.programs.state)
    assert not state.slots.state.active.any()
    assert (state.staging.state.admission_order == decode.NOT_WAITING).all()
    assert not list(engine.stepper.tracker) and not engine.waiting
    assert engine.counters.syncs == engine.counters.chunks
    if engine.stepper.trace:
        assert len(engine.history) == engine.counters.chunks


def run(engine, asked, **where):
    submitted = [
        (engine.submit(prompt, **options), prompt, options) for prompt, options in asked
    ]
    for request, *_ in submitted:
        request.result()
    check(engine, submitted, **where)
    return submitted


# ---------------------------------------------------------------- token-exact


def test_more_requests_than_slots_have_the_tokens_they_have_alone():
    engine = make_engine(trace=True)
    submitted = run(engine, requests(20, longest=7))
    # A slot was taken again inside a chunk: one column of its events has two requests.
    refills = [
        any(len(set(column[column >= 0])) > 1 for column in chunk.T)
        for _, chunk in engine.history
    ]
    assert sum(refills) >= 3
    seen = [
        (int(r), i)
        for i, (_, chunk) in enumerate(engine.history)
        for r in chunk[chunk >= 0]
    ]
    first = len(submitted)  # one token of each came from its prefill
    assert (
        len(seen) + first
        == sum(len(r.tokens) for r, *_ in submitted)
        == engine.counters.tokens
    )


@settings(max_examples=8, deadline=None)
@given(st.data())
def test_arrival_order_stops_cancellations_and_chunk_length_change_nothing(data):
    """One engine, which has compiled all before; `steps` shortens its chunks."""
    engine = shared_engine()
    compiled = engine.compiled()
    CHUNK_STEPS[:] = [data.draw(st.integers(1, 4), "iterations a chunk")]
    asked = data.draw(st.permutations(requests(10)), "order")
    gaps = data.draw(
        st.lists(st.integers(0, 3), min_size=10, max_size=10), "steps between arrivals"
    )
    cancelled = data.draw(st.sets(st.integers(0, 9), max_size=3), "cancelled")
    stopped = data.draw(st.sets(st.integers(0, 9), max_size=4), "stopped")
    submitted = []
    for i, ((prompt, options), gap) in enumerate(zip(asked, gaps)):
        if i in stopped:  # at a token that it is known to emit
            tokens = alone(prompt, **options)
            options = options | dict(stop_token_ids=(tokens[len(tokens) // 2],))
        submitted.append((engine.submit(prompt, **options), prompt, options))
        for _ in range(gap):
            engine.step()
        if i in cancelled:
            submitted[-1][0].cancel()
    for request, *_ in submitted:
        request.result()
    for i in cancelled:
        request, prompt, options = submitted[i]
        assert request.finish in ("cancelled", "length", "stop")
        whole = alone(prompt, **options)
        assert request.tokens == whole[: len(request.tokens)]
    check(engine, [x for i, x in enumerate(submitted) if i not in cancelled])
    assert engine.compiled() == compiled, "a program was compiled for a known shape"


CHUNK_STEPS = []  # the iterations of shared_engine's chunks, if not empty


@functools.cache
def shared_engine():
    def chunks_of_drawn_length(load, limits):
        step = plan_step(load, limits)
        return (
            step._replace(chunk_steps=CHUNK_STEPS[0])
            if step.chunk_steps and CHUNK_STEPS
            else step
        )

    engine = make_engine(scheduler=chunks_of_drawn_length)
    engine.warm_up()
    return engine


@pytest.mark.parametrize(
    "changes",
    [
        dict(loop="fixed"),
        dict(unroll_layers=False),
        dict(steps_per_call=1),
        pytest.param(dict(slots=1, staging=1), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_ways_of_running_have_the_same_tokens(changes):
    run(make_engine(**changes), requests(6))


def test_a_loop_that_cannot_end_early_runs_no_more_than_is_left_to_do():
    engine = make_engine(loop="fixed")
    assert engine.capacity.chunk_sizes == [1, 4]
    assert make_engine().capacity.chunk_sizes == [4]
    run(engine, [([1, 2], dict(max_tokens=2))])  # one by prefill, one by the loop
    assert (engine.counters.chunks, engine.counters.iterations) == (1, 1)
    run(engine, [([3], dict(max_tokens=12))])
    assert (engine.counters.chunks, engine.counters.iterations) == (4, 13)
    run(
        engine, [([4], dict(max_tokens=1))]
    )  # prefill's token alone comes to the host with a chunk, too
    assert (engine.counters.chunks, engine.counters.iterations) == (5, 14)
    assert engine.compiled()[0] <= engine.compiled()[1]


@pytest.mark.parametrize(
    "residual, tensor",
    [
        ("ladder", 8),
        ("hybrid:last1", 2),
        ("desync:2", 2),
        ("parallel", 1),
        *(
            pytest.param(residual, 2, marks=pytest.mark.slow)
            for residual in ("standard", "ladder:1,2", "parallel")
        ),
    ],
)
def test_residual_schedules_and_tensor_shards(residual, tensor):
    """The reference runs on one device, but for desync on the same mesh.

    The streams of desync's ranks are part of the model.
    """
    config = dataclasses.replace(CONFIG, residual=residual)
    run(
        make_engine(config, tensor),
        requests(4, longest=15),
        config=config,
        tensor=tensor if "desync" in residual else 1,
    )


def test_the_compiled_shape_follows_what_is_live():
    """It grows for a burst of requests, and shrinks while one of them goes on.

    The memory shuffle changes no token.
    """
    long = dataclasses.replace(CONFIG, max_length=128)
    engine = make_engine(
        long, fit_shapes=True, slots=4, staging=2, steps_per_call=2, max_length=None
    )
    widths = []
    asked = [
        ([1, 2, 3], dict(max_tokens=80, seed=1)),
        *[([i], dict(max_tokens=6, seed=i)) for i in range(5)],
    ]
    submitted = [
        (engine.submit(prompt, **options), prompt, options) for prompt, options in asked
    ]
    while engine.step():
        widths.append((engine.programs.width, engine.programs.length))
    check(engine, submitted, config=long)
    assert max(w for w, _ in widths) == 4
    assert (4, 64) in widths and (1, 128) in widths and engine.counters.reshapes >= 3
    assert engine.compiled()[0] <= engine.compiled()[1]


@pytest.mark.parametrize(
    "kv_dtype", [pytest.param("bfloat16", marks=pytest.mark.slow), "int8"]
)
def test_a_bfloat16_or_int8_cache_mostly_agrees(kv_dtype):
    asked = [(prompt, dict(max_tokens=8)) for prompt, _ in requests(3)]
    engine = make_engine(kv_dtype=kv_dtype)
    got = [
        engine.submit(prompt, **options).result().tokens for prompt, options in asked
    ]
    want = [alone(prompt, **options) for prompt, options in asked]
    agree = [a == b for pair in zip(got, want) for a, b in zip(*pair)]
    assert np.mean(agree) > 0.5, agree


# ---------------------------------------------------------------- prefill


def test_long_prompts_come_in_pieces_between_chunks_of_those_that_run():
    engine = make_engine()
    running = engine.submit([1, 2], max_tokens=40)
    iterator = iter(running)
    next(iterator)
    long = list(range(60)), dict(max_tokens=3)
    waiting = engine.submit(long[0], **long[1])
    before = len(running.tokens)
    while not waiting.tokens:
        calls = engine.counters.prefill_calls
        engine.step()
        assert (
            engine.counters.prefill_calls - calls <= 1
        )  # at most decode.prefill_budget tokens between two chunks
    assert (
        len(running.tokens) - before >= 3 * engine.options.steps_per_call
    )  # it went on all the while
    assert waiting.result().tokens == alone(*long[:1], **long[1])
    assert running.result().tokens == alone([1, 2], max_tokens=40)


def test_prompts_that_begin_alike_share_the_computed_prefix():
    engine = make_engine(prefix_memory="1MiB", prefix_block=8)
    shared = list(range(100, 120))
    prompts = [shared + [i] for i in range(5)]
    for i, prompt in enumerate(prompts):
        computed = engine.counters.prefill_tokens
        assert engine.submit(
            prompt, max_tokens=4, seed=i, temperature=1.0
        ).result().tokens == alone(prompt, max_tokens=4, seed=i, temperature=1.0)
        assert engine.counters.prefill_tokens - computed == (21 if i == 0 else 5)
    assert engine.counters.prefix_tokens == 4 * 16 and engine.prefixes.hits == 8


# ---------------------------------------------------------------- text, probabilities


def test_log_probabilities_are_the_models_own():
    engine = make_engine()
    prompt = [3, 1, 4, 1, 5]
    request = engine.submit(
        prompt, max_tokens=6, temperature=1.0, seed=3, logprobs=2, logit_bias={7: 2.0}
    )
    beside = engine.submit(prompt, max_tokens=6)
    got = list(request)
    cache = generate.empty_cache(CONFIG, mesh(), 1, 16)
    ids = prompt + request.tokens
    logits, _ = generate.make_forward(CONFIG, mesh())(
        model(),
        np.array([ids + [0] * (16 - len(ids))], np.int32),
        np.arange(16, dtype=np.int32)[None],
        cache,
    )
    want = jax.nn.log_softmax(logits[0])
    for i, token in enumerate(got):
        row = np.asarray(want[len(prompt) + i - 1])
        assert abs(token.logprob - row[token.id]) < 1e-4
        assert [id for id, _ in token.top] == np.argsort(-row)[:2].tolist()
        np.testing.assert_allclose(
            [p for _, p in token.top], -np.sort(-row)[:2], atol=1e-4
        )
    assert all(token.logprob is None and token.top == () for token in beside)


def test_stop_strings_cut_exactly_and_free_the_slot():
    tokenizer = ByteTokenizer()
    config = dataclasses.replace(
        CONFIG, vocab_size=tokenizer.size + (-tokenizer.size) % 8
    )
    engine = make_engine(config, tokenizer=tokenizer)
    whole = engine.submit(
        "ab", max_tokens=30, temperature=1.0, seed=5, stop_token_ids=()
    ).result()
    assert whole.text == tokenizer.decode(whole.tokens)
    for start, size in ((3, 1), (4, 3), (10, 2)):
        stop = whole.text[start : start + size]
        cut = whole.text.index(stop)
        request = engine.submit(
            "ab",
            max_tokens=30,
            temperature=1.0,
            seed=5,
            stop=("never there", stop),
            stop_token_ids=(),
        )
        pieces = [token.text for token in request]
        assert (
            "".join(pieces) == request.text == whole.text[:cut]
            and request.finish == "stop"
        )
        assert whole.tokens[: len(request.tokens)] == request.tokens
    while engine.step():
        pass
    assert not engine.on_device
    assert not jax.device_get(engine.programs.state.slots.state.active).any()


# ---------------------------------------------------------------- the host


def test_first_come_first_served_but_for_priority():
    engine = make_engine(slots=1, staging=1)
    order = []
    asked = [engine.submit([i], max_tokens=3, priority=i // 4) for i in range(8)]
    while engine.step():
        order += [i for i, r in enumerate(asked) if r.tokens and i not in order]
    assert order == [4, 5, 6, 7, 0, 1, 2, 3]


def test_the_queue_is_bounded_and_cancelling_makes_room():
    engine = make_engine(queue_size=2)
    first, second = engine.submit([1], max_tokens=2), engine.submit([2], max_tokens=2)
    with pytest.raises(QueueFull, match="decode.queue_size=2"):
        engine.submit([3], max_tokens=2)
    second.cancel()
    assert list(second) == [] and second.finish == "cancelled"
    assert first.result().tokens == alone([1], max_tokens=2)
    engine.submit([3], max_tokens=2).result()


@pytest.mark.parametrize(
    "wrong, name",
    [
        (dict(prompt=[]), "prompt"),
        (dict(prompt=[999]), "prompt"),
        (dict(prompt=[1] * 64), "prompt"),
        (dict(prompt="text"), "prompt"),
        (dict(max_tokens=0), "max_tokens"),
        (dict(max_tokens=64), "max_tokens"),
        (dict(stop=["x"]), "stop"),
        (dict(stop_token_ids=(1, 2, 3)), "stop_token_ids"),
        (dict(logprobs=4), "logprobs"),
        (dict(temperature=-1), "temperature"),
        (dict(colour=1), "colour"),
        (dict(logit_bias={1: 1, 2: 2, 3: 3}), "logit_bias"),
    ],
)
def test_mistakes_name_the_field_and_touch_nobody(wrong, name):
    engine = shared_engine()
    with pytest.raises(ConfigError, match=name):
        engine.submit(**dict(prompt=[1]) | wrong)
    assert engine.waiting == 0


def test_an_error_in_one_request_is_its_own():
    engine = make_engine()
    good, bad = (engine.submit([i], max_tokens=9) for i in (1, 2))
    bad.text_filter = mock.Mock(push=mock.Mock(side_effect=ArithmeticError("its own")))
    with pytest.raises(RequestFailed, match="its own"):
        list(bad)
    assert bad.finish == "error" and good.result().tokens == alone([1], max_tokens=9)


def test_an_exception_on_the_device_fails_what_is_live_and_the_engine_recovers():
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
    assert again.result().tokens == alone([1], max_tokens=30)
    assert waiting.result().tokens == alone(
        [9], max_tokens=5
    )  # it was not on the device yet


def test_an_exception_that_no_request_can_report_is_raised():
    def broken(load, limits):
        raise ArithmeticError("of the scheduler")

    engine = make_engine(scheduler=broken)
    with pytest.raises(ArithmeticError, match="of the scheduler"):
        engine.submit([1], max_tokens=2).result()


def test_requests_of_a_shape_that_cannot_be_had_fail():
    """Else the engine would try the same for ever."""
    engine = make_engine()
    request = engine.submit([1], max_tokens=2)
    with mock.patch.object(
        engine.programs, "reshape", side_effect=RuntimeError("no memory")
    ):
        with pytest.raises(RequestFailed, match="no memory"):
            request.result()


def test_asyncio_and_threads_share_the_engines_own_thread():
    engine = shared_engine()
    CHUNK_STEPS.clear()
    asked = requests(6)

    async def one(prompt, options):
        return [token.id async for token in engine.submit(prompt, **options)]

    async def all_of_them():
        return await asyncio.gather(
            *(one(prompt, options) for prompt, options in asked)
        )

    with engine:
        got = asyncio.run(asyncio.wait_for(all_of_them(), 120))
        results = {}
        submit = lambda i: results.update(
            {i: engine.submit(asked[i][0], **asked[i][1]).result()}
        )
        threads = [threading.Thread(target=submit, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    assert got == [alone(prompt, **options) for prompt, options in asked]
    assert all(results[i].tokens == got[i] for i in range(3)) and not engine.running


def test_one_synchronisation_a_chunk():
    engine = make_engine()
    with mock.patch.object(jax, "device_get", side_effect=jax.device_get) as get:
        submitted = [engine.submit([i], max_tokens=16) for i in range(3)]
        for request in submitted:
            request.result()
    assert get.call_count == engine.counters.syncs <= engine.counters.chunks
    tokens = sum(len(r.tokens) for r in submitted)
    assert engine.counters.syncs / tokens < 1 / engine.options.steps_per_call


def test_memory_is_planned_and_never_overcommitted():
    engine = make_engine(slots=3, staging=2)
    state = engine.programs.state
    row = (
        2 * 2 * 8 * 4 * 4 * 64
    )  # keys and values, layers, heads, head, float32, tokens
    assert (
        engine.capacity.memory["rows"]
        == 5 * row
        == sum(x.nbytes for x in jax.tree.leaves((state.slots.kv, state.staging.kv)))
    )
    assert engine.report() == (
        "3 slots and 2 rows of staging, of 64 tokens in float32: 0.2 MiB, prefixes "
        "0.0 MiB, reshaping 0.0 MiB, together 0.2 MiB a device"
    )
    with pytest.raises(ConfigError, match="kv_memory.*slots fit"):
        make_engine(kv_memory="100KiB")
    make_engine(kv_memory="1MiB")
    for budget in (
        "100KiB",
        "1MiB",
    ):  # without a number, as many slots as the budget holds, and not one more
        filled = make_engine(slots=None, staging=None, kv_memory=budget)
        more = filled.capacity.budget(filled.options.slots + 1)
        assert filled.capacity.memory["total"] <= to_bytes(budget, "") < more["total"]
        assert filled.submit([1, 2], max_tokens=3).result().tokens == alone(
            [1, 2], max_tokens=3
        )
    with pytest.raises(ConfigError, match="slots=None is not accepted"):
        Decode(slots=None)
    with pytest.raises(
        ConfigError, match="not enough for decode.slots=1 .* 0 slots fit"
    ):
        make_engine(slots=None, kv_memory="1KiB")


def test_generate_keeps_order_beyond_the_queue():
    engine = make_engine(queue_size=2)
    prompts = [[i] for i in range(7)]
    assert [r.tokens for r in engine.generate(prompts, max_tokens=4)] == [
        alone(p, max_tokens=4) for p in prompts
    ]


def test_what_comes_after_a_cancellation_is_not_the_requests():
    request = make_engine().submit([1, 2], max_tokens=9)
    request.put([Token(5, "a"), Token(None, "b")])
    request.cancel()
    request.put(
        [Token(6, "c")], "length"
    )  # of a chunk whose events are being handed out
    assert (request.tokens, request.text, request.finish, len(request.times)) == (
        [5],
        "ab",
        "cancelled",
        1,
    )
    assert [token.id for token in request] == [5, None]


def test_an_engine_that_is_dropped_is_gone_without_the_garbage_collector():
    engine = make_engine()
    gc.disable()
    try:
        engine.generate([[1, 2], [3]], max_tokens=4)
        request = engine.submit([1], max_tokens=30)
        next(iter(request))
        request.cancel()
        while engine.step():
            pass
        with engine:
            engine.submit([1], max_tokens=4).result()
        gone = weakref.ref(engine)
        del engine, request
        assert gone() is None
    finally:
        gc.enable()


def test_after_warm_up_nothing_compiles():
    long = dataclasses.replace(CONFIG, max_length=96)
    engine = make_engine(
        long,
        fit_shapes=True,
        slots=3,
        staging=2,
        steps_per_call=3,
        prefill_budget=16,
        max_length=None,
        max_logit_bias=3,
    )  # shares no programs
    assert engine.capacity.lengths == [64, 96]
    shapes, compiling = [], []
    engine.warm_up(lambda listed: shapes.extend(listed) or listed)
    compiled, most = engine.compiled()
    assert len(shapes) <= compiled <= most
    assert (
        not any(x is engine for x in gc.get_objects()) and gc.get_freeze_count()
    )  # nothing to walk while serving
    with pytest.raises(RuntimeError, match="before the first"):
        engine.submit([1], max_tokens=9)
        engine.step()
        engine.warm_up()
    while engine.step():
        pass
    asked = [
        (prompt, options | dict(max_tokens=min(options["max_tokens"], 8)))
        for prompt, options in requests(14, longest=80)
    ]
    serving = True
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: (
            compiling.append(event) if serving and "compile" in event else None
        )
    )
    submitted = []
    for start, stop in (
        (0, 1),
        (1, 5),
        (5, 7),
        (7, 14),
    ):  # bursts, with the width that fits each
        submitted += [
            engine.submit(prompt, **options) for prompt, options in asked[start:stop]
        ]
        while engine.step():
            pass
    serving = False
    assert engine.counters.reshapes > 2
    assert engine.compiled()[0] == compiled and not compiling
    for request, (prompt, options) in zip(submitted, asked):
        assert request.tokens == alone(prompt, config=long, **options)


def test_chunks_are_short_while_prefill_fills_slots():
    """Four slots, one prompt a prefill call: all four decode after few iterations."""
    engine = make_engine(
        slots=4, staging=4, steps_per_call=16, prefill_budget=16, trace=True
    )
    run(
        engine,
        [(list(range(i, i + 16)), dict(max_tokens=33, seed=i)) for i in range(4)],
    )
    busy = (np.concatenate([chunk for _, chunk in engine.history]) >= 0).sum(axis=1)
    assert (
        busy.max() == 4 and 0 < busy.argmax() <= 4 + 8 + 12
    )  # a quarter, a half, three quarters of a chunk


def test_prompts_share_prefill_calls_while_enough_wait():
    """Short prompts, long outputs: a call takes several, and no slot is idle."""
    engine = make_engine(
        slots=4, staging=8, steps_per_call=4, prefill_budget=64, trace=True
    )
    asked = [([i + 1, i + 2], dict(max_tokens=24, seed=i)) for i in range(24)]
    run(engine, asked)
    assert engine.counters.prefill_calls <= 10
    busy = np.concatenate([chunk for _, chunk in engine.history]) >= 0
    assert busy[: 24 * 23 // 4 - 24].all()


# ---------------------------------------------------------------- what a client submits

VALUES = {
    "None": None,
    "text": "high",
    "empty text": "",
    "bytes": b"ab",
    "True": True,
    "NumPy's False": np.bool_(False),
    "1.5": 1.5,
    "5.0": 5.0,
    "NumPy's 0.5": np.float32(0.5),
    "nan": float("nan"),
    "inf": float("inf"),
    "-inf": -float("inf"),
    "NumPy's 1": np.int64(1),
    "2": 2,
    "-1": -1,
    "2**40": 2**40,
    "10**400": 10**400,
    "-10**400": -(10**400),
    "complex": 1j,
    "[]": [],
    "[1, 2]": [1, 2],
    "a bool in a list": [1, True],
    "floats in a list": [1.9, 2.2],
    "lists in a list": [[1], [2]],
    "2**70 in a list": [2**70],
    "-1 in a list": [-1],
    "text in a list": ["x"],
    "set": {1, 2},
    "{}": {},
    "{1: 2.0}": {1: 2.0},
    "a text key": {"a": 1},
    "a text value": {1: "a"},
    "a nan value": {1: float("nan")},
    "a float key": {1.5: 1.0},
    "a key outside the vocabulary": {300: 1.0},
    "array of int": np.array([1, 2]),
    "array of two dimensions": np.array([[1, 2]]),
    "array of float": np.array([1.0, 2.0]),
    "array of bool": np.array([True]),
    "object": object(),
}
WHOLE = {"NumPy's 1", "2"}
REAL = WHOLE | {"1.5", "5.0", "NumPy's 0.5"}
IDS = {"[1, 2]", "array of int"}
RIGHT = {  # the VALUES that an option accepts
    "prompt": IDS,
    "max_tokens": WHOLE | {"None"},
    "stop": {"[]"},  # this engine has no tokenizer, so no text
    "stop_token_ids": IDS | {"None", "[]"},
    "logprobs": WHOLE | {"None"},
    "priority": WHOLE | {"-1"},
    "logit_bias": {"None", "{}", "{1: 2.0}"},
    "temperature": REAL | {"2**40"},
    "top_k": WHOLE | {"5.0", "2**40", "10**400"},
    "top_p": {"NumPy's 1", "NumPy's 0.5"},
    "min_p": {"NumPy's 0.5"},
    "repetition_penalty": REAL,
    "presence_penalty": REAL | {"-1"},
    "frequency_penalty": REAL | {"-1"},
    "seed": WHOLE
    | {
        "5.0",
    },
}


@functools.cache
def neighbours_engine():
    return make_engine()


@pytest.mark.parametrize("option", RIGHT)
def test_each_option_refuses_each_wrong_type_and_a_neighbour_is_unharmed(option):
    engine = neighbours_engine()
    neighbour = engine.submit([7, 8], max_tokens=40)
    for kind, value in VALUES.items():
        submitted, queued = engine.counters.submitted, engine.waiting
        options = dict(prompt=[3], max_tokens=1) | {option: value}
        if kind in RIGHT[option]:
            engine.submit(**options).cancel()
            continue
        with pytest.raises(ConfigError) as caught:
            engine.submit(**options)
            pytest.fail(f"{option}={value!r} ({kind}) was accepted")
        message = str(caught.value)
        assert option in message and "\n" not in message
        assert (engine.counters.submitted, engine.waiting) == (submitted, queued)
        engine.step()
    assert neighbour.result().tokens == alone([7, 8], max_tokens=40)
    assert engine.counters.failures == 0


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(stop=None), "stop=None is not accepted: it must be a non-empty string"),
        (dict(stop_token_ids=5), "stop_token_ids=5 .* a list of at most 2 ids from 0"),
        (dict(max_tokens="5"), "max_tokens='5' .* an integer from 1 to 63: 64 tokens"),
        (dict(max_tokens=5.0), "max_tokens=5.0 is not accepted: it must be an integer"),
        (dict(logprobs=1.5), "logprobs=1.5 .* None, or an integer from 0 to 3"),
        (dict(prompt=[1.9, 2.2]), r"prompt=\[1.9, 2.2\] .* text, or ids from 0 to 263"),
        (dict(prompt=5), "prompt=5 is not accepted: it must be text, or ids"),
        (dict(prompt=list(range(64))), "prompt=64 or more tokens .* fewer than 64"),
        (dict(prompt=np.zeros((2, 3))), r"prompt=array of shape \(2, 3\) and type fl"),
        (dict(priority="high"), "priority='high' .* an integer from -1000 to 1000"),
        (dict(priority=1001), "priority=1001 .* an integer from -1000 to 1000"),
    ],
)
def test_messages_name_the_value_and_what_is_accepted(wrong, message):
    with pytest.raises(ConfigError, match=message):
        neighbours_engine().submit(**dict(prompt=[1]) | wrong)


def test_numbers_of_numpy_and_prompts_of_any_sequence_are_accepted():
    engine = neighbours_engine()
    prompt = [3, 1, 4]
    for ids in (
        tuple(prompt),
        iter(prompt),
        range(3, 6),
        np.array(prompt, np.uint8),
        jax.numpy.array(prompt),
        list(np.array(prompt)),
        list(jax.numpy.array(prompt)),
    ):
        want = [3, 4, 5] if isinstance(ids, range) else prompt
        request = engine.submit(
            ids, max_tokens=np.int64(5), temperature=np.float32(1), seed=np.uint32(2)
        )
        want = alone(want, max_tokens=5, temperature=1.0, seed=2)
        assert request.result().tokens == want


def test_one_mistake_in_a_list_of_prompts_submits_none_of_them():
    engine = neighbours_engine()
    submitted = engine.counters.submitted
    with pytest.raises(ConfigError, match="prompt=.*999"):
        engine.generate([[1], [2], [999]], max_tokens=2)
    with pytest.raises(ConfigError, match="prompts='text' .* a list of prompts"):
        engine.generate("text")
    assert engine.counters.submitted == submitted and engine.waiting == 0


# ---------------------------------------------------------------- priorities, the queue


@pytest.mark.parametrize("staging", [1, 6])
def test_priorities_order_the_queue_and_staging_alike(staging):
    """Over all that is accepted; with 6 rows of staging, the device orders them."""
    engine = make_engine(slots=1, staging=staging)
    blocker = engine.submit([1], max_tokens=40)
    while not blocker.tokens:
        engine.step()
    priorities = [-1000, 127, 128, 0, 1000, 129]
    asked = [
        engine.submit([i], max_tokens=3, priority=p) for i, p in enumerate(priorities)
    ]
    while engine.step():
        pass
    # A first token comes with prefill, the second one from the slot.
    decoded = sorted(asked, key=lambda r: r.times[1])
    assert [r.priority for r in decoded] == sorted(priorities, reverse=True)


def test_equal_priorities_stay_in_order_when_the_tickets_start_again(monkeypatch):
    monkeypatch.setattr("ladder_jax.serve.stepper.TICKETS", 5)
    engine = make_engine(slots=1, staging=2)
    asked = [engine.submit([i], max_tokens=3, priority=i % 2) for i in range(12)]
    while engine.step():
        pass
    decoded = sorted(range(12), key=lambda i: asked[i].times[1])
    want = [*range(1, 12, 2), *range(0, 12, 2)]
    assert decoded == want
    assert all(r.tokens == alone([i], max_tokens=3) for i, r in enumerate(asked))


def test_cancelling_a_request_that_waits_frees_its_place_at_once():
    engine = make_engine(queue_size=2)
    for _ in range(3):  # without a step
        requests = [engine.submit([i], max_tokens=2) for i in (1, 2)]
        with pytest.raises(QueueFull, match="2 requests wait already"):
            engine.submit([3], max_tokens=2)
        for request in requests:
            request.cancel()
    assert engine.submit([1], max_tokens=2).result().tokens == alone([1], max_tokens=2)
    assert engine.counters.finished == engine.counters.submitted == 7


LONG = dataclasses.replace(CONFIG, max_length=128)
WAITERS = [
    (prompt, dict(max_tokens=max_tokens))
    for prompt, max_tokens in (
        ([1, 2], 4),
        ([3], 100),
        (list(range(60)), 40),
        (list(range(30)), 90),
        (list(range(100)), 20),
        ([5, 6, 7], 12),
    )
]


@functools.cache
def long_engine(fit_shapes, staging):
    return make_engine(
        LONG,
        fit_shapes=fit_shapes,
        slots=2,
        staging=staging,
        steps_per_call=8,
        prefill_budget=32,
        max_length=None,
    )


@settings(max_examples=25, deadline=None)
@given(
    fit_shapes=st.booleans(),
    staging=st.sampled_from([1, 3]),
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
def test_cancelled_requests_never_change_the_others(fit_shapes, staging, plans):
    """plans: (prompt and options, priority, steps until it is cancelled or None)."""
    engine = long_engine(fit_shapes, staging)
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
        whole = alone(prompt, config=LONG, **options)
        assert request.tokens == whole[: len(request.tokens)]
        assert request.finish == "cancelled" or request.tokens == whole
    check(engine, [x for x in submitted if x[0].finish != "cancelled"], config=LONG)


def test_a_request_is_decoded_in_a_state_that_is_long_enough_for_it():
    """Two cancelled requests wait ahead of one that needs a longer state."""
    engine = long_engine(True, 1)
    first, second = (engine.submit([i], max_tokens=4) for i in (1, 2))
    prompt, options = WAITERS[4]
    wanted = engine.submit(prompt, **options)
    first.cancel(), second.cancel()
    assert wanted.result().tokens == alone(prompt, config=LONG, **options)


# ---------------------------------------------------------------- interrupts


def test_an_interrupt_while_the_host_waits_for_the_device_loses_nothing():
    engine = make_engine(slots=2)
    request = engine.submit([1, 2], max_tokens=40)
    for _ in range(3):
        engine.step()
    with mock.patch.object(jax, "device_get", side_effect=KeyboardInterrupt):
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                engine.step()
    assert request.result().tokens == alone([1, 2], max_tokens=40)
    assert engine.counters.failures == 0
    while engine.step():
        pass
    assert not engine.on_device


class InterruptAt:
    """A profile function: KeyboardInterrupt at the n-th call or return in serve/.

    Python looks for signals at these places.
    """

    def __init__(self, n):
        self.left = n

    def __call__(self, frame, event, argument):
        if event in ("call", "c_return") and "/serve/" in frame.f_code.co_filename:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5000), st.booleans())
def test_after_an_interrupt_at_any_moment_tokens_are_exact_or_missed_loudly(at, fit):
    engine = long_engine(fit, 3)
    asked = [*WAITERS[:2], WAITERS[5], WAITERS[2]]
    submitted = [(engine.submit(p, **o), p, o) for p, o in asked]
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
            whole = alone(prompt, config=LONG, **options)
            assert request.tokens == whole or request.finish == "cancelled", i
    prompt, options = WAITERS[3]
    again = engine.submit(prompt, **options)
    assert again.result().tokens == alone(prompt, config=LONG, **options)
    while engine.step():
        pass
    assert not engine.on_device and not engine.waiting


# ---------------------------------------------------------------- closing


def test_closing_an_engine_ends_the_iteration_of_a_coroutine():
    engine = neighbours_engine()

    async def read(request, tokens):
        async for token in request:
            tokens.append(token.id)

    async def both():
        request, tokens = engine.submit([1, 2], max_tokens=60), []
        reading = asyncio.create_task(read(request, tokens))
        while not tokens:
            await asyncio.sleep(0)
        with mock.patch.object(engine.stepper, "step", side_effect=lambda: False):
            engine.close()  # a step may have read tokens that the coroutine still gets
            with pytest.raises(EngineClosed, match="the engine was closed"):
                await asyncio.wait_for(reading, 60)
        return request, tokens

    request, tokens = asyncio.run(both())
    assert not engine.running
    rest = [token.id for token in request]
    assert tokens + rest == alone([1, 2], max_tokens=60)


def test_an_engine_closes_when_its_last_user_leaves():
    engine = neighbours_engine()
    prompts = {1: 5, 2: 50}  # the first to leave leaves long before the other

    async def use(prompt):
        with engine:
            request = engine.submit([prompt], max_tokens=prompts[prompt])
            return [token.id async for token in request]

    async def all_of_them():
        return await asyncio.gather(*map(use, prompts))

    got = asyncio.run(asyncio.wait_for(all_of_them(), 120))
    assert got == [alone([p], max_tokens=n) for p, n in prompts.items()]
    assert not engine.running


HOST = """
import json, sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import test_engine
from ladder_jax.config import ConfigError
engine = test_engine.make_engine(tensor=4, fit_shapes=True)
asked = test_engine.requests(6, longest=12)
submitted = [engine.submit(prompt, **options) for prompt, options in asked]
submitted[4].cancel()
print(json.dumps([request.result().tokens for request in submitted]))
try:
    engine.start()
except ConfigError as error:
    print(error)
"""


def test_two_hosts_agree():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    path = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    both = [
        subprocess.Popen(
            [sys.executable, "-c", HOST, address, str(n)],
            text=True,
            cwd=Path(__file__).parent,
            stdout=subprocess.PIPE,
            env=os.environ
            | {
                "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
                "PYTHONPATH": os.pathsep.join(path),
            },
        )
        for n in range(2)
    ]
    wanted = [alone(prompt, **options) for prompt, options in requests(6, longest=12)]
    for process in both:
        tokens, said = process.communicate(timeout=300)[0].splitlines()[-2:]
        assert (
            process.returncode == 0
            and "on several hosts an engine has no thread" in said
        )
        tokens = json.loads(tokens)
        assert tokens.pop(4) == [] and tokens == wanted[:4] + wanted[5:]


@pytest.mark.slow
@pytest.mark.parametrize(
    "slots, chunk, tensor",
    [
        (1, 64, 1),
        (64, 1, 1),
        (64, 64, 1),
        (17, 5, 1),
        (32, 16, 2),
        (8, 7, 4),
        (16, 32, 8),
    ],
)
def test_widths_chunks_and_shards(slots, chunk, tensor):
    run(
        make_engine(
            slots=slots,
            staging=max(2, slots // 2),
            steps_per_call=chunk,
            fit_shapes=True,
            tensor=tensor,
        ),
        requests(3 * slots + 5, longest=12),
    )


@pytest.mark.slow
def test_a_soak_with_random_cancellations():
    """20,000 requests: nothing lost, memory and compile count flat."""
    import gc
    import resource

    engine, rng, waiting = (
        make_engine(slots=16, staging=8, steps_per_call=8, queue_size=64),
        np.random.default_rng(0),
        [],
    )
    asked = requests(40, longest=12)
    reference = [alone(prompt, **options) for prompt, options in asked]
    memory, programs, done, start = [], [], 0, time.time()
    for i in range(20_000):
        while engine.waiting >= 64:
            engine.step()
        prompt, options = asked[i % 40]
        waiting.append((i % 40, engine.submit(prompt, **options)))
        if rng.random() < 0.1:
            rng.choice([r for _, r in waiting]).cancel()
        finished = [x for x in waiting if x[1].finish]
        waiting = [x for x in waiting if not x[1].finish]
        for which, request in finished:
            done += 1
            whole = reference[which]
            assert (
                request.tokens == whole
                if request.finish != "cancelled"
                else (request.tokens == whole[: len(request.tokens)])
            )
        if i % 1000 == 999:
            gc.collect()
            memory.append(sum(x.nbytes for x in jax.live_arrays()))
            programs.append(engine.compiled()[0])
    for _, request in waiting:
        request.result()
    while engine.step():
        pass
    assert (
        done + len(waiting)
        == 20_000
        == engine.counters.finished
        == engine.counters.submitted
    )
    assert len(set(programs[1:])) == 1 and max(memory[1:]) <= 1.05 * memory[1], (
        programs,
        memory,
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{time.time() - start:.0f} s, peak {peak:.0f} MiB, "
        f"occupancy {engine.counters.occupancy:.3f}, {engine.counters}"
    )
