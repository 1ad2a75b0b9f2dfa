"""What a client submits: each option does what it says, and mistakes are one line."""

import functools

import helpers
import jax
import numpy as np
import pytest
from engines import default_engine, shared_engine, text_engine
from helpers import ENGINE_MODEL, make_requests, tokens_alone
from hypothesis import given, settings
from hypothesis import strategies as st

from ladder_jax import generate
from ladder_jax.config import ConfigError

pytestmark = pytest.mark.usefixtures("fast_compiler")


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
    "min_tokens": {"NumPy's 1"},  # at most max_tokens=1
    "ignore_eos": {"True", "NumPy's False"},
    "speculate": {"True", "NumPy's False"},
    "stop": {"[]"},  # this engine has no tokenizer, so no text
    "stop_token_ids": IDS | {"None", "[]"},
    "logprobs": WHOLE | {"None"},
    "prompt_logprobs": WHOLE | {"None"},
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
        (dict(min_tokens=-1), "min_tokens=-1 .* an integer from 0 to 63"),
        (dict(max_tokens=3, min_tokens=4), "min_tokens=4 .* at most max_tokens=3"),
        (dict(ignore_eos=1), "ignore_eos=1 is not accepted: it must be True or False"),
        (dict(prompt_logprobs=4), "prompt_logprobs=4 .* integer from 0 to 3"),
        (dict(max_tokens=0), "max_tokens=0 .* an integer from 1 to 63"),
        (dict(max_tokens=-1, prompt_logprobs=0), "max_tokens=-1 .* from 0 to 63"),
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


# ---------------------------------------------------------------- how long an output is


def alone(prompt, **options):
    """What `generate` gives for one request."""
    mesh = helpers.make_mesh()
    weights = helpers.initial_parameters(ENGINE_MODEL, mesh)
    return list(generate.generate(weights, ENGINE_MODEL, mesh, prompt, **options))


@settings(max_examples=12, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 5),  # the kind of sampling, see make_requests
            st.integers(0, 40),  # min_tokens
            st.integers(0, 12),  # which of its own tokens it stops at
        ),
        min_size=1,
        max_size=5,
    )
)
def test_the_first_min_tokens_are_no_stop_ids_and_no_program_is_compiled(plans):
    engine = shared_engine()
    compiled = engine.compiled()[0]
    submitted = []
    for kind, min_tokens, stop in plans:
        prompt, options = make_requests(6, longest=7)[kind]
        options |= dict(max_tokens=40)
        tokens = tokens_alone(prompt, **options)
        options |= dict(min_tokens=min_tokens, stop_token_ids=[tokens[stop], 3])
        submitted.append((engine.submit(prompt, **options), prompt, options))
    for request, prompt, options in submitted:
        expected = alone(prompt, **options)
        assert request.result().tokens == expected
        assert len(expected) >= options["min_tokens"]
        is_whole = len(expected) == 40
        assert request.finish == ("length" if is_whole else "stop")
    assert engine.compiled()[0] == compiled


def test_eos_ends_an_output_unless_it_is_ignored():
    """A bias makes eos the likeliest id everywhere."""
    engine = text_engine()
    eos = engine.tokenizer.eos
    submit = functools.partial(
        engine.submit, "ab", max_tokens=9, logit_bias={eos: 1000.0, 97: 500.0}
    )
    assert (submit().result().tokens, submit().result().finish) == ([], "stop")
    request = submit(min_tokens=4).result()
    assert (request.tokens, request.text, request.finish) == ([97] * 4, "aaaa", "stop")
    ignored = submit(ignore_eos=True).result()
    assert (ignored.tokens, ignored.finish) == ([eos] * 9, "length")
    assert ignored.text == ""
    assert submit(ignore_eos=False).result().tokens == []
    # Ids that the client names itself end the output.
    named = submit(ignore_eos=True, stop_token_ids=[eos]).result()
    assert (named.tokens, named.finish) == ([], "stop")
    assert submit(stop_token_ids=[]).result().tokens == [eos] * 9


def test_stop_strings_count_after_min_tokens():
    engine = text_engine()
    submit = functools.partial(
        engine.submit, "ab", max_tokens=9, logit_bias={97: 1000.0}
    )
    for min_tokens in range(10):
        request = submit(stop=["aa"], min_tokens=min_tokens).result()
        # The token that completes a stop string is the second at the earliest, and
        # comes after min_tokens.
        last = max(2, min_tokens + 1)
        if last > 9:
            assert (request.finish, request.text) == ("length", "a" * 9)
            continue
        assert (request.finish, len(request.tokens)) == ("stop", last)
        assert request.text == "a" * (last - 2)


# ---------------------------------------------------------------- defaults of sampling


def test_temperature_alone_draws_from_all_ids():
    """No other default makes it greedy: ten seeds give different texts."""
    engine = default_engine()
    requests = [
        engine.submit([5], max_tokens=8, temperature=1.0, seed=seed)
        for seed in range(10)
    ]
    greedy = engine.submit([5], max_tokens=8).result().tokens
    texts = [tuple(request.result().tokens) for request in requests]
    assert len(set(texts)) == 10 and tuple(greedy) not in texts
    neutral = dict(
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        repetition_penalty=1.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        logit_bias={},
    )
    for seed, text in enumerate(texts):
        request = engine.submit(
            [5], max_tokens=8, temperature=1.0, seed=seed, **neutral
        )
        assert tuple(request.result().tokens) == text
    # Without a temperature the seed does nothing.
    assert engine.submit([5], max_tokens=8, seed=3).result().tokens == greedy
