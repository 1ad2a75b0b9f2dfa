"""Engines that several test files share, and the checks of their requests."""

import dataclasses
import functools

import helpers
import jax
import numpy as np
from helpers import ENGINE_MODEL, make_engine, tokens_alone

from ladder_jax import decode, generate, pages
from ladder_jax.data.tokenizer import ByteTokenizer
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
    check_pages(engine)
    assert not state.slots.state.active.any()
    assert (state.staging.state.admission_order == decode.NOT_WAITING).all()
    assert not list(engine.stepper.tracker) and not engine.waiting
    # The host reads some prefill calls without a chunk.
    assert (
        0
        <= engine.counters.syncs - engine.counters.chunks
        <= engine.counters.prefill_calls
    )
    if engine.stepper.trace:
        assert len(engine.history) == engine.counters.chunks


def check_pages(engine):
    """Every page has as many users as rows and stored prefixes have it; none is lost.

    Rows without a request have pages only if the first token ended their last request.
    """
    state = jax.device_get(engine.programs.state)
    if state.pool is None:
        return
    tables = [state.slots.state.table, state.staging.state.table]
    held = np.concatenate([table.reshape(-1) for table in tables])
    blocks = [np.asarray(block) for block in engine.prefixes.blocks()]
    held = np.concatenate([held[held != pages.NO_PAGE], *blocks])
    count = len(state.pool.users)
    assert np.bincount(held, minlength=count).tolist() == state.pool.users.tolist()
    idle = state.slots.state.request == decode.NO_REQUEST
    assert (state.slots.state.table[idle] == pages.NO_PAGE).all()


def carry_always(engine):
    """Makes iterations carry every piece that they can, whatever it costs."""
    capacity = engine.capacity
    engine.programs.carry_saves = {
        (width, piece): 1.0 for width in capacity.widths for piece in capacity.pieces
    }


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


@functools.cache
def log_softmax_of(ids, vocabulary=None, model_config=ENGINE_MODEL, tensor=1):
    """[T, V]: what a model expects after each of the T ids, by one forward pass."""
    mesh, length = helpers.make_mesh(tensor=tensor), model_config.max_length
    logits, _ = generate.make_forward(model_config, mesh)(
        helpers.initial_parameters(model_config, mesh),
        np.array([[*ids, *[0] * (length - len(ids))]], np.int32),
        np.arange(length, dtype=np.int32)[None],
        generate.empty_cache(model_config, mesh, 1, length),
    )
    return np.asarray(jax.nn.log_softmax(logits[0, : len(ids), :vocabulary]))


# ---------------------------------------------------------------- shared engines


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


@functools.cache
def text_engine():
    """Its model has more ids than its tokenizer: these are never sampled."""
    return make_engine(tokenizer=ByteTokenizer())


@functools.cache
def default_engine():
    return make_engine()


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
