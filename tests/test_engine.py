"""The engine's tokens are those that `generate` gives for one request alone, whatever
else the engine serves, and whatever happens to other requests.
"""

import asyncio
import dataclasses
import functools
import gc
import json
import resource
import sys
import threading
import time
import weakref
from unittest import mock

import helpers
import jax
import numpy as np
import pytest
from helpers import ENGINE_MODEL, make_engine, make_requests, tokens_alone
from hypothesis import given, settings
from hypothesis import strategies as st

from ladder_jax import decode, generate
from ladder_jax.config import ConfigError, Decode, to_bytes
from ladder_jax.data.tokenizer import ByteTokenizer
from ladder_jax.serve.request import EngineClosed, QueueFull, RequestFailed, Token
from ladder_jax.serve.scheduler import plan_step


def finish(engine):
    """Runs the engine until it has nothing left to do."""
    while engine.step():
        pass


def check(engine, submitted, **reference):
    """Every request has exactly its reference's tokens; the state is empty again.

    `reference`: which model the reference is, if not ENGINE_MODEL on one device.
    """
    for request, prompt, options in submitted:
        expected = tokens_alone(prompt, **options, **reference)
        assert request.tokens == expected, (prompt, options)
        is_whole = len(request.tokens) == options["max_tokens"]
        assert request.finish == ("length" if is_whole else "stop")
    finish(engine)
    state = jax.device_get(engine.programs.state)
    assert not state.slots.state.active.any()
    assert (state.staging.state.admission_order == decode.NOT_WAITING).all()
    assert not list(engine.stepper.tracker) and not engine.waiting
    assert engine.counters.syncs == engine.counters.chunks
    if engine.stepper.trace:
        assert len(engine.history) == engine.counters.chunks


def submit_all(engine, requests):
    """(request, prompt, options) of every (prompt, options)."""
    return [
        (engine.submit(prompt, **options), prompt, options)
        for prompt, options in requests
    ]


def run(engine, requests, **reference):
    """Submits `requests`, waits for their results, and checks them."""
    submitted = submit_all(engine, requests)
    for request, *_ in submitted:
        request.result()
    check(engine, submitted, **reference)
    return submitted


# ---------------------------------------------------------------- token-exact


def test_more_requests_than_slots_have_the_tokens_they_have_alone():
    engine = make_engine(trace=True)
    submitted = run(engine, make_requests(20, longest=7))
    # A slot that is refilled inside a chunk: one column of it has two requests.
    refills = [
        any(len(set(column[column >= 0])) > 1 for column in chunk.T)
        for _, chunk in engine.history
    ]
    assert sum(refills) >= 3
    decoded = sum(int((chunk >= 0).sum()) for _, chunk in engine.history)
    prefilled = len(submitted)  # the first token of each
    tokens = sum(len(request.tokens) for request, *_ in submitted)
    assert decoded + prefilled == tokens == engine.counters.tokens


@settings(max_examples=8, deadline=None)
@given(st.data())
def test_arrival_order_stops_cancellations_and_chunk_length_change_nothing(data):
    """One engine, which has compiled all shapes before; CHUNK_STEPS shortens chunks."""
    engine = shared_engine()
    compiled = engine.compiled()
    CHUNK_STEPS[:] = [data.draw(st.integers(1, 4), "iterations a chunk")]
    requests = data.draw(st.permutations(make_requests(10)), "order")
    gaps = data.draw(
        st.lists(st.integers(0, 3), min_size=10, max_size=10), "steps between arrivals"
    )
    cancelled = data.draw(st.sets(st.integers(0, 9), max_size=3), "cancelled")
    stopped = data.draw(st.sets(st.integers(0, 9), max_size=4), "stopped")
    submitted = []
    for i, ((prompt, options), gap) in enumerate(zip(requests, gaps)):
        if i in stopped:  # at a token that it emits
            tokens = tokens_alone(prompt, **options)
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
        whole = tokens_alone(prompt, **options)
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
    run(make_engine(**changes), make_requests(6))


def test_a_loop_that_cannot_end_early_runs_no_more_than_is_left_to_do():
    engine = make_engine(loop="fixed")
    assert engine.capacity.chunk_sizes == [1, 4]
    assert make_engine().capacity.chunk_sizes == [4]
    run(engine, [([1, 2], dict(max_tokens=2))])  # one by prefill, one by the loop
    assert (engine.counters.chunks, engine.counters.iterations) == (1, 1)
    run(engine, [([3], dict(max_tokens=12))])
    assert (engine.counters.chunks, engine.counters.iterations) == (4, 13)
    # Prefill emits the only token. It comes to the host with a chunk, too.
    run(engine, [([4], dict(max_tokens=1))])
    assert (engine.counters.chunks, engine.counters.iterations) == (5, 14)
    assert engine.compiled()[0] <= engine.compiled()[1]


@pytest.mark.parametrize(
    "residual, tensor",
    [
        ("ladder", 8),
        ("hybrid:last1", 2),
        ("desync:2", 2),
        ("dtp:2", 4),
        ("parallel", 1),
        *(
            pytest.param(residual, 2, marks=pytest.mark.slow)
            for residual in ("standard", "ladder:1,2", "parallel")
        ),
    ],
)
def test_every_residual_schedule_and_number_of_shards_is_token_exact(residual, tensor):
    """The reference runs on one device; for desync and dtp, it runs on the same mesh,
    because the number of ranks is part of the model.
    """
    model_config = dataclasses.replace(ENGINE_MODEL, residual=residual)
    run(
        make_engine(model_config, tensor),
        make_requests(4, longest=15),
        model_config=model_config,
        tensor=tensor if residual.startswith(("desync", "dtp")) else 1,
    )


def test_the_compiled_shape_follows_the_requests():
    """It grows for many requests, and shrinks while one of them goes on.

    Moving the requests to another state changes no token.
    """
    long = dataclasses.replace(ENGINE_MODEL, max_length=128)
    engine = make_engine(
        long, fit_shapes=True, slots=4, staging=2, steps_per_call=2, max_length=None
    )
    widths = []
    requests = [([1, 2, 3], dict(max_tokens=80, seed=1))]
    requests += [([i], dict(max_tokens=6, seed=i)) for i in range(5)]
    submitted = submit_all(engine, requests)
    while engine.step():
        widths.append((engine.programs.width, engine.programs.length))
    check(engine, submitted, model_config=long)
    assert max(w for w, _ in widths) == 4
    assert (4, 64) in widths and (1, 128) in widths and engine.counters.reshapes >= 3
    assert engine.compiled()[0] <= engine.compiled()[1]


@pytest.mark.parametrize(
    "kv_dtype", [pytest.param("bfloat16", marks=pytest.mark.slow), "int8"]
)
def test_a_bfloat16_or_int8_cache_mostly_agrees(kv_dtype):
    engine = make_engine(kv_dtype=kv_dtype)
    agree = []
    for prompt, _ in make_requests(3):
        tokens = engine.submit(prompt, max_tokens=8).result().tokens
        expected = tokens_alone(prompt, max_tokens=8)
        agree += [a == b for a, b in zip(tokens, expected, strict=True)]
    assert np.mean(agree) > 0.5, agree


# ---------------------------------------------------------------- prefill


def test_a_long_prompt_is_prefilled_in_pieces_between_chunks_of_a_running_request():
    engine = make_engine()
    running = engine.submit([1, 2], max_tokens=40)
    next(iter(running))
    prompt = list(range(60))
    waiting = engine.submit(prompt, max_tokens=3)
    before = len(running.tokens)
    while not waiting.tokens:
        calls = engine.counters.prefill_calls
        engine.step()
        # At most decode.prefill_budget tokens are prefilled between two chunks.
        assert engine.counters.prefill_calls - calls <= 1
    decoded = len(running.tokens) - before
    assert decoded >= 3 * engine.options.steps_per_call, (
        "the running request stood still"
    )
    assert waiting.result().tokens == tokens_alone(prompt, max_tokens=3)
    assert running.result().tokens == tokens_alone([1, 2], max_tokens=40)


def test_prompts_that_begin_alike_share_the_computed_prefix():
    engine = make_engine(prefix_memory="1MiB", prefix_block=8)
    shared = list(range(100, 120))
    prompts = [shared + [i] for i in range(5)]
    for i, prompt in enumerate(prompts):
        computed = engine.counters.prefill_tokens
        options = dict(max_tokens=4, seed=i, temperature=1.0)
        tokens = engine.submit(prompt, **options).result().tokens
        assert tokens == tokens_alone(prompt, **options)
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
    tokens = list(request)
    mesh = helpers.make_mesh()
    ids = prompt + request.tokens
    logits, _ = generate.make_forward(ENGINE_MODEL, mesh)(
        helpers.initial_parameters(ENGINE_MODEL, mesh),
        np.array([ids + [0] * (16 - len(ids))], np.int32),
        np.arange(16, dtype=np.int32)[None],
        generate.empty_cache(ENGINE_MODEL, mesh, 1, 16),
    )
    expected = jax.nn.log_softmax(logits[0])
    for i, token in enumerate(tokens):
        row = np.asarray(expected[len(prompt) + i - 1])
        assert abs(token.logprob - row[token.id]) < 1e-4
        top_ids, top_logprobs = zip(*token.top)
        assert list(top_ids) == np.argsort(-row)[:2].tolist()
        np.testing.assert_allclose(top_logprobs, -np.sort(-row)[:2], atol=1e-4)
    assert all(token.logprob is None and token.top == () for token in beside)


def test_stop_strings_cut_exactly_and_free_the_slot():
    tokenizer = ByteTokenizer()
    padded_size = tokenizer.size + (-tokenizer.size) % 8
    model_config = dataclasses.replace(ENGINE_MODEL, vocab_size=padded_size)
    engine = make_engine(model_config, tokenizer=tokenizer)
    options = dict(max_tokens=30, temperature=1.0, seed=5, stop_token_ids=())
    whole = engine.submit("ab", **options).result()
    assert whole.text == tokenizer.decode(whole.tokens)
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


# ---------------------------------------------------------------- the host


def test_first_come_first_served_but_for_priority():
    engine = make_engine(slots=1, staging=1)
    order = []
    requests = [engine.submit([i], max_tokens=3, priority=i // 4) for i in range(8)]
    while engine.step():
        order += [i for i, r in enumerate(requests) if r.tokens and i not in order]
    assert order == [4, 5, 6, 7, 0, 1, 2, 3]


def test_the_queue_is_bounded_and_cancelling_makes_room():
    engine = make_engine(queue_size=2)
    first, second = engine.submit([1], max_tokens=2), engine.submit([2], max_tokens=2)
    with pytest.raises(QueueFull, match="decode.queue_size=2"):
        engine.submit([3], max_tokens=2)
    second.cancel()
    assert list(second) == [] and second.finish == "cancelled"
    assert first.result().tokens == tokens_alone([1], max_tokens=2)
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
def test_a_mistake_names_the_field_and_submits_nothing(wrong, name):
    engine = shared_engine()
    with pytest.raises(ConfigError, match=name):
        engine.submit(**dict(prompt=[1]) | wrong)
    assert engine.waiting == 0


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


def test_asyncio_and_threads_share_the_engines_own_thread():
    engine = shared_engine()
    CHUNK_STEPS.clear()
    requests = make_requests(6)

    async def one(prompt, options):
        return [token.id async for token in engine.submit(prompt, **options)]

    async def all_of_them():
        return await asyncio.gather(
            *(one(prompt, options) for prompt, options in requests)
        )

    with engine:
        by_coroutines = asyncio.run(asyncio.wait_for(all_of_them(), 120))
        by_threads = {}

        def submit(i):
            prompt, options = requests[i]
            by_threads[i] = engine.submit(prompt, **options).result().tokens

        threads = [threading.Thread(target=submit, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    expected = [tokens_alone(prompt, **options) for prompt, options in requests]
    assert by_coroutines == expected
    assert by_threads == dict(enumerate(expected[:3]))
    assert not engine.running


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
    # Keys and values, layers, heads, size of a head, bytes of a float32, tokens.
    row = 2 * 2 * 8 * 4 * 4 * 64
    caches = jax.tree.leaves((state.slots.kv, state.staging.kv))
    assert engine.capacity.memory["rows"] == 5 * row == sum(x.nbytes for x in caches)
    assert engine.report() == (
        "3 slots and 2 rows of staging, of 64 tokens in float32: 0.2 MiB, prefixes "
        "0.0 MiB, reshaping 0.0 MiB, together 0.2 MiB a device"
    )
    with pytest.raises(ConfigError, match="kv_memory.*slots fit"):
        make_engine(kv_memory="100KiB")
    make_engine(kv_memory="1MiB")
    # Without a number, it has as many slots as the budget holds, and not one more.
    for budget in ("100KiB", "1MiB"):
        engine = make_engine(slots=None, staging=None, kv_memory=budget)
        more = engine.capacity.budget(engine.options.slots + 1)
        assert engine.capacity.memory["total"] <= to_bytes(budget, "") < more["total"]
        tokens = engine.submit([1, 2], max_tokens=3).result().tokens
        assert tokens == tokens_alone([1, 2], max_tokens=3)
    with pytest.raises(ConfigError, match="slots=None is not accepted"):
        Decode(slots=None)
    too_small = "not enough for decode.slots=1 .* 0 slots fit"
    with pytest.raises(ConfigError, match=too_small):
        make_engine(slots=None, kv_memory="1KiB")


def test_generate_keeps_order_beyond_the_queue():
    engine = make_engine(queue_size=2)
    prompts = [[i] for i in range(7)]
    assert [r.tokens for r in engine.generate(prompts, max_tokens=4)] == [
        tokens_alone(p, max_tokens=4) for p in prompts
    ]


def test_a_cancelled_request_ignores_later_tokens():
    request = make_engine().submit([1, 2], max_tokens=9)
    request.put([Token(5, "a"), Token(None, "b")])
    request.cancel()
    request.put([Token(6, "c")], "length")  # from a chunk that the host reads now
    assert (request.tokens, request.text) == ([5], "ab")
    assert (request.finish, len(request.times)) == ("cancelled", 1)
    assert [token.id for token in request] == [5, None]


def test_an_engine_without_references_is_freed_without_the_garbage_collector():
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
        reference = weakref.ref(engine)
        del engine, request
        assert reference() is None
    finally:
        gc.enable()


def test_after_warm_up_nothing_compiles():
    long = dataclasses.replace(ENGINE_MODEL, max_length=96)
    # No other test has an engine of these options, whose programs this one could share.
    engine = make_engine(
        long,
        fit_shapes=True,
        slots=3,
        staging=2,
        steps_per_call=3,
        prefill_budget=16,
        max_length=None,
        max_logit_bias=3,
    )
    assert engine.capacity.lengths == [64, 96]
    shapes, compiling = [], []
    engine.warm_up(lambda listed: shapes.extend(listed) or listed)
    compiled, most = engine.compiled()
    assert len(shapes) <= compiled <= most
    # While the engine serves, the garbage collector does not visit its objects.
    assert not any(x is engine for x in gc.get_objects()) and gc.get_freeze_count()
    with pytest.raises(RuntimeError, match="before the first"):
        engine.submit([1], max_tokens=9)
        engine.step()
        engine.warm_up()
    finish(engine)
    requests = [
        (prompt, options | dict(max_tokens=min(options["max_tokens"], 8)))
        for prompt, options in make_requests(14, longest=80)
    ]
    serving = True
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: (
            compiling.append(event) if serving and "compile" in event else None
        )
    )
    submitted = []
    # Groups of different sizes, so that the engine changes its width for each.
    for start, stop in ((0, 1), (1, 5), (5, 7), (7, 14)):
        submitted += submit_all(engine, requests[start:stop])
        finish(engine)
    serving = False
    assert engine.counters.reshapes > 2
    assert engine.compiled()[0] == compiled and not compiling
    for request, prompt, options in submitted:
        assert request.tokens == tokens_alone(prompt, model_config=long, **options)


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
    # Before the fourth prompt, chunks of a quarter, a half and three quarters.
    assert busy.max() == 4 and 0 < busy.argmax() <= 4 + 8 + 12


def test_prompts_share_prefill_calls_while_enough_wait():
    """Prompts are short and outputs long: a call takes several, and no slot is idle."""
    engine = make_engine(
        slots=4, staging=8, steps_per_call=4, prefill_budget=64, trace=True
    )
    run(engine, [([i + 1, i + 2], dict(max_tokens=24, seed=i)) for i in range(24)])
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
ACCEPTED = {  # the names of the VALUES that an option accepts
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
    "seed": WHOLE | {"5.0"},
}


@functools.cache
def default_engine():
    return make_engine()


@pytest.mark.parametrize("option", ACCEPTED)
def test_each_option_refuses_each_wrong_type_and_a_neighbour_is_unharmed(option):
    engine = default_engine()
    neighbour = engine.submit([7, 8], max_tokens=40)
    for kind, value in VALUES.items():
        submitted, queued = engine.counters.submitted, engine.waiting
        options = dict(prompt=[3], max_tokens=1) | {option: value}
        if kind in ACCEPTED[option]:
            engine.submit(**options).cancel()
            continue
        with pytest.raises(ConfigError) as caught:
            engine.submit(**options)
            pytest.fail(f"{option}={value!r} ({kind}) was accepted")
        message = str(caught.value)
        assert option in message and "\n" not in message
        assert (engine.counters.submitted, engine.waiting) == (submitted, queued)
        engine.step()
    assert neighbour.result().tokens == tokens_alone([7, 8], max_tokens=40)
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
        default_engine().submit(**dict(prompt=[1]) | wrong)


def test_numbers_of_numpy_and_prompts_of_any_sequence_are_accepted():
    engine = default_engine()
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
        same_ids = [3, 4, 5] if isinstance(ids, range) else prompt
        request = engine.submit(
            ids, max_tokens=np.int64(5), temperature=np.float32(1), seed=np.uint32(2)
        )
        expected = tokens_alone(same_ids, max_tokens=5, temperature=1.0, seed=2)
        assert request.result().tokens == expected


def test_one_mistake_in_a_list_of_prompts_submits_none_of_them():
    engine = default_engine()
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
    requests = [
        engine.submit([i], max_tokens=3, priority=p) for i, p in enumerate(priorities)
    ]
    finish(engine)
    # Prefill emits the first token, the slot the second one.
    decoded = sorted(requests, key=lambda r: r.times[1])
    assert [r.priority for r in decoded] == sorted(priorities, reverse=True)


def test_equal_priorities_stay_in_order_when_the_tickets_start_again(monkeypatch):
    monkeypatch.setattr("ladder_jax.serve.stepper.TICKETS", 5)
    engine = make_engine(slots=1, staging=2)
    requests = [engine.submit([i], max_tokens=3, priority=i % 2) for i in range(12)]
    finish(engine)
    decoded = sorted(range(12), key=lambda i: requests[i].times[1])
    assert decoded == [*range(1, 12, 2), *range(0, 12, 2)]
    for i, request in enumerate(requests):
        assert request.tokens == tokens_alone([i], max_tokens=3)


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


LONG = dataclasses.replace(ENGINE_MODEL, max_length=128)
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


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5000), st.booleans())
def test_after_an_interrupt_at_any_moment_tokens_are_exact_or_the_request_fails(
    at, fit
):
    engine = long_engine(fit, 3)
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


# ---------------------------------------------------------------- closing


def test_closing_an_engine_ends_the_iteration_of_a_coroutine():
    engine = default_engine()

    async def read(request, tokens):
        async for token in request:
            tokens.append(token.id)

    async def both():
        request, tokens = engine.submit([1, 2], max_tokens=60), []
        reading = asyncio.create_task(read(request, tokens))
        while not tokens:
            await asyncio.sleep(0)
        with mock.patch.object(engine.stepper, "step", side_effect=lambda: False):
            # An earlier step may have read tokens that the coroutine gets after this.
            engine.close()
            with pytest.raises(EngineClosed, match="the engine was closed"):
                await asyncio.wait_for(reading, 60)
        return request, tokens

    request, tokens = asyncio.run(both())
    assert not engine.running
    rest = [token.id for token in request]
    assert tokens + rest == tokens_alone([1, 2], max_tokens=60)


def test_an_engine_closes_when_its_last_user_leaves():
    engine = default_engine()
    max_tokens = {1: 5, 2: 50}  # prompt 1 leaves the engine long before prompt 2

    async def use(prompt):
        with engine:
            request = engine.submit([prompt], max_tokens=max_tokens[prompt])
            return [token.id async for token in request]

    async def all_of_them():
        return await asyncio.gather(*map(use, max_tokens))

    tokens = asyncio.run(asyncio.wait_for(all_of_them(), 120))
    assert tokens == [tokens_alone([p], max_tokens=n) for p, n in max_tokens.items()]
    assert not engine.running


HOST = """
import json, sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import helpers
from ladder_jax.config import ConfigError
engine = helpers.make_engine(tensor=4, fit_shapes=True)
requests = helpers.make_requests(6, longest=12)
submitted = [engine.submit(prompt, **options) for prompt, options in requests]
submitted[4].cancel()
print(json.dumps([request.result().tokens for request in submitted]))
try:
    engine.start()
except ConfigError as error:
    print(error)
"""


def test_two_hosts_agree():
    command = [sys.executable, "-c", HOST, helpers.free_address()]
    hosts = helpers.run_together(
        [[*command, number] for number in range(2)],
        helpers.code_environment(devices=2),
        cwd=helpers.ROOT / "tests",
    )
    expected = [
        tokens_alone(prompt, **options)
        for prompt, options in make_requests(6, longest=12)
    ]
    expected[4] = []  # cancelled before the first step
    for out, err, status in hosts:
        assert status == 0, err
        tokens, message = out.splitlines()[-2:]
        assert "on several hosts an engine has no thread" in message
        assert json.loads(tokens) == expected


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
        make_requests(3 * slots + 5, longest=12),
    )


@pytest.mark.slow
def test_a_soak_with_random_cancellations():
    """Of 20,000 requests none is lost; memory and the number of programs stay flat."""
    engine = make_engine(slots=16, staging=8, steps_per_call=8, queue_size=64)
    rng = np.random.default_rng(0)
    requests = make_requests(40, longest=12)
    references = [tokens_alone(prompt, **options) for prompt, options in requests]
    memory, programs, waiting, done, start = [], [], [], 0, time.time()
    for i in range(20_000):
        while engine.waiting >= 64:
            engine.step()
        prompt, options = requests[i % 40]
        waiting.append((references[i % 40], engine.submit(prompt, **options)))
        if rng.random() < 0.1:
            rng.choice([request for _, request in waiting]).cancel()
        finished = [pair for pair in waiting if pair[1].finish]
        waiting = [pair for pair in waiting if not pair[1].finish]
        done += len(finished)
        for whole, request in finished:
            is_cut = request.finish == "cancelled"
            expected = whole[: len(request.tokens)] if is_cut else whole
            assert request.tokens == expected
        if i % 1000 == 999:
            gc.collect()
            memory.append(sum(x.nbytes for x in jax.live_arrays()))
            programs.append(engine.compiled()[0])
    for _, request in waiting:
        request.result()
    finish(engine)
    assert done + len(waiting) == 20_000
    assert engine.counters.finished == engine.counters.submitted == 20_000
    assert len(set(programs[1:])) == 1, programs
    assert max(memory[1:]) <= 1.05 * memory[1], memory
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{time.time() - start:.0f} s, peak {peak:.0f} MiB, "
        f"occupancy {engine.counters.occupancy:.3f}, {engine.counters}"
    )
