"""The distillation loss and its gradients equal slow ones in float64, on all meshes.

The slow one loops over tokens and takes gradients by differences.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from helpers import FAST, make_mesh, random_parameters, small_model
from model_cases import MESHES, assert_same, packed_batch

from ladder_jax import config, distill, objective, sharding

pytestmark = pytest.mark.usefixtures("fast_compiler")

BATCH = packed_batch()
STUDENT = small_model("hybrid:1", layers=2, tie_embeddings=True)
PARENT = small_model("standard", layers=3, qk_norm=True)  # another depth and head


# ---------------------------------------------------------------- the slow one


def probabilities(logits_V, temperature, kept):
    """float64 probabilities of the tokens `kept`, and of all others together."""
    p = np.exp((np.float64(logits_V) - np.max(logits_V)) / temperature)
    p /= p.sum()
    if kept is None:
        return p
    return np.append(p[kept], np.delete(p, kept).sum())


def divergence(logits_V, parent_V, temperature=1.0, top_k=0):
    """KL(parent || student) of one token, as its definition writes it."""
    kept = None
    if top_k:  # sort is stable: of equal logits the lowest id comes first
        kept = np.argsort(-np.float64(parent_V), kind="stable")[:top_k]
    p, q = (probabilities(x, temperature, kept) for x in (parent_V, logits_V))
    return temperature**2 * sum(a * np.log(a / b) for a, b in zip(p, q) if a > 0)


def entropy(logits_V, target):
    return -np.log(probabilities(logits_V, 1.0, None)[target])


def slope(function, logits_V):
    """The gradient of `function` by central differences."""
    steps = 1e-5 * np.eye(len(logits_V))
    x = np.float64(logits_V)
    return np.array([(function(x + h) - function(x - h)) / 2e-5 for h in steps])


# ---------------------------------------------------------------- the logits' part

V = 24
CASES = [(1.0, 0), (2.5, 0), (1.0, 1), (1.0, 5), (0.7, 23)]  # temperature, top_k


@pytest.mark.parametrize("temperature, top_k", CASES)
@pytest.mark.parametrize("tensor", [1, 2, 8])
def test_divergence_of_a_sharded_vocabulary(temperature, top_k, tensor):
    random = np.random.default_rng(1)
    logits, parent = 4 * random.normal(size=(2, 2, 3, V)).astype(np.float32)
    parent[0, 0] = np.float32([1, 2, 2, 2, 2, 2] * 4)  # ties on several shards
    parent[0, 1] += 500  # no overflow
    logits[1, 0] = parent[1, 0]  # no difference
    weights = random.normal(size=(2, 3)).astype(np.float32)

    def local(logits, parent):
        def total(logits, parent):
            kl = distill.divergence(logits, parent, temperature, top_k)
            return jnp.sum(kl * weights), kl

        gradients, kl = jax.grad(total, (0, 1), has_aux=True)(logits, parent)
        return kl, *gradients

    specs = sharding.LOGITS, sharding.LOGITS
    mapped = sharding.shard_map(
        local, make_mesh(tensor=tensor), specs, (sharding.TOKENS, *specs)
    )
    kl, gradient, to_parent = jax.jit(mapped, compiler_options=FAST)(logits, parent)
    assert not np.any(to_parent), "the parent gets a gradient"
    for b, t in np.ndindex(2, 3):
        one = functools.partial(
            divergence, parent_V=parent[b, t], temperature=temperature, top_k=top_k
        )
        np.testing.assert_allclose(kl[b, t], one(logits[b, t]), rtol=2e-5, atol=2e-6)
        expected = weights[b, t] * slope(one, logits[b, t])
        np.testing.assert_allclose(gradient[b, t], expected, rtol=2e-4, atol=3e-6)
    assert np.all(np.asarray(kl) > -1e-5)


def test_fewer_tokens_are_a_lower_bound():
    logits, parent = np.random.default_rng(2).normal(size=(2, V))
    values = [divergence(logits, parent, top_k=k) for k in (1, 3, 9, 23)]
    assert values == sorted(values) and values[-1] <= divergence(logits, parent)


# ---------------------------------------------------------------- the whole loss


def run_config(**fields):
    """A run of STUDENT; fields of train and distill, as train_loss_chunk=5."""
    whole = config.Config(
        model=STUDENT,
        train=config.Train(global_batch=8, seq_len=8),
        distill=config.Distill(parent="parent", cross_entropy=0.1),
    )
    for name, value in fields.items():
        section, _, field = name.partition("_")
        part = dataclasses.replace(getattr(whole, section), **{field: value})
        whole = dataclasses.replace(whole, **{section: part})
    return whole


@functools.cache
def parameters():
    return random_parameters(STUDENT), random_parameters(PARENT, seed=1)


@functools.cache
def expected(cross_entropy, temperature, top_k):
    """(divergence, cross-entropy, gradients), means over the batch's weights."""

    def logits_of(parameters, model_config):
        rows = (BATCH[name] for name in ("tokens", "positions", "segments"))
        one = functools.partial(reference.logits, parameters, model_config)
        return jax.vmap(one)(*rows)

    def gradients_of(parameters, dlogits_BTV):
        _, pull = jax.vjp(lambda p: logits_of(p, STUDENT), parameters)
        return pull(dlogits_BTV)[0]

    compiled = functools.partial(jax.jit, compiler_options=FAST)
    student, parent = parameters()
    logits_BTV, parent_BTV = (
        np.asarray(compiled(functools.partial(logits_of, model_config=own))(p))
        for p, own in ((student, STUDENT), (parent, PARENT))
    )
    kl = ce = 0.0
    dlogits_BTV = np.zeros(logits_BTV.shape)
    weights_BT = np.float64(BATCH["weights"]) / np.float64(BATCH["weights"]).sum()
    for b, t in np.ndindex(weights_BT.shape):
        if not weights_BT[b, t]:
            continue
        target, s = int(BATCH["targets"][b, t]), logits_BTV[b, t]
        one = lambda x, b=b, t=t: divergence(x, parent_BTV[b, t], temperature, top_k)
        both = lambda x, one=one, target=target: (
            one(x) + cross_entropy * entropy(x, target)
        )
        kl += weights_BT[b, t] * one(s)
        ce += weights_BT[b, t] * entropy(s, target)
        dlogits_BTV[b, t] = weights_BT[b, t] * slope(both, s)
    gradients = compiled(gradients_of)(student, np.float32(dlogits_BTV))
    return kl, ce, jax.device_get(gradients)


def computed(run, mesh):
    extras = objective.Extras(parent=PARENT)
    student, parent = parameters()
    device_mesh = make_mesh(*mesh)
    function = objective.loss_and_gradients(run, device_mesh, "xla", extras)
    function = jax.jit(function, compiler_options=FAST)
    return jax.device_get(function(student, BATCH, dict(parent=parent)))


def check(run, mesh, what):
    options = run.distill
    kl, ce, gradients = expected(
        options.cross_entropy, options.temperature, options.top_k
    )
    losses, actual = computed(run, mesh)
    assert float(losses["divergence"]) == pytest.approx(kl, rel=1e-5)
    assert float(losses["cross_entropy"]) == pytest.approx(ce, rel=1e-5)
    total = kl + options.cross_entropy * ce
    assert_same((losses["loss"], actual), (total, gradients), 2e-5, what)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_loss_and_gradients_are_the_references_on_every_mesh(mesh):
    check(run_config(), mesh, f"distillation on data, fsdp, tensor = {mesh}")


@pytest.mark.parametrize(
    "mesh, fields",
    [
        ((1, 2, 4), dict(train_loss_chunk=5, train_remat="full")),
        ((2, 1, 2), dict(train_grad_accum_steps=4, distill_top_k=3)),
        ((1, 1, 1), dict(train_grad_accum_steps=2, train_loss_chunk=16)),
        ((2, 2, 2), dict(distill_top_k=6, train_loss_chunk=7)),
        ((1, 1, 4), dict(distill_temperature=2.0, distill_cross_entropy=1.0)),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if type(value) is dict else "",
)
def test_options_and_parts_of_a_batch(mesh, fields):
    """Parts of a batch have different weights; chunks of 5 and 7 do not divide it."""
    check(run_config(**fields), mesh, f"distillation with {fields}")


def test_a_parent_of_itself_has_no_divergence_and_no_gradient():
    student, _ = parameters()
    run = run_config(distill_cross_entropy=0.0)
    extras = objective.Extras(parent=STUDENT)
    function = objective.loss_and_gradients(run, make_mesh(1, 2, 2), "xla", extras)
    function = jax.jit(function, compiler_options=FAST)
    losses, gradients = function(student, BATCH, dict(parent=student))
    assert abs(float(losses["divergence"])) < 1e-6
    gradients = jax.device_get(gradients)
    largest = max(float(np.abs(x).max()) for x in jax.tree.leaves(gradients))
    assert largest < 1e-5


def test_no_shard_gathers_the_vocabulary():
    """No array of the step has all logits of a token, with or without top-k."""
    for top_k in (0, 3):
        run = run_config(distill_top_k=top_k)
        extras = objective.Extras(parent=PARENT)
        function = objective.loss_and_gradients(run, make_mesh(1, 1, 8), "xla", extras)
        student, parent = parameters()
        text = jax.jit(function).lower(student, BATCH, dict(parent=parent)).as_text()
        assert "8x8x4xf32" in text, "a shard's logits: 8 x 8 tokens, 32 / 8 entries"
        assert "8x8x32xf32" not in text
