"""A server's start: all mistakes before the port opens, memory that is planned, and no
compilation afterwards.
"""

import dataclasses
import sys
import threading

import foreign_folder as foreign
import helpers
import jax
import numpy as np
import pytest
from helpers import make_requests, tokens_alone
from hypothesis import given, settings
from hypothesis import strategies as st

from ladder_jax import checkpoint, cli, config, decode_weights, model, saving, sharding
from ladder_jax.config import ConfigError, Decode
from ladder_jax.data.tokenizer import ByteTokenizer
from ladder_jax.serve import compilation, memory
from ladder_jax.serve.design import design
from ladder_jax.serve.engine import Engine
from ladder_jax.serve.request import RequestFailed
from ladder_jax.server import startup
from ladder_jax.server.start_progress import Done, Stage, Stages

pytestmark = pytest.mark.usefixtures("fast_compiler", "no_compile_cache")

TOKENIZER = ByteTokenizer()
OPTIONS = Decode(
    slots=3,
    staging=2,
    steps_per_call=3,
    prefill_budget=16,
    prefix_memory="1MiB",
    prefix_block=4,
    max_logprobs=2,
    max_stop_ids=3,
    max_logit_bias=3,
    prompt_logprobs=True,
)


@pytest.fixture(scope="module")
def no_compile_cache():
    """What a start compiles does not depend on the tests before it."""
    with helpers.own_compile_cache():
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A checkpoint of a float32 model."""
    return helpers.write_engine_checkpoint(tmp_path_factory.mktemp("startup"))


@pytest.fixture(scope="module")
def started(run):
    """(a started server, what it reported)."""
    reports = []
    arguments = startup.Arguments(
        checkpoint=str(run), compile_cache="none", decode=OPTIONS
    )
    return startup.prepare(arguments, reports.append), reports


# ---------------------------------------------------------------- after the start


def test_all_programs_are_compiled_before_the_engine_serves(started):
    ready, reports = started
    plan = ready.checked.design
    # All chunks and prefill calls were compiled ahead of time, from shapes alone.
    chunks = len(plan.capacity.widths) * len(plan.capacity.lengths)
    jobs = compilation.jobs(plan)
    assert len(jobs) == len(ready.checked.programs) > chunks
    compiled, most = ready.engine.compiled()
    assert len(jobs) <= compiled <= most
    # The report says how far each stage is, and ends at its end.
    stages = [what for what in reports if isinstance(what, Stage)]
    names = dict.fromkeys(stage.name for stage in stages)
    assert list(names) == [
        "checks",
        "largest programs",
        "weights and programs",
        "engine",
        "first runs",
    ]
    for name in ("largest programs", "weights and programs", "first runs"):
        counts = [stage.done for stage in stages if stage.name == name]
        assert counts == sorted(counts) and counts[0] == 0
        last = [stage for stage in stages if stage.name == name][-1]
        assert last.done == last.total > 0 and last.seconds_left == 0
    assert set(ready.seconds) == {*names, "weights", "total"}
    lines = [what for what in reports if isinstance(what, str)]
    assert lines[0] == "no compile cache, as asked for"
    assert "3 slots and 2 rows of staging" in lines[1]
    assert lines[2].startswith("memory of a device: weights 138 kB, keys and values ")
    assert lines[-1] == ready.line()
    assert f"{ready.compiled} programs, 0 of them from the compile cache" in lines[-1]


def test_nothing_compiles_after_the_start_whatever_is_asked_for(started):
    """Other shardings, every option, cancellations, an error of the device."""
    ready, _ = started
    engine, count = ready.engine, ready.compilations
    eight = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
    spread = jax.sharding.NamedSharding(eight, jax.sharding.PartitionSpec("x"))
    prompt = np.arange(1, 17, dtype=np.int32)
    # Arrays on other devices, made before the count starts.
    prompts = [
        jax.device_put(prompt, jax.devices()[3]),
        jax.device_put(prompt, spread),
        prompt.astype(np.int64),
        [int(i) for i in prompt],
    ]
    options = [
        dict(),
        dict(temperature=1.0, seed=np.uint32(3), top_k=np.int64(5), top_p=0.9),
        dict(logprobs=2, min_p=0.1, temperature=0.7),
        dict(logit_bias={3: 1.0, "5": -2.0, 7: np.float32(1)}),
        dict(prompt_logprobs=2, max_tokens=0),
        dict(prompt_logprobs=0, logprobs=0),
        dict(presence_penalty=1.0, frequency_penalty=0.5, repetition_penalty=1.2),
        dict(stop=["a", "\n"], stop_token_ids=[1, 2], min_tokens=3),
        dict(ignore_eos=True, priority=9, max_tokens=40),
    ]
    before = count.total
    with engine_thread(engine):
        for start in range(0, 36, 4):  # groups, so that width and length change
            requests = [
                engine.submit(prompts[i % 4], **{"max_tokens": 5} | options[i % 9])
                for i in range(start, start + 4)
            ]
            requests[start % 3].cancel()
            for request in requests:
                request.result()
                assert request.finish in ("length", "stop", "cancelled")
        drawn = make_requests(6, longest=40)
        checked = []
        for ids, wanted in drawn:
            ids = [token % 256 for token in ids]
            wanted |= dict(max_tokens=min(wanted["max_tokens"], 63 - len(ids)))
            checked.append((engine.submit(ids, **wanted), ids, wanted))
        for request, *_ in checked:
            request.result()
        assert engine.counters.reshapes > 0 and engine.counters.prefix_tokens > 0
        # The device fails once; the engine allocates an empty state and goes on.
        real, engine.programs.chunks = engine.programs.chunks, {3: fails}
        lost = engine.submit([1], max_tokens=4)
        with pytest.raises(RequestFailed):
            lost.result()
        engine.programs.chunks = real
        assert engine.submit([1], max_tokens=4).result().finish in ("length", "stop")
    assert count.total == before, "a program was compiled while the server served"
    for request, ids, wanted in checked:
        assert request.tokens == tokens_alone(
            ids,
            stop_token_ids=TOKENIZER.eos_ids,
            vocabulary=TOKENIZER.size,
            **wanted,
        )


def fails(*_):
    raise RuntimeError("device lost")


class engine_thread:
    def __init__(self, engine):
        self.engine = engine

    def __enter__(self):
        self.engine.start()

    def __exit__(self, *_):
        self.engine.close()


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(checkpoint="/none"), "/none does not exist: a run's folder"),
        (dict(step=7), r"holds no checkpoint of step 7, only \[1\]"),
        (dict(tensor=5), "model.vocab_size=264 does not divide by mesh.tensor=5"),
        (dict(tensor=100), "the mesh needs 100 devices, but there are 8"),
        (dict(decode=Decode(max_length=65)), "decode.max_length=65 is not accepted"),
        (dict(decode=Decode(kv_memory="1KiB")), "decode.kv_memory=1KiB is not enough"),
        (dict(device_memory="much"), "device_memory='much' is not accepted"),
        (dict(processes=2), "processes=2 is not accepted without --distributed"),
        (
            dict(distributed=True, process=1),
            "process comes with coordinator and processes: give all three",
        ),
        (
            dict(device_memory="100KiB"),
            "the weights alone need .* while they are loaded: use more devices",
        ),
        (
            dict(device_memory="400KiB", decode=Decode(slots=64)),
            r"the engine needs .* on the device, and 410 kB are free: weights 138 kB, "
            r"keys and values .*; lower decode.slots from 64 to \d+, or ",
        ),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_loaded(
    run, monkeypatch, changes, message
):
    monkeypatch.setattr(checkpoint, "load_model", None)
    monkeypatch.setattr(compilation, "compile_all", None)
    arguments = startup.Arguments(checkpoint=str(run), compile_cache="none")
    with pytest.raises((ConfigError, ValueError), match=message) as raised:
        startup.check(dataclasses.replace(arguments, **changes))
    assert "\n" not in str(raised.value)


def test_a_template_that_is_not_valid_is_one_line_too(tmp_path, monkeypatch):
    foreign.write(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text("{% if %}")
    words = ["convert", "from-hf", str(tmp_path / "model"), str(tmp_path / "run")]
    with monkeypatch.context() as patch:  # an import without jinja2 does not see it
        patch.setitem(sys.modules, "jinja2", None)
        assert cli.run(words) == 0
    arguments = startup.Arguments(checkpoint=str(tmp_path / "run"))
    with pytest.raises(ConfigError, match="is not a valid Jinja template") as raised:
        startup.check(arguments)
    assert "\n" not in str(raised.value)


def test_the_callers_own_checks_come_first(run):
    def port():
        raise ConfigError("the port is taken")

    with pytest.raises(ConfigError, match="the port is taken"):
        startup.check(startup.Arguments(checkpoint=str(run)), first=port)


def test_programs_that_do_not_fit_are_noticed_before_weights_are_loaded(
    run, monkeypatch
):
    monkeypatch.setattr(checkpoint, "load_model", None)
    huge = memory.ProgramMemory(temporary=10**9, code=10**6)
    monkeypatch.setattr(
        compilation, "compile_all", lambda jobs, _: [huge for _ in jobs]
    )
    arguments = startup.Arguments(
        checkpoint=str(run), compile_cache="none", device_memory="100MiB"
    )
    with pytest.raises(ConfigError, match=r"programs 1.0 GB .*decode.prefill_budget"):
        startup.check(arguments)


# ---------------------------------------------------------------- memory


def large(**fields):
    """A model of 8 billion parameters."""
    sizes = dict(dim=4096, layers=32, heads=32, kv_heads=8, head_dim=128)
    own = dict(vocab_size=128256, ffn_dim=14336, max_length=8192, dtype="bfloat16")
    return config.Model(**sizes | own | fields)


@pytest.mark.parametrize("unroll", [True, False])
@pytest.mark.parametrize("tensor, layout", [(1, "pages"), (4, "pages"), (4, "rows")])
def test_the_plan_is_what_the_arrays_take(unroll, tensor, layout):
    mesh = helpers.make_mesh(tensor=tensor)
    small = dataclasses.replace(helpers.ENGINE_MODEL, dtype="bfloat16")
    options = dataclasses.replace(
        OPTIONS, unroll_layers=unroll, fit_shapes=False, kv_layout=layout
    )
    plan = memory.plan(design(small, mesh, options, TOKENIZER))
    engine = Engine(
        helpers.initial_parameters(small, mesh), small, mesh, options, TOKENIZER
    )

    def taken(tree):
        return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))

    state = engine.programs.state
    assert plan.weights == taken(engine.programs.weights)
    pool = state.pool.kv if layout == "pages" else []
    kv = taken((state.slots.kv, state.staging.kv, pool))
    assert plan.keys_values == engine.capacity.memory["rows"]
    assert plan.states == taken(state) - kv
    if layout == "rows":
        assert (plan.keys_values, plan.prefixes) == (kv, 2**20)
    else:  # the pool has whole blocks of prefixes
        block = engine.capacity.token_bytes * options.prefix_block
        assert plan.keys_values + plan.prefixes == kv
        assert plan.prefixes == 2**20 // block * block
    assert plan.logits == 3 * small.vocab_size * 4


def test_the_plan_of_a_large_model_allocates_nothing_and_its_advice_fits():
    mesh = helpers.make_mesh(tensor=4)
    limit = int(16e9 * 0.9)
    options = Decode(slots=256, max_length=8192, kv_dtype="bfloat16")
    too_large = design(large(), mesh, options)
    plan = memory.plan(too_large)
    assert 4.0e9 < plan.weights < 4.1e9  # 8.03 billion parameters, two bytes, a quarter
    assert plan.logits == 256 * 128256 * 4
    with pytest.raises(ConfigError) as raised:
        memory.check(plan, too_large, limit)
    text = str(raised.value)
    assert text.startswith("the engine needs ") and "on each of 4 devices" in text
    slots = int(text.split("decode.slots from 256 to ")[1].split(",")[0])
    for count, fits in ((slots, True), (slots + 4, False)):
        other = design(large(), mesh, dataclasses.replace(options, slots=count))
        assert (memory.plan(other).total <= limit) is fits
    length = int(text.split("decode.max_length from 8192 to ")[1].split(",")[0])
    other = design(large(), mesh, dataclasses.replace(options, max_length=length))
    assert memory.plan(other).total <= limit
    memory.check(plan, too_large, None)  # nobody knows how much there is


@settings(max_examples=40, deadline=None)
@given(
    slots=st.integers(1, 300),
    length=st.sampled_from([256, 1000, 8192]),
    prefix=st.sampled_from(["0", "64MiB", "2GiB"]),
    temporary=st.integers(0, 6 * 10**9),
    limit=st.integers(5 * 10**9, 20 * 10**9),
    kv_dtype=st.sampled_from(["bfloat16", "int8"]),
)
def test_each_advice_makes_the_plan_fit(
    slots, length, prefix, temporary, limit, kv_dtype
):
    mesh = helpers.make_mesh(tensor=4)
    options = Decode(
        slots=slots, max_length=length, prefix_memory=prefix, kv_dtype=kv_dtype
    )

    def plan_of(**fields):
        changed = design(large(), mesh, dataclasses.replace(options, **fields))
        return memory.with_programs(
            memory.plan(changed), [memory.ProgramMemory(temporary, 1000)], 10
        )

    plan = plan_of()
    text = memory.advice(plan, design(large(), mesh, options), limit)
    if plan.total <= limit or plan.loading > limit:
        return
    for name, field in (("slots", slots), ("max_length", length)):
        mark = f"decode.{name} from {field} to "
        if mark in text:
            value = int(text.split(mark)[1].split(",")[0])
            assert 0 < value < field
            assert plan_of(**{name: value}).total <= limit
    if (mark := f"decode.prefix_memory from {prefix} to ") in text:
        value = text.split(mark)[1].split(",")[0]
        assert plan_of(prefix_memory=value).total <= limit
    if "decode.kv_dtype=" in text:
        value = text.split("decode.kv_dtype=")[1].split(",")[0]
        assert plan_of(kv_dtype=value).total <= limit


def test_code_of_programs_that_are_not_compiled_yet_is_estimated_from_above():
    plan = memory.plan(
        design(helpers.ENGINE_MODEL, helpers.make_mesh(), helpers.ENGINE_OPTIONS)
    )
    known = [memory.ProgramMemory(10**9, 50), memory.ProgramMemory(5, 70)]
    full = memory.with_programs(plan, known, 10)
    assert full.temporary == 10**9 and full.code == 50 + 70 + 8 * 70
    assert full.serving == plan.serving - plan.logits + 10**9 + full.code


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize(
    "fields",
    [dict(), dict(tie_embeddings=True, qkv_bias=True, dtype="float32")],
)
@pytest.mark.parametrize("unroll", [True, False])
def test_weights_are_converted_one_by_one(fields, unroll):
    small = dataclasses.replace(helpers.ENGINE_MODEL, **dict(dtype="bfloat16") | fields)
    mesh = helpers.make_mesh(tensor=4)
    options = dataclasses.replace(helpers.ENGINE_OPTIONS, unroll_layers=unroll)
    spec = design(small, mesh, options).spec
    given = jax.tree.map(lambda x: x.copy(), helpers.initial_parameters(small, mesh))
    shardings = sharding.named_shardings(mesh, decode_weights.weights_specs(spec))
    plain = jax.jit(
        lambda x: decode_weights._convert_and_unstack(spec, x), out_shardings=shardings
    )(given)
    weights = decode_weights.prepare_weights(spec, given, consume=True)
    assert jax.tree.structure(plain) == jax.tree.structure(weights)
    for x, y in zip(jax.tree.leaves(plain), jax.tree.leaves(weights)):
        assert x.dtype == y.dtype and x.sharding == y.sharding
        assert np.array_equal(x, y)
    # What was converted is gone; what needed no conversion was not copied.
    kept = {id(x) for x in jax.tree.leaves(weights)}
    for x in jax.tree.leaves(given):
        assert x.is_deleted() or id(x) in kept
    if unroll or small.dtype == "float32":
        assert decode_weights.prepare_weights(spec, weights) is weights


def test_a_limit_below_a_chunk_is_raised_until_the_arrays_can_be_read(
    tmp_path, monkeypatch
):
    """One shard wrote whole arrays; four shards read a part of each."""
    written = model.init(helpers.ENGINE_MODEL, jax.random.key(0))
    with saving.Checkpoints(tmp_path, 1) as saved:
        saved.save(1, dict(model=written), None, {})
    monkeypatch.setattr(checkpoint, "READ_BYTES", 1)
    shapes = sharding.abstract(
        model.abstract(helpers.ENGINE_MODEL), helpers.make_mesh(tensor=4)
    )
    loaded = checkpoint.load_model(tmp_path, shapes)
    for x, y in zip(jax.tree.leaves(written), jax.tree.leaves(loaded), strict=True):
        assert np.array_equal(x, y)


# ---------------------------------------------------------------- progress


def test_stages_count_parts_from_any_thread_and_say_what_is_left():
    reports = []
    stages = Stages(reports.append)
    with stages.stage("work", 40) as done:
        assert isinstance(done, Done)
        threads = [threading.Thread(target=done, args=[None]) for _ in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [stage.done for stage in reports] == list(range(41))
    assert reports[0].seconds_left is None and reports[-1].seconds_left == 0
    assert str(Stage("work", 3, 40, 75.0)) == "work: 3 of 40, 1m15s left"
    assert str(Stage("engine")) == "engine"
    with stages.stage("runs") as done:
        assert list(done.each([1, 2, 3])) == [1, 2, 3]
    assert reports[-1].done == reports[-1].total == 3
    assert set(stages.all_seconds()) == {"work", "runs", "total"}
