"""The engine's memory is planned, and nothing compiles after `warm_up`."""

import dataclasses
import functools
import gc

import helpers
import jax
import jax.numpy as jnp
import pytest
from engines import finish, submit_all
from helpers import ENGINE_MODEL, make_engine, make_requests, tokens_alone
from jaxprs import equations

from ladder_jax.config import ConfigError, Decode, to_bytes
from ladder_jax.serve import compilation
from ladder_jax.serve.design import design

pytestmark = pytest.mark.usefixtures("fast_compiler")


def test_the_memory_of_rows_is_planned_and_never_overcommitted():
    make_engine = functools.partial(helpers.make_engine, kv_layout="rows")
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


def test_the_memory_of_pages_is_planned_and_never_overcommitted():
    token = 2 * 2 * 8 * 4 * 4  # as above
    engine = make_engine(
        slots=3, staging=2, page_size=8, prefix_block=16, prefix_memory="40KiB"
    )
    # A row of 64 tokens has 8 pages. Five blocks of 16 tokens are in 40 KiB.
    assert engine.capacity.page_count == 5 * 8 + 5 * 2
    pool = engine.programs.state.pool.kv
    assert sum(x.nbytes for x in jax.tree.leaves(pool)) == 50 * 8 * token
    assert engine.capacity.memory == dict(
        rows=40 * 8 * token,
        prefixes=40 * 1024,
        reshaping=0,
        total=40 * 8 * token + 40 * 1024,
    )
    assert (
        "of 64 tokens in float32 in 50 pages (attention by xla): 0.2 MiB"
        in engine.report()
    )
    # Less memory has fewer pages, and as many slots.
    engine = make_engine(slots=3, page_size=8, kv_memory="50KiB")
    assert (engine.capacity.slots, engine.capacity.page_count) == (3, 12)
    assert engine.capacity.memory["total"] == 12 * 8 * token
    too_small = "not enough for one request of 64 tokens .* take 0.1 MiB"
    with pytest.raises(ConfigError, match=too_small):
        make_engine(slots=3, prefix_memory="40KiB", kv_memory="50KiB")
    for size in (3, 32):
        with pytest.raises(ConfigError, match=f"page_size={size} .*prefix_block=16"):
            make_engine(page_size=size, prefix_block=16, prefix_memory="40KiB")


def test_no_program_casts_logits_or_the_unembedding():
    """A cast of all logits took 12% of a greedy step in another engine, which needs
    none: the product itself has float32 as its result."""
    V = 1009  # no other axis has this size
    model_config = dataclasses.replace(ENGINE_MODEL, dtype="bfloat16", vocab_size=V)
    mesh = helpers.make_mesh()
    jobs = compilation.jobs(design(model_config, mesh, helpers.ENGINE_OPTIONS, None))
    for job in jobs:
        found = list(equations(job.function.trace(*job.arguments).jaxpr.jaxpr))
        products = [e for e, _ in found if e.primitive.name == "dot_general"]
        logits = [e.outvars[0].aval for e in products if V in e.outvars[0].aval.shape]
        assert logits and all(aval.dtype == jnp.float32 for aval in logits), job.name
        casts = [e for e, _ in found if e.primitive.name == "convert_element_type"]
        wide = [e.invars[0].aval for e in casts if V in e.invars[0].aval.shape]
        assert not [aval for aval in wide if aval.dtype == jnp.bfloat16], job.name
        # Nor does XLA:CPU cast the embedding's table to read rows of it.
        with helpers.fast_compilation():
            text = job.function.lower(*job.arguments).compile().as_text()
        assert f"bf16[{V},{model_config.dim}]" in text, job.name
        assert f"f32[{V},{model_config.dim}]" not in text, job.name


@pytest.mark.parametrize("layout, drafts", [("pages", 0), ("rows", 0), ("rows", 2)])
def test_after_warm_up_nothing_compiles(layout, drafts):
    long = dataclasses.replace(ENGINE_MODEL, max_length=96)
    # No other test has an engine of these options, whose programs this one could share.
    engine = make_engine(
        long,
        kv_layout=layout,
        fit_shapes=True,
        slots=3,
        staging=2,
        steps_per_call=3,
        prefill_budget=16,
        max_length=None,
        max_logit_bias=3 + len(layout),
        speculate=drafts,
        prefix_memory="1MiB",
        prefix_block=8,
    )
    assert engine.capacity.lengths == ([96] if layout == "pages" else [64, 96])
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
    # Options that change what a program computes, not which program it is.
    for i, name in ((2, "prompt_logprobs"), (9, "prompt_logprobs"), (5, "logprobs")):
        requests[i][1][name] = i % 3
    requests[3] = [5, 9] * 12, dict(max_tokens=8, logit_bias={5: 40.0, 9: 40.0})
    longest = max((prompt for prompt, _ in requests[:5]), key=len)
    requests[13] = longest, requests[13][1]  # its prefix is stored by then
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
    assert engine.counters.prefix_tokens and (engine.counters.accepted > 0) == (
        drafts > 0
    )
    for request, prompt, options in submitted:
        for name in ("prompt_logprobs", "logprobs"):
            options.pop(name, None)
        assert request.tokens == tokens_alone(prompt, model_config=long, **options)
