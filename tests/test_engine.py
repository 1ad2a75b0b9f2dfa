"""The engine's tokens are those that `generate` gives for one request alone, whatever
else the engine serves.
"""

import dataclasses
import gc
import resource
import time
from unittest import mock

import jax
import numpy as np
import pytest
from engines import CHUNK_STEPS, check, finish, run, shared_engine, submit_all
from helpers import ENGINE_MODEL, make_engine, make_requests, tokens_alone
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("fast_compiler")


def test_more_requests_than_slots_have_the_tokens_they_have_alone():
    engine = make_engine(trace=True)
    submitted = run(engine, make_requests(20, longest=7))
    # A slot that is refilled inside a chunk: one column of it has two requests.
    refills = [
        any(len(set(column[column >= 0])) > 1 for column in chunk.T)
        for _, chunk, *_ in engine.history
    ]
    assert sum(refills) >= 3
    decoded = sum(int((chunk >= 0).sum()) for _, chunk, *_ in engine.history)
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


@pytest.mark.parametrize(
    "changes",
    [
        dict(loop="fixed"),
        dict(unroll_layers=False),
        dict(unroll_layers=False, kv_layout="rows"),
        dict(loop="fixed", kv_layout="rows"),
        dict(steps_per_call=1),
        pytest.param(dict(slots=1, staging=1), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_ways_of_running_have_the_same_tokens(changes):
    run(make_engine(**changes), make_requests(6))


def test_a_loop_that_cannot_end_early_runs_no_more_than_is_left_to_do():
    engine = make_engine(loop="fixed")
    before, _ = engine.compiled()
    assert engine.capacity.chunk_sizes == [1, 4]
    assert make_engine().capacity.chunk_sizes == [4]
    run(engine, [([1, 2], dict(max_tokens=2))])  # one by prefill, one by the loop
    assert (engine.counters.chunks, engine.counters.iterations) == (1, 1)
    run(engine, [([3], dict(max_tokens=12))])
    assert (engine.counters.chunks, engine.counters.iterations) == (4, 13)
    # Prefill emits the only token. It comes to the host without a chunk.
    run(engine, [([4], dict(max_tokens=1))])
    assert (engine.counters.chunks, engine.counters.iterations) == (4, 13)
    assert engine.compiled()[0] - before <= engine.compiled()[1]


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


@pytest.mark.parametrize("layout", ["pages", "rows"])
def test_the_compiled_shape_follows_the_requests(layout):
    """It grows for many requests, and shrinks while one of them goes on.

    Moving the requests to another state changes no token.
    """
    long = dataclasses.replace(ENGINE_MODEL, max_length=128)
    engine = make_engine(
        long,
        fit_shapes=True,
        slots=4,
        staging=2,
        steps_per_call=2,
        max_length=None,
        kv_layout=layout,
    )
    before, _ = engine.compiled()
    widths = []
    requests = [([1, 2, 3], dict(max_tokens=80, seed=1))]
    requests += [([i], dict(max_tokens=6, seed=i)) for i in range(5)]
    submitted = submit_all(engine, requests)
    while engine.step():
        widths.append((engine.programs.width, engine.programs.length))
    check(engine, submitted, model_config=long)
    assert max(w for w, _ in widths) == 4
    lengths = (64, 128) if layout == "rows" else (128, 128)
    assert (4, lengths[0]) in widths and (1, lengths[1]) in widths
    assert engine.counters.reshapes >= 3
    assert engine.compiled()[0] - before <= engine.compiled()[1]


@pytest.mark.parametrize(
    "kv_dtype",
    [pytest.param("bfloat16", marks=pytest.mark.slow), "int8", "float8_e4m3fn"],
)
def test_a_rounded_cache_mostly_agrees(kv_dtype):
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


def test_chunks_are_short_while_prefill_fills_slots():
    """Four slots, one prompt a prefill call: all four decode after few iterations."""
    engine = make_engine(
        slots=4, staging=4, steps_per_call=16, prefill_budget=16, trace=True
    )
    run(
        engine,
        [(list(range(i, i + 16)), dict(max_tokens=33, seed=i)) for i in range(4)],
    )
    busy = (np.concatenate([chunk for _, chunk, *_ in engine.history]) >= 0).sum(axis=1)
    # Before the fourth prompt, chunks of a quarter, a half and three quarters.
    assert busy.max() == 4 and 0 < busy.argmax() <= 4 + 8 + 12


def test_prompts_share_prefill_calls_while_enough_wait():
    """Prompts are short and outputs long: a call takes several, and no slot is idle."""
    engine = make_engine(
        slots=4, staging=8, steps_per_call=4, prefill_budget=64, trace=True
    )
    run(engine, [([i + 1, i + 2], dict(max_tokens=24, seed=i)) for i in range(24)])
    assert engine.counters.prefill_calls <= 10
    busy = np.concatenate([chunk for _, chunk, *_ in engine.history]) >= 0
    assert busy[: 24 * 23 // 4 - 24].all()


def test_one_synchronisation_a_chunk_and_one_for_the_prompts_before_it():
    engine = make_engine()
    with mock.patch.object(jax, "device_get", side_effect=jax.device_get) as get:
        submitted = [engine.submit([i], max_tokens=16) for i in range(3)]
        for request in submitted:
            request.result()
    counters = engine.counters
    assert get.call_count == counters.syncs <= counters.chunks + counters.prefill_calls
    tokens = sum(len(r.tokens) for r in submitted)
    chunks_read = counters.syncs - counters.prefill_calls
    assert chunks_read / tokens < 1 / engine.options.steps_per_call


# ---------------------------------------------------------------- slow proofs


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
