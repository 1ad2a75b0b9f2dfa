"""20,000 requests over few pages: `pytest -s -m slow tests/test_soak.py`, 2 minutes."""

import dataclasses
import random
import time

import numpy as np
import pytest
from engines import check_pages, finish
from helpers import ENGINE_MODEL, make_engine, tokens_alone

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fast_compiler")]

REQUESTS = 20_000
MODEL = dataclasses.replace(
    ENGINE_MODEL, dim=8, layers=1, heads=2, kv_heads=1, ffn_dim=8, max_length=32
)
PAGE_SIZE = 4
# Bytes of a page. Eight slots could take 64 pages, three rows of staging 24.
PAGE_BYTES = PAGE_SIZE * 2 * MODEL.kv_heads * MODEL.head_dim * 4
PAGES, PREFIX_PAGES = 26, 10
SYSTEM = [[10 * number + i for i in range(9)] for number in range(8)]  # prompts begin


def requests(count, seed=0):
    """(prompt, options) of requests; a prompt is one of few, so that references are."""
    draw = random.Random(seed)
    kinds = [dict(), dict(temperature=1.0), dict(temperature=0.8, top_k=7)]
    for number in range(count):
        begin = SYSTEM[draw.randrange(8)][: draw.choice([0, 4, 8, 9])]
        prompt = [*begin, *[200 + (number % 5) * 7 + i for i in range(1 + number % 7)]]
        most = draw.randint(1, MODEL.max_length - len(prompt))
        options = kinds[number % 3] | dict(seed=number % 4)
        yield prompt, options | dict(max_tokens=most)


def test_20_000_requests_leak_no_page_and_lose_no_token():
    """They share prefixes, and some are cancelled; pages are checked on the way.

    Every hundredth request is compared with one that decodes alone.
    """
    engine = make_engine(
        MODEL,
        slots=8,
        staging=3,
        steps_per_call=4,
        max_length=MODEL.max_length,
        page_size=PAGE_SIZE,
        prefix_block=4,
        prefix_memory=str(PREFIX_PAGES * PAGE_BYTES),
        kv_memory=str(PAGES * PAGE_BYTES),
        queue_size=64,
    )
    draw, start = random.Random(1), time.perf_counter()
    running, sample, cancelled = [], [], 0
    for number, (prompt, options) in enumerate(requests(REQUESTS)):
        while engine.waiting >= 16:
            engine.step()
        request = engine.submit(prompt, **options)
        running.append(request)
        if number % 100 == 0:
            sample.append((request, prompt, options))
        if draw.random() < 0.05:
            victim = draw.choice(running[-24:])
            cancelled += victim.finish is None
            victim.cancel()
        if number % 500 == 0:
            check_pages(engine)
            running = [each for each in running if not each.finish]
    finish(engine)
    check_pages(engine)
    while engine.prefixes.blocks():
        engine.prefixes.evict()
    assert not np.asarray(engine.programs.state.pool.users).any()
    seconds = time.perf_counter() - start

    counters = engine.counters
    assert counters.submitted == counters.finished == REQUESTS
    assert counters.preempted > REQUESTS // 100 and not counters.failures
    assert counters.prefix_tokens and engine.prefixes.evicted and cancelled
    for request, prompt, options in sample:
        expected = tokens_alone(prompt, MODEL, **options)
        if request.finish == "cancelled":
            expected = expected[: len(request.tokens)]
        assert request.tokens == expected, (prompt, options)
    print(
        f"{REQUESTS} requests, {counters.tokens} tokens, {cancelled} cancelled, "
        f"{counters.preempted} preempted, {counters.prefix_tokens} prompt tokens of "
        f"shared pages, {engine.prefixes.evicted} blocks evicted: {seconds:.0f} s"
    )
