"""A bad step is left out inside the compiled step, as if it had never been taken."""

import dataclasses
import json

import helpers
import jax
import numpy as np
import pytest
import tiny

from ladder_jax import config, sharding, skipping, train_programs
from ladder_jax.config import ConfigError
from ladder_jax.data import tokenizer
from ladder_jax.data.batches import train_iterator
from ladder_jax.data.corpus import prepare
from ladder_jax.optimizer import make_optimizer

pytestmark = pytest.mark.usefixtures("fast_compiler")


def state_after(step, state, batches):
    """(state on the host, results of each step); `state` is on the host, too."""
    results = []
    for batch in batches:
        state, result = step(state, batch)
        results.append({name: value.item() for name, value in result.items()})
    return jax.device_get(state), results


@pytest.mark.parametrize("parts", [1, 4])
def test_a_bad_step_is_as_if_it_had_never_been_taken(tiny_folder, parts):
    """On 8 devices; a value of one row is NaN, so of one part of the batch alone."""
    cfg = tiny.make(
        tiny_folder,
        train_global_batch=16,
        train_grad_accum_steps=parts,
        train_skip_steps=3,
    )
    mesh = helpers.make_mesh(2, 2, 2)
    optimizer = make_optimizer(cfg.optimizer, cfg.train.steps)
    corpus = prepare(cfg.data, tokenizer.load("bytes"))
    iterator = train_iterator(corpus, batch=16, length=32, seed=0)
    tokens = sharding.named_shardings(mesh, sharding.TOKENS)
    good = [next(iterator) for _ in range(3)]
    weights = good[2]["weights"].copy()
    weights[3, 5] = np.nan
    bad = {**good[2], "weights": weights}
    place = lambda batches: [jax.device_put(batch, tokens) for batch in batches]

    step = train_programs.make_step(cfg, mesh, optimizer)
    first = lambda: train_programs.init_state(cfg, mesh, optimizer)
    expected, without = state_after(step, first(), place(good))
    actual, results = state_after(
        step, first(), place([good[0], bad, good[1], bad, bad, good[2]])
    )
    for name in ("model", "optimizer"):
        pairs = zip(
            jax.tree.leaves(getattr(actual, name)),
            jax.tree.leaves(getattr(expected, name)),
            strict=True,
        )
        assert all(np.array_equal(left, right) for left, right in pairs), name
    assert [results[i]["loss"] for i in (0, 2, 5)] == [r["loss"] for r in without]
    assert all(np.isnan(results[i]["loss"]) for i in (1, 3, 4))
    assert results[1]["parameter_norm"] == results[0]["parameter_norm"]
    assert [r["skipped_steps"] for r in results] == [0, 1, 1, 2, 3, 3]
    assert [r["bad_in_a_row"] for r in results] == [0, 1, 0, 1, 2, 0]
    assert actual.watch[:3] == expected.watch[:3]

    if parts == 1:  # without the policy: another program, whose last bits may differ
        plain = dataclasses.replace(
            cfg, train=dataclasses.replace(cfg.train, skip_steps=0)
        )
        step = train_programs.make_step(plain, mesh, optimizer)
        state, _ = state_after(
            step, train_programs.init_state(plain, mesh, optimizer), place(good)
        )
        for left, right in zip(
            jax.tree.leaves(state.saved()), jax.tree.leaves(expected.saved())
        ):
            np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-6)


def slow_judge(values, limit, factor):
    """[(bad, bad in a row)] of (loss, norm) pairs: the rule as a loop."""
    good, found, row = [], [], 0
    for pair in values:
        bad = not np.isfinite(pair).all()
        if factor and len(good) >= skipping.WINDOW and not bad:
            means = np.mean(good[: skipping.WINDOW], axis=0)
            for seen in good[skipping.WINDOW :]:
                means = means + (np.array(seen) - means) / skipping.WINDOW
            bad = bool((np.array(pair) > factor * means).any())
        if not bad:
            good.append(pair)
        if row < limit:
            row = row + 1 if bad else 0
        found.append((bad, row))
    return found


@pytest.mark.parametrize("factor", [None, 3.0])
def test_the_rule_is_that_of_a_loop_over_the_whole_past(factor):
    random = np.random.default_rng(0)
    values = random.uniform(1, 2, (200, 2))
    values[20] = 40  # before there is a level to compare with
    values[[70, 130, 131, 160], [0, 1, 1, 0]] = 40
    values[[90, 91], 0] = np.inf
    values[[180, 182], 1] = np.nan
    options = config.Train(skip_steps=2, spike_factor=factor)
    judge = jax.jit(lambda watch, pair: skipping.judge(options, watch, *pair))
    watch, found = skipping.start(), []
    for pair in values.astype(np.float32):
        bad, watch = judge(watch, pair)
        found.append((bool(bad), int(watch.in_a_row)))
        state = json.loads(json.dumps(watch.state()))
        assert skipping.start(state) == jax.device_get(watch)
    assert found == slow_judge(values, 2, factor)
    assert watch.skipped == sum(bad for bad, _ in found) == (8 if factor else 4)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(skip_steps=-1), "train.skip_steps=-1"),
        (dict(rollbacks=-1), "train.rollbacks=-1"),
        (dict(skip_steps=1, spike_factor=1.0), "train.spike_factor=1.0"),
        (dict(spike_factor=9.0), "unless train.skip_steps is greater than 0"),
    ],
)
def test_mistakes(fields, message):
    with pytest.raises(ConfigError, match=message):
        config.Train(**fields)
