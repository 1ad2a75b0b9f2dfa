"""The engine's own thread, coroutines and threads that share it, and several hosts."""

import asyncio
import gc
import json
import sys
import threading
import weakref
from unittest import mock

import helpers
import pytest
from engines import CHUNK_STEPS, default_engine, shared_engine
from helpers import make_engine, make_requests, tokens_alone

from ladder_jax.serve.request import EngineClosed

pytestmark = pytest.mark.usefixtures("fast_compiler")


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


# ---------------------------------------------------------------- several hosts


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
