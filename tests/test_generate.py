"""Cached generation is the full forward pass, token for token; errors are one line."""

import functools
import itertools
import logging
import math
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from helpers import make_mesh, random_parameters, small_model

import ladder_jax
from ladder_jax import config, generate, kv_cache, loading, sampling
from ladder_jax.config import ConfigError
from ladder_jax.data import tokenizer
from ladder_jax.saving import Checkpoints

pytestmark = pytest.mark.usefixtures("fast_compiler")

V, LENGTH = 40, 24
SCHEDULES = ["standard", "ladder", "hybrid:last1", "parallel", "desync:2", "ladder:1,2"]
SCHEDULES += ["dtp:1", "dtp:2"]
OWN_STREAMS = "desync", "dtp"  # on each number of ranks, another model


generate_model = functools.partial(
    small_model, vocab_size=V, max_length=32, qk_norm=True
)
# So large that greedy text does not repeat one token.
parameters = functools.partial(random_parameters, scale=0.5, seed=1)


def uncached(model_config, prompt, count, ranks):
    """Greedy ids by the plain reference, which computes the whole sequence each time.

    The sequence is padded, so that one program is enough.
    """
    weights = parameters(model_config)
    logits = jax.jit(
        lambda tokens: reference.logits(
            weights,
            model_config,
            tokens,
            jnp.arange(LENGTH),
            jnp.ones(LENGTH, jnp.int32),
            ranks,
        )
    )
    tokens = list(prompt)
    for _ in range(count):
        padded = jnp.array(tokens + [0] * (LENGTH - len(tokens)))
        tokens.append(int(logits(padded)[len(tokens) - 1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("residual", SCHEDULES)
def test_cached_generation_is_the_full_forward_pass(residual):
    model_config, prompt, count = generate_model(residual), [3, 1, 4, 1, 5], 18
    local = residual.startswith(OWN_STREAMS)
    texts = {
        ranks: uncached(model_config, prompt, count, ranks)
        for ranks in ((1, 2, 8) if local else (1,))
    }
    assert len(set(texts[1])) > 2, "the text repeats one or two tokens"
    different = {tuple(text) for text in texts.values()}
    assert len(different) == len(texts), "ranks make no difference"
    for tensor in (1, 2, 8):
        mesh = make_mesh(tensor=tensor)
        weights = parameters(model_config, mesh)
        tokens = list(
            generate.generate(weights, model_config, mesh, prompt, max_tokens=count)
        )
        assert tokens == texts[tensor if local else 1], f"tensor={tensor}"


@pytest.fixture(scope="module")
def small():
    """small(prompt, **options): the tokens of a ladder model on one device."""
    model_config, mesh = generate_model("ladder"), make_mesh()
    weights = parameters(model_config, mesh)
    return lambda prompt=(3, 1, 4), **options: list(
        generate.generate(
            weights, model_config, mesh, list(prompt), **{"max_tokens": 12, **options}
        )
    )


def test_sampling_repeats_by_its_seed(small):
    texts = [small(temperature=1.0, seed=seed) for seed in (0, 0, 1, 2**32 - 1)]
    assert texts[0] == texts[1] and len({tuple(text) for text in texts}) == 3
    # Neither max_tokens nor where the prompt ends changes what a position draws.
    assert small(temperature=1.0, max_tokens=5) == texts[0][:5]
    rest = small((3, 1, 4, *texts[0][:4]), temperature=1.0, max_tokens=8)
    assert rest == texts[0][4:]


def test_the_first_tokens_are_no_stop_ids(small):
    """They are those of requests for one token each, with a bias against the ids."""
    prompt, options = (3, 1, 4), dict(temperature=1.0, seed=3)
    whole = small(prompt, **options)
    stops = [whole[0], whole[5]]
    assert small(prompt, stop_token_ids=stops, **options) == []
    for min_tokens in (1, 4, 12):
        expected = []
        for _ in range(min_tokens):
            bias = dict.fromkeys(stops, -1e4)
            expected += small(
                (*prompt, *expected), max_tokens=1, logit_bias=bias, **options
            )
        expected += small(
            (*prompt, *expected),
            max_tokens=12 - min_tokens,
            stop_token_ids=stops,
            **options,
        )
        tokens = small(prompt, min_tokens=min_tokens, stop_token_ids=stops, **options)
        assert tokens == expected and not set(stops) & set(tokens)
    for wrong in (-1, 13, 1.0, True):
        with pytest.raises(ConfigError, match="min_tokens=.* 0 to max_tokens=12"):
            small(prompt, min_tokens=wrong)


def test_the_likeliest_alone_is_greedy(small):
    greedy = small()
    assert small(temperature=1.0, top_k=1) == greedy
    assert small(temperature=2.0, top_p=1e-6) == greedy
    assert small(temperature=1e-4) == greedy and small(temperature=1.0) != greedy
    assert small(temperature=0.0, seed=5, top_k=3) == greedy


OVER_SEEDS = sampling.SamplingParams(*(None,) * 7, 0, None, None)
SAMPLE = jax.jit(
    jax.vmap(generate.sample, (None, OVER_SEEDS, None, None, None)), static_argnums=4
)


def draws(logits, count=4000, temperature=1.0, top_k=0, top_p=1.0, vocabulary=5):
    """How often each of 5 ids is drawn."""
    params = sampling.make_params(temperature=temperature, top_k=top_k, top_p=top_p)
    params = params._replace(seed=np.arange(count, dtype=np.uint32)[:, None])
    ids = SAMPLE(
        jnp.array(logits, jnp.float32),
        params,
        np.zeros((1, 5), np.int32),
        np.int32(7),
        vocabulary,
    )
    return np.bincount(ids, minlength=5) / count


def test_ids_are_drawn_as_often_as_the_softmax_of_the_filtered_logits_says():
    p = np.array([0.4, 0.05, 0.3, 0.1, 0.15])
    near = functools.partial(pytest.approx, abs=0.03)  # four standard deviations
    only = lambda *ids: np.isin(np.arange(5), ids) * p / p[list(ids)].sum()
    logits = np.log(p) + 3
    assert draws(logits) == near(p)
    assert draws(logits, temperature=0.5) == near(p**2 / (p**2).sum())
    assert draws(logits, temperature=100.0) == near(np.full(5, 0.2))
    assert draws(logits, top_k=2) == near(only(0, 2))
    assert draws(logits, top_k=9) == near(p)
    assert draws(logits, top_p=0.69) == near(only(0, 2))
    assert draws(logits, top_p=0.71) == near(only(0, 2, 4))
    # Of the three likeliest, 0.4 of 0.85 is less than a half.
    assert draws(logits, top_k=3, top_p=0.5) == near(only(0, 2))
    assert draws(logits, top_k=3, top_p=0.45) == near(only(0))
    assert draws(logits, vocabulary=2) == near(only(0, 1)), "padding was drawn"
    # Of equal logits, the first is the likeliest, as for greedy decoding.
    assert draws([0, 1, 1, 1, 0], top_k=1)[1] == 1


def test_padding_is_never_drawn_and_the_stop_token_is_left_out(small):
    greedy = small()
    assert max(greedy) >= 10 and max(small(vocabulary=10)) < 10
    assert max(small(vocabulary=10, temperature=50.0, max_tokens=29)) < 10
    stop = greedy[5]
    before = list(itertools.takewhile(lambda token: token != stop, greedy))
    assert small(stop_token_ids=(stop,)) == before
    assert small(max_tokens=0) == []


@pytest.mark.parametrize(
    "prompt, options, message",
    [
        ([], {}, "prompt=[] is not accepted: it must be at least one token"),
        (
            [3, V],
            {},
            f"prompt=[3, {V}] is not accepted: it must be of ids from 0 to {V - 1}",
        ),
        ([-1], {}, f"prompt=[-1] is not accepted: it must be of ids from 0 to {V - 1}"),
        (
            [1] * 33,
            {},
            "prompt=33 or more tokens is not accepted: "
            "it must be at most model.max_length=32 tokens",
        ),
        (
            [1] * 21,
            {},
            "max_tokens=12 is not accepted: "
            "it must be from 0 to 11: model.max_length=32 less the 21 of the p",
        ),
        (
            [1],
            dict(max_tokens=-1),
            "max_tokens=-1 is not accepted: it must be from 0 to 31",
        ),
        (
            [1],
            dict(temperature=-0.1),
            "temperature=-0.1 is not accepted: it must be 0 (greedy) or more",
        ),
        ([1], dict(temperature=math.nan), "temperature=nan is not accepted"),
        ("abc", {}, "prompt='abc' is not accepted: it must be of ids from 0 to"),
        ([1.5], {}, "prompt=[1.5] is not accepted: it must be of ids from 0 to"),
        ([True], {}, "prompt=[True] is not accepted: it must be of ids from 0 to"),
        ([1], dict(max_tokens=2.0), "max_tokens=2.0 is not accepted: it must be from"),
        ([1], dict(max_tokens=None), "max_tokens=None is not accepted"),
        ([1], dict(max_tokens=True), "max_tokens=True is not accepted"),
        ([1], dict(stop_token_ids=3), "stop_token_ids=3 is not accepted: it must be"),
        ([1], dict(stop_token_ids=[V]), f"stop_token_ids=[{V}] is not accepted"),
        ([1], dict(stop_token_ids=["a"]), "stop_token_ids=['a'] is not accepted"),
        ([1], dict(logit_bias={V: 1}), f"logit_bias id={V} is not accepted"),
        ([1], dict(stop="x"), "stop is not a sampling parameter: it must be one of"),
        ([1], dict(top_k=-1), "top_k=-1 is not accepted: it must be 0 (all) or more"),
        (
            [1],
            dict(top_p=0.0),
            "top_p=0.0 is not accepted: it must be above 0, up to 1",
        ),
        ([1], dict(top_p=1.5), "top_p=1.5 is not accepted"),
        (
            [1],
            dict(seed=-1),
            "seed=-1 is not accepted: it must be from 0 to 2 ** 32 - 1",
        ),
    ],
)
def test_a_wrong_request_is_refused_before_its_first_token(prompt, options, message):
    model_config, mesh = generate_model("ladder"), make_mesh()
    options = {"max_tokens": 12, **options}
    with pytest.raises(ConfigError) as error:
        generate.generate(
            parameters(model_config, mesh), model_config, mesh, prompt, **options
        )
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_all_there_is_room_for(small):
    assert len(small([1] * 20)) == 12 and len(small([1] * 32, max_tokens=0)) == 0


# ---------------------------------------------------------------- load


def save(folder, model_config, tensor=1):
    """A run with two checkpoints: in that of step 2 all parameters are halved."""
    meta = dict(
        config=config.to_dict(
            config.Config(model=model_config, train=config.Train(seq_len=16))
        ),
        tensor=tensor,
        tokenizer=tokenizer.load("bytes").to_json(),
    )
    with Checkpoints(folder / "checkpoints", 9) as checkpoints:
        weights = parameters(model_config)
        checkpoints.save(1, {"model": weights}, None, meta)
        halved = jax.tree.map(lambda x: x / 2, weights)
        checkpoints.save(2, {"model": halved}, None, meta)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save(
        tmp_path_factory.mktemp("run"),
        generate_model("ladder", vocab_size=264, max_length=64),
    )


@pytest.fixture(scope="module")
def expected(run):
    """The reference's result for step 2 and the prompt "the ladder".

    Logits after every token of the prompt, and the text of 4 more tokens.
    """
    model_config = generate_model("ladder", vocab_size=264)
    weights = jax.tree.map(lambda x: x / 2, parameters(model_config))
    logits = jax.jit(
        lambda tokens: reference.logits(
            weights, model_config, tokens, jnp.arange(15), jnp.ones(15, jnp.int32)
        )
    )
    ids = [256, *b"the ladder"]
    for _ in range(4):
        logits_TV = logits(jnp.array(ids + [0] * (15 - len(ids))))[:, :259]
        ids.append(int(logits_TV[len(ids) - 1].argmax()))
    return logits_TV[:11], tokenizer.load("bytes").decode(ids[11:])


@pytest.mark.parametrize("mesh", [None, config.Mesh(2, 2, 2), config.Mesh(-1, 1, 4)])
def test_load_gives_all_that_generation_needs(run, expected, mesh):
    loaded = ladder_jax.load(run, mesh=mesh)
    assert loaded.tokenizer.size == 259 and loaded.config.model.residual == "ladder"
    assert loaded.mesh.size == (8 if mesh else 1) and all(
        x.dtype == jnp.float32 for x in jax.tree.leaves(loaded.model)
    )
    logits, ids = loaded.logits("the ladder")
    assert ids == [256, *b"the ladder"]
    np.testing.assert_allclose(logits, expected[0], atol=2e-4)
    assert "".join(loaded.generate("the ladder", max_tokens=4)) == expected[1]


def test_load_a_step_and_by_any_of_its_folders(run):
    embedding = np.asarray(ladder_jax.load(run, step=1).model.embedding[...])
    for path in (run / "checkpoints/1", str(run / "checkpoints/1")):
        assert np.array_equal(ladder_jax.load(path).model.embedding[...], embedding)
    newest = ladder_jax.load(run / "checkpoints")
    assert np.array_equal(newest.model.embedding[...], embedding / 2)
    with pytest.raises(
        ValueError, match=r"holds no checkpoint of step 7, only \[1, 2\]"
    ):
        ladder_jax.load(run, step=7)
    with pytest.raises(ValueError, match="none does not exist"):
        ladder_jax.load(run / "none")
    with pytest.raises(ConfigError, match="the mesh needs 16 devices, but there are 8"):
        ladder_jax.load(run, mesh=config.Mesh(1, 1, 16))
    with pytest.raises(
        ConfigError, match="model.heads=16 does not divide by mesh.tensor=3"
    ):
        ladder_jax.load(run, mesh=config.Mesh(1, 1, 3))


def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_it_loaded(
    run, tmp_path, caplog
):
    shutil.copytree(run, tmp_path / "run")
    for path in (tmp_path / "run/checkpoints/2/model").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        loaded = ladder_jax.load(tmp_path / "run")
    assert np.array_equal(
        loaded.model.embedding[...], ladder_jax.load(run, step=1).model.embedding[...]
    )
    [record] = [record for record in caplog.records if "damaged" in record.message]
    assert "checkpoints/2 is damaged" in record.message and record.message.endswith(
        "; taking the one before it"
    )


@pytest.mark.parametrize("residual", ["desync:2", "dtp:1"])
def test_a_model_of_own_streams_keeps_its_ranks(residual, tmp_path, monkeypatch):
    run = save(tmp_path, generate_model(residual, vocab_size=264), tensor=4)
    assert ladder_jax.load(run).mesh.shape["tensor"] == 4
    assert ladder_jax.load(run, mesh=config.Mesh(2, 1, -1)).mesh.shape["tensor"] == 4
    with pytest.raises(
        ConfigError,
        match=f"mesh.tensor=8 is not accepted: this {residual} model was trained with",
    ):
        ladder_jax.load(run, mesh=config.Mesh(1, 1, 8))
    with pytest.raises(ConfigError, match=r"has 4 devices, but there are 2"):
        ladder_jax.load(run, devices=jax.devices()[:2])
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    with pytest.raises(
        ConfigError,
        match=rf"needs 4 devices, but there are 2 \({residual} models keep the mesh",
    ):
        ladder_jax.load(run)


def test_each_token_yields_its_text_at_once_and_never_half_a_character(
    run, monkeypatch
):
    loaded = ladder_jax.load(run)
    ids = [*"a€😀".encode(), 0xE2, 0x82]
    monkeypatch.setattr(loading, "generate", lambda *_, **__: iter(ids))
    pieces = list(loaded.generate(""))
    assert pieces[:4] == ["a", "", "", "€"] and "".join(pieces) == "a€😀�"


def test_text_ends_before_a_stop_string_and_at_a_stop_id(run):
    loaded = ladder_jax.load(run)
    options = dict(max_tokens=30, temperature=1.0, seed=1)
    text = "".join(loaded.generate("ab", **options))
    stop, first = text[7:9], text[3]
    for stops in (stop, [stop], ("never there", stop)):
        cut = "".join(loaded.generate("ab", stop=stops, **options))
        assert cut == text[: text.index(stop)], stops
    ids = list(first.encode())
    cut = "".join(loaded.generate("ab", stop_token_ids=ids, **options))
    assert cut == text[: text.index(first)], "ids of bytes are the bytes"


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(stop=(10,)), "stop=(10,) is not accepted: it must be a non-empty string"),
        (dict(stop=""), "stop='' is not accepted"),
        (dict(stop=None), "stop=None is not accepted"),
        (dict(stop=b"x"), "stop=b'x' is not accepted"),
        (dict(stop_token_ids=["x"]), "stop_token_ids=['x'] is not accepted"),
        (dict(max_tokens=100), "max_tokens=100 is not accepted"),
        (dict(temperature=None), "temperature=None is not accepted"),
    ],
)
def test_a_wrong_option_of_a_loaded_model_is_refused_at_once(run, options, message):
    loaded = ladder_jax.load(run)
    with pytest.raises(ConfigError) as error:
        loaded.generate("ab", **options)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_engine_and_reference_take_the_same_options_and_write_the_same_text(run):
    loaded = ladder_jax.load(run)
    engine = ladder_jax.Engine(
        loaded.model,
        loaded.config.model,
        loaded.mesh,
        config.Decode(slots=1, steps_per_call=4, fit_shapes=False),
        loaded.tokenizer,
    )
    text = "".join(loaded.generate("ab", max_tokens=20, temperature=1.0))
    for options in (dict(stop=text[5:7]), dict(stop_token_ids=list(text[4].encode()))):
        options |= dict(max_tokens=20, temperature=1.0, logit_bias={"65": -100.0})
        expected = "".join(loaded.generate("ab", **options))
        assert engine.submit("ab", **options).result().text == expected


@pytest.mark.parametrize(
    "kv_dtype, compute_dtype, platform, expected",
    [
        ("auto", "bfloat16", "cpu", "float32"),
        ("auto", "bfloat16", "tpu", "bfloat16"),
        ("auto", "float32", "gpu", "float32"),
        ("int8", "bfloat16", "cpu", "int8"),
        ("bfloat16", "float32", "cpu", "bfloat16"),
    ],
)
def test_one_rule_chooses_the_dtype_of_caches(
    kv_dtype, compute_dtype, platform, expected
):
    assert kv_cache.choose_dtype(kv_dtype, compute_dtype, platform) == expected


def test_the_cache_of_the_reference_follows_the_rule():
    model_config = generate_model("ladder", dtype="bfloat16")
    assert generate.empty_cache(model_config, make_mesh(), 1, 8).k.dtype == jnp.float32
    cache = generate.empty_cache(model_config, make_mesh(), 1, 8, "int8")
    assert cache.k.dtype == jnp.int8


def test_importing_the_package_starts_no_jax():
    code = (
        "import sys, ladder_jax\n"
        "assert ladder_jax.Config().model.layers > 0\n"
        "assert {'Config', 'Engine', 'load'} <= set(dir(ladder_jax))\n"
        "assert 'jax' not in sys.modules and 'numpy' not in sys.modules\n"
        "assert ladder_jax.Engine and ladder_jax.load and 'jax' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_package_has_no_other_names():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ladder_jax.nothing


def test_programs_are_compiled_once(run):
    loaded = ladder_jax.load(run)
    forward = generate.make_forward(loaded.config.model, loaded.mesh)
    # All of them fit into the shortest prompt and cache that are compiled.
    for prompt, tokens in (("ab", 3), ("abc", 9), ("abcdefgh", 5)):
        list(loaded.generate(prompt, max_tokens=tokens, temperature=1.0, top_k=tokens))
    before = forward._cache_size(), generate.sample._cache_size()
    options = dict(temperature=0.5, top_k=2, top_p=0.5, seed=3)
    list(loaded.generate("abcd", max_tokens=7, **options))
    assert (forward._cache_size(), generate.sample._cache_size()) == before
