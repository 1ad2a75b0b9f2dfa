"""Sampling rules against plain NumPy; no row depends on its neighbours."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ladder_jax import sampling
from ladder_jax.config import ConfigError, short_repr

V = 37
top_k, top_p = jax.jit(sampling.top_k), jax.jit(sampling.top_p)
sample = jax.jit(sampling.sample_tokens, static_argnames=("vocabulary", "run"))


def logits(rows, seed=0, ties=False):
    x = np.random.default_rng(seed).normal(size=(rows, V)).astype(np.float32) * 2
    return np.round(x) if ties else x


def stack(*requests):
    return jax.tree.map(
        lambda *xs: np.concatenate(xs),
        *(
            sampling.make_params(r.pop("logit_bias", None), 2, V, **r)
            for r in map(dict, requests)
        ),
    )


def head(row, k=None, p=None):
    """Ids that top-k or top-p keeps: the likeliest, of equals the first."""
    order = np.argsort(-row, kind="stable")
    if k is not None:
        return set(order[:k].tolist())
    probability = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
    before = np.cumsum(probability[order]) - probability[order]
    return set(order[before < p].tolist())


@pytest.mark.parametrize("ties", [False, True])
def test_top_k_and_top_p_keep_the_ids_that_sorting_keeps(ties):
    x = logits(8, ties=ties)
    for k in (1, 2, 5, V, V + 3):
        passes = np.asarray(top_k(x, jnp.full(8, k))) > -np.inf
        assert [set(np.flatnonzero(row).tolist()) for row in passes] == [
            head(row, k=k) for row in x
        ]
    for p in (0.01, 0.3, 0.77, 0.95):
        passes = np.asarray(top_p(x, jnp.full(8, p))) > -np.inf
        assert [set(np.flatnonzero(row).tolist()) for row in passes] == [
            head(row.astype(np.float64), p=p) for row in x
        ]
    assert np.isfinite(top_p(x, jnp.ones(8))).all()
    assert np.isfinite(top_k(x, jnp.zeros(8, jnp.int32))).all()


def test_penalties_and_bias_follow_their_equations():
    x = logits(1)
    history = np.zeros((1, V), np.int32)
    history[0, [3, 4]] = 1  # in the prompt
    history[0, [4, 5]] += 2 * np.array([1, 3])  # generated once and three times
    p = stack(
        dict(
            repetition_penalty=1.5,
            presence_penalty=0.25,
            frequency_penalty=0.125,
            logit_bias={7: 3.0, 4: -1.0},
        )
    )
    expected = x[0].copy()
    for i in (3, 4, 5):
        expected[i] = expected[i] / 1.5 if expected[i] > 0 else expected[i] * 1.5
    for i, times in ((4, 1), (5, 3)):
        expected[i] -= 0.125 * times + 0.25
    expected[7] += 3
    expected[4] -= 1
    np.testing.assert_allclose(
        sampling.adjust(jnp.asarray(x), p, history)[0], expected, rtol=1e-6
    )


REQUESTS = [
    dict(),
    dict(temperature=1.0, seed=1),
    dict(temperature=0.7, top_k=5, seed=2),
    dict(temperature=1.2, top_p=0.6),
    dict(temperature=1.0, min_p=0.2, seed=2**32 - 1),
    dict(repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=-0.2),
    dict(temperature=2.0, logit_bias={3: 100.0}),
    dict(temperature=0.5, top_k=3, top_p=0.9, repetition_penalty=0.8, seed=9),
]


def test_a_row_gets_the_same_token_alone_and_among_others_with_and_without_branches():
    x, positions = logits(len(REQUESTS)), np.arange(len(REQUESTS), dtype=np.int32) * 7
    history = np.random.default_rng(1).integers(0, 5, x.shape).astype(np.int32)
    together = sample(x, stack(*REQUESTS), history, positions, V)
    masked = sample(x, stack(*REQUESTS), history, positions, V, run=sampling.run_always)
    alone = [
        int(
            sample(x[i : i + 1], stack(r), history[i : i + 1], positions[i : i + 1], V)[
                0
            ]
        )
        for i, r in enumerate(REQUESTS)
    ]
    assert together.tolist() == alone == masked.tolist()
    assert alone[6] == 3 and alone[0] == x[0].argmax()


def test_banned_ids_are_never_sampled_and_no_other_row_changes():
    x = logits(4)
    likeliest = x.argmax(axis=1)
    banned = np.array([[-1, -1], [likeliest[1], -1], [-1, V - 1], [V - 1, 0]])
    for row in (2, 3):  # the last id, which -1 could mean by mistake, is the likeliest
        x[row, V - 1] = 50
    params = stack(*[dict(logit_bias={0: 100.0})] * 4)
    neutral = params._replace(bias=np.zeros_like(params.bias))
    history, positions = np.zeros((4, V), np.int32), np.zeros(4, np.int32)
    for run in (sampling.run_if, sampling.run_always):
        draw = functools.partial(
            sample,
            x,
            history_BV=history,
            position_B=positions,
            vocabulary=V,
            run=run,
            banned_BE=banned,
        )
        order = np.argsort(-x, axis=1)
        expected = [order[0, 0], order[1, 1], order[2, 1], order[3, 1]]
        assert draw(params=neutral).tolist() == expected
        # A bias does not bring a banned id back.
        assert draw(params=params).tolist() == [0, 0, 0, order[3, 1]]


def test_draws_follow_the_distribution_and_depend_on_seed_and_position_alone():
    row = logits(1)[0]
    n = 4000
    draw = functools.partial(
        sample,
        np.tile(row, (n, 1)),
        history_BV=np.zeros((n, V), np.int32),
        vocabulary=V,
    )
    same = jax.tree.map(
        lambda x: np.repeat(x, n, axis=0), stack(dict(temperature=1.0, top_k=6))
    )
    positions = np.arange(n, dtype=np.int32)
    drawn = np.asarray(draw(params=same, position_B=positions))
    likeliest = list(head(row, k=6))
    probabilities = np.where(np.isin(np.arange(V), likeliest), np.exp(row), 0)
    probabilities /= probabilities.sum()
    frequencies = np.bincount(drawn, minlength=V) / n
    assert np.abs(frequencies - probabilities).max() < 4 * 0.5 / np.sqrt(n)
    again = np.asarray(draw(params=same, position_B=positions[::-1].copy()))[::-1]
    assert (drawn == again).all()
    other = np.asarray(
        draw(params=same._replace(seed=same.seed + 1), position_B=positions)
    )
    assert (drawn != other).mean() > 0.3


def test_min_p_keeps_ids_that_are_near_the_likeliest():
    x = logits(1)
    n = 500
    p = jax.tree.map(
        lambda v: np.repeat(v, n, axis=0), stack(dict(temperature=1.0, min_p=0.3))
    )
    drawn = sample(
        np.repeat(x, n, axis=0),
        p,
        np.zeros((n, V), np.int32),
        np.arange(n, dtype=np.int32),
        V,
    )
    allowed = set(np.flatnonzero(np.exp(x[0] - x[0].max()) >= 0.3).tolist())
    assert set(np.asarray(drawn).tolist()) == allowed


def test_padded_ids_are_never_drawn():
    x = logits(2)
    x[:, 30:] = 50
    p = stack(dict(), dict(temperature=5.0))
    for position in range(5):
        assert (
            sample(x, p, np.zeros((2, V), np.int32), np.full(2, position, np.int32), 30)
            < 30
        ).all()
    logprob, ids, top = sampling.log_probabilities(
        jnp.asarray(x), jnp.array([1, 2]), 4, 30
    )
    expected = x[:, :30] - np.log(np.exp(x[:, :30]).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(logprob, expected[[0, 1], [1, 2]], rtol=1e-5)
    np.testing.assert_allclose(top, -np.sort(-expected)[:, :4], rtol=1e-5)
    assert (np.asarray(ids) == np.argsort(-expected)[:, :4]).all()


NUMBER_NAMES = [name for name in sampling.PARAMETERS if name not in ("top_k", "seed")]
NAN, INF = float("nan"), float("inf")


def refusal(**options):
    """The message of the ConfigError for these options."""
    with pytest.raises(ConfigError) as error:
        sampling.make_params(options.pop("logit_bias", None), 2, V, **options)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "name, value",
    [
        ("temperature", -1),
        ("temperature", 1e-7),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", -1),
        ("top_k", 2.5),
        ("min_p", 1),
        ("repetition_penalty", 0),
        ("presence_penalty", 101),
        ("frequency_penalty", -101),
        ("seed", -1),
        ("seed", 2**32),
        ("seed", 0.5),
    ],
)
def test_a_value_outside_its_limits_is_refused_by_name(name, value):
    assert refusal(**{name: value}).startswith(f"{name}={value!r} is not accepted: ")


@pytest.mark.parametrize("name", list(sampling.PARAMETERS))
@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        False,
        "1",
        [1],
        NAN,
        INF,
        -INF,
        1j,
        np.bool_(True),
        np.float32(NAN),
        np.array(1),
        -(10**400),
    ],
    ids=lambda value: f"{type(value).__name__}:{str(value)[:6]}",
)
def test_what_is_no_finite_number_is_refused_by_name(name, value):
    message = refusal(**{name: value})
    assert message.startswith(f"{name}={short_repr(value)} is not accepted: ")


@pytest.mark.parametrize("name", [*NUMBER_NAMES, "seed"])
def test_a_huge_number_is_refused_by_name(name):
    message = refusal(**{name: 10**400})
    assert message.startswith(f"{name}=1000") and len(message) < 200, message


def test_the_limits_that_messages_name_are_accepted():
    params = sampling.make_params(temperature=1e-6, repetition_penalty=1e-6)
    assert params.temperature[0] > 0 and params.repetition_penalty[0] > 0


def test_a_huge_top_k_keeps_all():
    assert sampling.make_params(top_k=10**400).top_k.tolist() == [2**31 - 1]


@pytest.mark.parametrize("name", list(sampling.PARAMETERS))
@pytest.mark.parametrize(
    "kind", [int, float, np.int32, np.uint8, np.float16, np.float32, np.float64]
)
def test_numbers_of_numpy_are_accepted_as_those_of_python(name, kind):
    value = kind(sampling.PARAMETERS[name].default)
    [got] = getattr(sampling.make_params(**{name: value}), name)
    assert got == value


@pytest.mark.parametrize(
    "name, value", [("min_p", 1 - 1e-12), ("top_p", 1e-60), ("temperature", 1e300)]
)
def test_a_value_that_float32_rounds_out_of_its_limits_is_refused(name, value):
    assert "float32" in refusal(**{name: value})


@pytest.mark.parametrize("name", NUMBER_NAMES)
def test_the_default_of_every_parameter_leaves_the_logits_alone(name):
    neutral = sampling.make_params(**{name: sampling.PARAMETERS[name].default})
    for got, want in zip(neutral, sampling.neutral_params(1, 0), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)


def test_an_unknown_parameter_is_refused_by_name():
    assert refusal(warmth=1).startswith("warmth is not a sampling parameter")


@pytest.mark.parametrize(
    "bias, message",
    [
        ({V: 1}, f"logit_bias id={V} is not accepted: it must be a token id"),
        ({-1: 1}, "logit_bias id=-1 is not accepted"),
        ({"a": 1}, "logit_bias id='a' is not accepted"),
        ({"-1": 1}, "logit_bias id='-1' is not accepted"),
        ({"²": 1}, "logit_bias id='²' is not accepted"),
        ({1.5: 1}, "logit_bias id=1.5 is not accepted"),
        ({True: 1}, "logit_bias id=True is not accepted"),
        ({1: NAN}, "logit_bias[1]=nan is not accepted: it must be a number"),
        ({1: INF}, "logit_bias[1]=inf is not accepted"),
        ({1: None}, "logit_bias[1]=None is not accepted"),
        ({1: "2"}, "logit_bias[1]='2' is not accepted"),
        ({1: True}, "logit_bias[1]=True is not accepted"),
        ({1: 10001}, "logit_bias[1]=10001 is not accepted"),
        ({1: 0, "1": 1}, "logit_bias has the id 1 twice"),
        ({1: 0, 2: 0, 3: 0}, "logit_bias has 3 entries, which is not accepted"),
        ([[1, 2]], "logit_bias=[[1, 2]] is not accepted: it must be None or a dict"),
        ("", "logit_bias='' is not accepted: it must be None or a dict"),
        (0, "logit_bias=0 is not accepted: it must be None or a dict"),
    ],
)
def test_a_wrong_logit_bias_is_refused(bias, message):
    assert refusal(logit_bias=bias).startswith(message)


def test_logit_bias_takes_ids_as_numbers_and_as_text():
    params = sampling.make_params({"3": 1, np.int64(4): np.float32(-0.5)}, 3, V)
    assert params.bias_ids.tolist() == [[3, 4, 0]]
    assert params.bias.tolist() == [[1.0, -0.5, 0.0]]


def test_the_likeliest_token_is_the_first_of_the_largest_logits():
    # Few different values, so that many logits are equal.
    values_BV = np.random.default_rng(0).integers(-3, 4, (5, 301))
    logits_BV = values_BV.astype(np.float32)
    logits_BV[3] = -np.inf
    assert (
        sampling.argmax(jnp.asarray(logits_BV)).tolist()
        == logits_BV.argmax(axis=1).tolist()
    )
    assert 0 <= int(sampling.argmax(jnp.full((1, 7), jnp.nan))[0]) < 7
