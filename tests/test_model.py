"""The model on every mesh and schedule is the plain reference, gradients included."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import BIASES, FAST, make_mesh, random_parameters
from model_cases import (
    BATCH,
    CASES,
    MESHES,
    OWN_STREAMS,
    assert_same,
    case_model,
    computed,
    reference_of,
)

from ladder_jax import model, schedule, sharding

pytestmark = pytest.mark.usefixtures("fast_compiler")

# Schedules differ over tensor shards. On the other meshes a few of them are tested.
QUICK = {
    ("desync:2", (1, 1, 1)),
    ("hybrid:0", (1, 1, 1)),
    ("standard", (8, 1, 1)),
    ("ladder", (1, 8, 1)),
}


@pytest.mark.parametrize(
    "name, mesh",
    [
        pytest.param(
            name,
            mesh,
            id=f"{name}-{'x'.join(map(str, mesh))}",
            marks=[] if mesh[2] > 1 or (name, mesh) in QUICK else pytest.mark.slow,
        )
        for name in CASES
        for mesh in MESHES
    ],
)
def test_loss_and_every_gradient_are_the_references(name, mesh):
    model_config = case_model(name)
    expected = reference_of(
        model_config, mesh[2] if name.startswith(OWN_STREAMS) else 1
    )
    assert_same(
        computed(model_config, mesh),
        expected,
        1e-5,
        f"{name} on data, fsdp, tensor = {mesh}",
    )


def test_the_batch_has_what_can_go_wrong():
    assert (np.diff(BATCH["segments"]) > 0).sum(axis=1).max() == 2, (
        "rows of three documents"
    )
    assert (
        (np.diff(BATCH["positions"]) != 1) == (np.diff(BATCH["segments"]) > 0)
    ).all(), "positions restart"
    assert 0 < BATCH["weights"].mean() < 1
    shares = BATCH["weights"].reshape(4, -1).sum(axis=1)
    assert len(set(map(float, shares))) > 1, (
        "data shards of unequal weight, so that a mean of means is wrong"
    )


@pytest.mark.parametrize(
    "options",
    [
        dict(remat="dots", chunk=5),
        dict(remat="reductions", chunk=16, reduction="recursive-doubling"),
        dict(remat="full", chunk=100, reduction="direct"),
        dict(unrolled=True),
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_remat_chunks_and_unrolling_change_nothing(options):
    """Chunks of 5 and 100 do not divide the 16 tokens of a data shard."""
    model_config = case_model("ladder:1,2")
    assert_same(
        computed(model_config, (2, 2, 2), **options),
        computed(model_config, (2, 2, 2)),
        2e-6,
        f"ladder:1,2 with {options}",
    )


@pytest.mark.parametrize("name", ["ladder", "hybrid:0", "parallel", "desync:4"])
@pytest.mark.slow
def test_unrolled_layers_are_the_scanned(name):
    model_config = case_model(name)
    assert_same(
        computed(model_config, (2, 2, 2), unrolled=True),
        computed(model_config, (2, 2, 2)),
        2e-6,
        f"{name}, unrolled",
    )


@pytest.mark.parametrize(
    "name, layers",
    [
        ("hybrid:0-1", 3),
        ("delays:1,1,1,1,2,2", 3),
        ("delays:2,2,2,2,2,2,1,1", 4),
        ("delays:2,2,2,0,1,1,1,1", 4),
    ],
)
def test_the_blocks_after_a_scan_have_a_delay_of_their_own(name, layers):
    """Layers in a scan meet layers whose first block has another delay."""
    model_config = case_model(name, layers=layers)
    assert_same(
        computed(model_config, (1, 2, 4)), reference_of(model_config, 1), 1e-5, name
    )


@pytest.mark.parametrize(
    "name, layers, fields",
    [
        ("ladder", 4, dict(window_layers="0,2", nope_layers="1,3")),
        ("standard", 3, dict(window_layers="last1", nope_layers="0-1")),
    ],
)
def test_layers_may_differ_in_what_their_attention_sees(name, layers, fields):
    """Layers that alternate are one scan; others end a scan."""
    model_config = case_model(name, layers=layers, sliding_window=3, **fields)
    expected = reference_of(model_config, 1)
    assert_same(computed(model_config, (1, 2, 4)), expected, 1e-5, name)
    unrolled = computed(model_config, (1, 2, 4), unrolled=True)
    assert_same(unrolled, expected, 1e-5, f"{name}, unrolled")


STANDARD = dict(layers=2, **CASES["standard"][1])


@pytest.mark.parametrize(
    "name, other",
    [
        ("standard", "ladder:0,0"),
        ("standard", "hybrid:last0"),
        ("standard", "delays:0,0,0,0"),
        ("ladder", "ladder:1,1"),
        ("ladder", "hybrid:0-1"),
        ("ladder", "hybrid:last2"),
        ("ladder", "delays:1,1,1,1"),
    ],
)
def test_schedules_that_mean_the_same_are_the_same_program(name, other):
    assert schedule.parse(name, 2) == schedule.parse(other, 2)


@pytest.mark.parametrize(
    "name, mesh", [("desync:1", (2, 2, 2)), ("desync:2", (1, 1, 1))]
)
def test_desync_is_standard_where_every_block_reduces_or_nothing_is_sharded(name, mesh):
    expected = reference_of(case_model("standard"), 1)
    assert_same(
        computed(case_model(name, **STANDARD), mesh),
        expected,
        1e-5,
        f"{name} on {mesh} against standard",
    )


@pytest.mark.parametrize("name", [*CASES, "upper-bound"])
def test_parameters_are_standards_but_for_parallels_second_norm(name):
    def counted(name):
        tree = model.abstract(
            case_model(name, layers=2, qk_norm=True, tie_embeddings=False, **BIASES)
        )
        names = sharding.parameter_names(tree)
        return collections.Counter(
            (n, leaf.shape) for n, leaf in zip(*map(jax.tree.leaves, (names, tree)))
        )

    lacks = {("mlp.norm", (2, 16)): 1} if name == "parallel" else {}
    assert counted("standard") - counted(name) == lacks and not counted(name) - counted(
        "standard"
    )


def test_bfloat16_is_close_and_its_gradients_are_float32():
    exact, rough = (
        case_model("ladder", dtype=dtype) for dtype in ("float32", "bfloat16")
    )
    (loss, gradients), (rough_loss, rough_gradients) = (
        computed(model_config, (2, 2, 2)) for model_config in (exact, rough)
    )
    assert abs(loss - rough_loss) < 0.02 * loss
    names = sharding.parameter_names(gradients)
    distance = jax.tree.map(
        lambda a, b: float(np.linalg.norm(a - b) / np.linalg.norm(a)),
        gradients,
        rough_gradients,
    )
    for name, leaf, far in zip(
        *map(jax.tree.leaves, (names, rough_gradients, distance))
    ):
        assert leaf.dtype == np.float32, name
        assert far < 0.1, f"d/d {name} is off by {far:.2f} of its norm"


# ---------------------------------------------------------------- what a token sees


@pytest.mark.parametrize(
    "name", [name for name in CASES if name not in ("delays:0,1,2,1", "desync:3")]
)
def test_a_token_depends_on_the_earlier_tokens_of_its_document_alone(name):
    """The gradient of an output by an embedding is zero if the token is unseen."""
    model_config = case_model(name, layers=2)
    rows, length = 2, 8
    segments = np.array([[1, 1, 1, 2, 2, 2, 2, 3], [1, 1, 1, 1, 1, 1, 1, 1]])
    positions = np.array([[0, 1, 2, 0, 1, 2, 3, 0], [0, 1, 2, 3, 4, 5, 6, 7]])
    # Every token has a row of the embedding of its own.
    tokens = np.arange(rows * length).reshape(rows, length)
    specs = sharding.parameter_specs(model.abstract(model_config))
    probe = np.float32(np.random.default_rng(1).normal(size=model_config.dim))

    def local(parameters):
        _, back = jax.vjp(
            lambda m: (
                model.hidden(m, model_config, tokens, positions, segments)[0] @ probe
            ),
            parameters,
        )
        outputs = jnp.eye(rows * length).reshape(-1, rows, length)
        return jax.vmap(lambda output: back(output)[0].embedding[...])(outputs)

    run = sharding.shard_map(
        local, make_mesh(tensor=2), (specs,), sharding.P(None, "tensor", None)
    )
    gradient_OVD = jax.jit(run, compiler_options=FAST)(random_parameters(model_config))
    influence = (
        np.abs(np.asarray(gradient_OVD)[:, : rows * length])
        .sum(axis=-1)
        .reshape(rows, length, rows, length)
    )
    for r, t, r2, t2 in np.ndindex(influence.shape):
        sees = r == r2 and t2 <= t and segments[r, t] == segments[r, t2]
        if model_config.sliding_window:  # a layer sees one window further
            sees &= t - t2 <= model_config.layers * (model_config.sliding_window - 1)
        assert (influence[r, t, r2, t2] != 0) == sees, (
            f"{name}: the output at row {r}, token {t} "
            f"{'ignores' if sees else 'depends on'} row {r2}, token {t2} "
            f"({influence[r, t, r2, t2]:.1e})"
        )
