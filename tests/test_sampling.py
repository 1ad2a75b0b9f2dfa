"""Sampling rules against NumPy written for reading, and the promise that a row knows nothing of its neighbours."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ladder_jax import sampling
from ladder_jax.config import ConfigError

V = 37
top_k, top_p = jax.jit(sampling.top_k), jax.jit(sampling.top_p)
choose = jax.jit(sampling.sample_tokens, static_argnames=("vocabulary", "maybe"))


def logits(rows, seed=0, ties=False):
    made = np.random.default_rng(seed).normal(size=(rows, V)).astype(np.float32) * 2
    return np.round(made) if ties else made


def stack(*requests):
    return jax.tree.map(
        lambda *xs: np.concatenate(xs),
        *(
            sampling.make_params(r.pop("logit_bias", None), 2, V, **r)
            for r in map(dict, requests)
        ),
    )


def head(row, k=None, p=None):
    """Ids that top-k or top-p keeps: likeliest first, of equals the first."""
    order = np.argsort(-row, kind="stable")
    if k is not None:
        return set(order[:k].tolist())
    probability = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
    before = np.cumsum(probability[order]) - probability[order]
    return set(order[before < p].tolist())


@pytest.mark.parametrize("ties", [False, True])
def test_top_k_and_top_p_keep_what_sorting_would(ties):
    x = logits(8, ties=ties)
    for k in (1, 2, 5, V, V + 3):
        kept = np.asarray(top_k(x, jnp.full(8, k))) > -np.inf
        assert [set(np.flatnonzero(row).tolist()) for row in kept] == [
            head(row, k=k) for row in x
        ]
    for p in (0.01, 0.3, 0.77, 0.95):
        kept = np.asarray(top_p(x, jnp.full(8, p))) > -np.inf
        assert [set(np.flatnonzero(row).tolist()) for row in kept] == [
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
    want = x[0].copy()
    for i in (3, 4, 5):
        want[i] = want[i] / 1.5 if want[i] > 0 else want[i] * 1.5
    for i, times in ((4, 1), (5, 3)):
        want[i] -= 0.125 * times + 0.25
    want[7] += 3
    want[4] -= 1
    np.testing.assert_allclose(
        sampling.adjust(jnp.asarray(x), p, history)[0], want, rtol=1e-6
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


def test_a_row_is_chosen_alike_alone_and_among_others_with_branches_and_without():
    x, positions = logits(len(REQUESTS)), np.arange(len(REQUESTS), dtype=np.int32) * 7
    history = np.random.default_rng(1).integers(0, 5, x.shape).astype(np.int32)
    together = choose(x, stack(*REQUESTS), history, positions, V)
    masked = choose(
        x, stack(*REQUESTS), history, positions, V, maybe=sampling.run_always
    )
    alone = [
        int(
            choose(x[i : i + 1], stack(r), history[i : i + 1], positions[i : i + 1], V)[
                0
            ]
        )
        for i, r in enumerate(REQUESTS)
    ]
    assert together.tolist() == alone == masked.tolist()
    assert alone[6] == 3 and alone[0] == x[0].argmax()


def test_draws_follow_the_distribution_and_depend_on_seed_and_position_alone():
    row = logits(1)[0]
    n = 4000
    draw = functools.partial(
        choose,
        np.tile(row, (n, 1)),
        history_BV=np.zeros((n, V), np.int32),
        vocabulary=V,
    )
    same = jax.tree.map(
        lambda x: np.repeat(x, n, axis=0), stack(dict(temperature=1.0, top_k=6))
    )
    positions = np.arange(n, dtype=np.int32)
    drawn = np.asarray(draw(params=same, position_B=positions))
    kept = head(row, k=6)
    want = np.where(np.isin(np.arange(V), list(kept)), np.exp(row), 0)
    want /= want.sum()
    got = np.bincount(drawn, minlength=V) / n
    assert np.abs(got - want).max() < 4 * 0.5 / np.sqrt(n)
    again = np.asarray(draw(params=same, position_B=positions[::-1].copy()))[::-1]
    assert (drawn == again).all()
    other = np.asarray(
        draw(params=same._replace(seed=same.seed + 1), position_B=positions)
    )
    assert (drawn != other).mean() > 0.3


def test_min_p_keeps_what_is_near_the_likeliest():
    x = logits(1)
    n = 500
    p = jax.tree.map(
        lambda v: np.repeat(v, n, axis=0), stack(dict(temperature=1.0, min_p=0.3))
    )
    drawn = choose(
        np.repeat(x, n, axis=0),
        p,
        np.zeros((n, V), np.int32),
        np.arange(n, dtype=np.int32),
        V,
    )
    allowed = set(np.flatnonzero(np.exp(x[0] - x[0].max()) >= 0.3).tolist())
    assert set(np.asarray(drawn).tolist()) == allowed


def test_padded_ids_are_never_taken():
    x = logits(2)
    x[:, 30:] = 50
    p = stack(dict(), dict(temperature=5.0))
    for position in range(5):
        assert (
            choose(x, p, np.zeros((2, V), np.int32), np.full(2, position, np.int32), 30)
            < 30
        ).all()
    logprob, ids, top = sampling.log_probabilities(
        jnp.asarray(x), jnp.array([1, 2]), 4, 30
    )
    want = x[:, :30] - np.log(np.exp(x[:, :30]).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(logprob, want[[0, 1], [1, 2]], rtol=1e-5)
    np.testing.assert_allclose(top, -np.sort(-want)[:, :4], rtol=1e-5)
    assert (np.asarray(ids) == np.argsort(-want)[:, :4]).all()


@pytest.mark.parametrize(
    "wrong, name",
    [
        (dict(temperature=-1), "temperature"),
        (dict(temperature=float("nan")), "temperature"),
        (dict(top_p=0), "top_p"),
        (dict(top_k=-1), "top_k"),
        (dict(min_p=1), "min_p"),
        (dict(repetition_penalty=0), "repetition"),
        (dict(seed=-1), "seed"),
        (dict(seed=2**32), "seed"),
        (dict(top_k="5"), "top_k"),
        (dict(warmth=1), "warmth"),
        (dict(logit_bias={V: 1}), "bias"),
        (dict(logit_bias={1: 0, 2: 0, 3: 0}), "bias"),
    ],
)
def test_mistakes_name_the_field(wrong, name):
    with pytest.raises(ConfigError, match=name):
        sampling.make_params(wrong.pop("logit_bias", None), 2, V, **wrong)


def test_the_likeliest_token_is_the_first_of_the_largest_logits():
    logits_BV = (
        np.random.default_rng(0).integers(-3, 4, (5, 301)).astype(np.float32)
    )  # full of ties
    logits_BV[3] = -np.inf
    assert (
        sampling.likeliest(jnp.asarray(logits_BV)).tolist()
        == logits_BV.argmax(axis=1).tolist()
    )
    assert 0 <= int(sampling.likeliest(jnp.full((1, 7), jnp.nan))[0]) < 7
