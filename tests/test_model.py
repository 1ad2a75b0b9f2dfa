"""The model on every mesh and schedule equals the plain reference, gradients included.

Its reductions are counted.
"""

import collections
import contextlib
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from helpers import make_mesh, random_parameters, small_model
from jax import lax
from jaxprs import equations

from ladder_jax import config, kv_cache, model, schedule, sharding
from ladder_jax.config import ConfigError
from ladder_jax.residual import layers as residual
from ladder_jax.residual.overlap import AsyncReduction

FAST = {"xla_backend_optimization_level": 0}  # compiles in half the time
B, T, V = 8, 8, 32

BIASES = dict(qkv_bias=True, out_bias=True, mlp_bias=True)
# By schedule: how many layers, and other fields of the model. 16 query heads share 8
# key-value heads.
CASES = {
    "standard": (2, BIASES | dict(tie_embeddings=True)),
    "ladder": (3, dict(qk_norm=True, qkv_bias=True, rope_scaling="llama3")),
    "ladder:1,2": (3, BIASES | dict(tie_embeddings=True, qk_norm=True)),
    "hybrid:0": (
        2,
        dict(activation="gelu_pytorch_tanh", qkv_bias=True, sliding_window=2),
    ),
    "hybrid:last1": (2, dict(rope_scaling="yarn")),
    "delays:0,1,2,1": (2, dict(activation="gelu", qk_norm=True, tie_embeddings=True)),
    "parallel": (2, BIASES | dict(qk_norm=True, rope_scaling="llama3")),
    "desync:2": (2, dict(tie_embeddings=True, qkv_bias=True)),
    "desync:4": (4, dict(qk_norm=True)),
    "desync:3": (2, BIASES | dict(rope_scaling="linear")),
    "dtp:2": (4, BIASES | dict(tie_embeddings=True)),
}
OWN_STREAMS = "desync", "dtp"  # models that differ with the number of tensor shards
MESHES = [(1, 1, 8), (2, 2, 2), (1, 1, 1), (8, 1, 1), (1, 8, 1)]  # data, fsdp, tensor


def case_model(name, layers=None, **fields):
    """The model of a case; `fields` replace those of the case."""
    case_layers, case_fields = CASES.get(name, (None, {}))
    fields = case_fields | fields
    if kind := fields.pop("rope_scaling", None):
        fields["rope_scaling"] = config.RopeScaling(
            kind=kind, factor=8.0, original_length=16, beta_fast=2.0, beta_slow=0.1
        )
    return small_model(name, layers=layers or case_layers, **fields)


def packed_batch(seed=0):
    """Rows of several documents, whose positions restart, and tokens without weight."""
    random = np.random.default_rng(seed)
    tokens = random.integers(0, V, (B, T + 1))
    segments = np.sort(random.integers(1, 4, (B, T)), axis=1)
    first = np.array([[list(row).index(s) for s in row] for row in segments])
    batch = dict(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        segments=segments,
        positions=np.arange(T) - first,
    )
    return {
        **{name: jnp.asarray(x, jnp.int32) for name, x in batch.items()},
        "weights": jnp.asarray(random.integers(0, 2, (B, T)), jnp.float32),
    }


BATCH = packed_batch()
BATCH_SPECS = dict.fromkeys(BATCH, sharding.TOKENS)


def on_mesh(model_config, mesh, **options):
    """(parameters, batch) -> (mean loss, gradients) of the whole batch."""
    specs = sharding.parameter_specs(model.abstract(model_config))

    def local(parameters, batch):
        weight = lax.psum(batch["weights"].sum(), sharding.BATCH_AXES)
        loss, gradients = jax.value_and_grad(
            lambda m: model.loss(m, model_config, batch, **options) / weight
        )(parameters)
        return lax.psum(loss, sharding.BATCH_AXES), sharding.sum_gradients(
            gradients, specs
        )

    return sharding.shard_map(
        local, make_mesh(*mesh), (specs, BATCH_SPECS), (sharding.REPLICATED, specs)
    )


@functools.cache
def computed(model_config, mesh, unrolled=False, **options):
    with mock.patch.object(residual, "run", run_unrolled if unrolled else residual.run):
        return jax.jit(on_mesh(model_config, mesh, **options), compiler_options=FAST)(
            random_parameters(model_config), BATCH
        )


@functools.cache
def reference_of(model_config, ranks):
    return jax.value_and_grad(lambda m: reference.loss(m, model_config, BATCH, ranks))(
        random_parameters(model_config)
    )


scanned = residual.run


def run_unrolled(plan, embedded, layers, apply, **options):
    """`residual.run` with the stack of layers given as a list."""
    return scanned(
        plan,
        embedded,
        [jax.tree.map(lambda x, i=i: x[i], layers) for i in range(len(plan.layers))],
        apply,
        **options,
    )


def assert_same(actual, expected, tolerance, what):
    """The same loss, and gradients within `tolerance` of each one's largest value."""
    (loss, gradients), (expected_loss, expected_gradients) = actual, expected
    wrong = (
        []
        if abs(loss - expected_loss) <= tolerance * abs(expected_loss)
        else [f"loss {loss} {expected_loss}"]
    )
    names = jax.tree.leaves(sharding.parameter_names(gradients))
    for name, a, b in zip(
        names,
        jax.tree.leaves(gradients),
        jax.tree.leaves(expected_gradients),
        strict=True,
    ):
        assert a.shape == b.shape and a.dtype == b.dtype == jnp.float32, (
            f"{what}: {name} is {a.dtype}{a.shape}"
        )
        error = float(jnp.abs(a - b).max() / jnp.abs(b).max())
        if not error <= tolerance:
            ratio = jnp.vdot(a, b) / jnp.vdot(b, b)
            wrong.append(
                f"d/d {name}: {error:.1e} of its largest value (ratio {ratio:.3f})"
            )
    assert not wrong, f"{what} differs by more than {tolerance:.0e}:\n  " + "\n  ".join(
        wrong
    )


# ---------------------------------------------------------------- equality

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
        lambda a, b: float(jnp.linalg.norm(a - b) / jnp.linalg.norm(a)),
        gradients,
        rough_gradients,
    )
    for name, leaf, far in zip(
        *map(jax.tree.leaves, (names, rough_gradients, distance))
    ):
        assert leaf.dtype == jnp.float32, name
        assert far < 0.1, f"d/d {name} is off by {far:.2f} of its norm"


# ---------------------------------------------------------------- what a token sees


@pytest.mark.parametrize(
    "name", [name for name in CASES if name not in ("delays:0,1,2,1", "desync:3")]
)
def test_a_token_depends_on_the_earlier_tokens_of_its_document_alone(name):
    """The gradient of an output by an embedding is zero if the token is unseen."""
    model_config = case_model(name, layers=2)
    rows, length = 2, 8
    segments = jnp.array([[1, 1, 1, 2, 2, 2, 2, 3], [1, 1, 1, 1, 1, 1, 1, 1]])
    positions = jnp.array([[0, 1, 2, 0, 1, 2, 3, 0], [0, 1, 2, 3, 4, 5, 6, 7]])
    # Every token has a row of the embedding of its own.
    tokens = jnp.arange(rows * length).reshape(rows, length)
    specs = sharding.parameter_specs(model.abstract(model_config))
    probe = jnp.asarray(
        np.random.default_rng(1).normal(size=model_config.dim), jnp.float32
    )

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


# ---------------------------------------------------------------- read positions

# The first row reads other positions than the others, and not in order.
READ = jnp.array([[5, 2]] + [[0, 7]] * (B - 1))


def prefilled(model_config, unstacked, tensor, read):
    """(program, arguments) of a prefill.

    It returns the logits at the positions `read` (None: at all), and caches by layer.
    """
    tree = random_parameters(model_config)
    tree = model.unstack(tree) if unstacked else tree
    shape = B, model_config.kv_heads, T, model_config.head_dim
    empty = kv_cache.KV(jnp.zeros(shape), jnp.zeros(shape))
    empty = (
        [empty] * model_config.layers
        if unstacked
        else jax.tree.map(lambda x: jnp.stack([x] * model_config.layers), empty)
    )
    cache_spec = sharding.P(*[None] * (1 if unstacked else 2), "tensor")

    def local(tree, empty):
        positions_BT = jnp.tile(jnp.arange(T), (B, 1))
        x_BRD, filled = model.hidden(
            tree, model_config, BATCH["tokens"], positions_BT, cache=empty, read_BR=read
        )
        return model.logits(tree, model_config, x_BRD), jax.tree.map(
            lambda *xs: jnp.stack(xs), *filled
        ) if unstacked else filled

    run = sharding.shard_map(
        local,
        make_mesh(1, 1, tensor),
        (sharding.parameter_specs(tree), cache_spec),
        (sharding.P(None, None, "tensor"), sharding.P(None, None, "tensor")),
    )
    return run, (tree, empty)


@pytest.mark.parametrize(
    "name, tensor, unstacked",
    [
        pytest.param(
            name,
            tensor,
            unstacked,
            marks=[]
            if tensor == 2 and unstacked or name == "ladder"
            else pytest.mark.slow,
        )
        for name in CASES
        if name != "desync:3"
        for tensor in (1, 2, 8)
        for unstacked in (False, True)
    ],
)
def test_a_prefill_that_reads_some_positions_has_the_logits_and_caches_of_all(
    name, tensor, unstacked
):
    model_config = case_model(name)

    def run(read):
        program, arguments = prefilled(model_config, unstacked, tensor, read)
        return jax.jit(program, compiler_options=FAST)(*arguments)

    (whole_BTV, whole_caches), (some_BRV, caches) = run(None), run(READ)
    np.testing.assert_allclose(
        some_BRV, jnp.take_along_axis(whole_BTV, READ[..., None], axis=1), atol=1e-5
    )
    for expected, cache in zip(
        jax.tree.leaves(whole_caches), jax.tree.leaves(caches), strict=True
    ):
        np.testing.assert_allclose(cache, expected, atol=1e-5)


@pytest.mark.parametrize(
    "name, unstacked, whole, read",
    [
        ("standard", True, 5, 2),
        ("ladder", True, 4, 3),
        ("ladder:1,2", True, 4, 3),
        ("parallel", True, 3, 1),
        ("desync:2", True, 3, 1),
        ("ladder", False, 7, 1),
    ],
)
def test_a_reduction_that_only_the_read_positions_need_is_of_these_positions(
    name, unstacked, whole, read
):
    """3 layers and the embedding reduce. A scan with delays has one reduction more."""
    run, arguments = prefilled(case_model(name, layers=3), unstacked, 8, READ)
    lengths = collections.Counter(
        eqn.outvars[0].aval.shape[1]
        for eqn, times in equations(jax.make_jaxpr(run)(*arguments).jaxpr)
        for _ in range(times)
        if eqn.primitive.name.startswith("psum")
    )
    assert lengths == {T: whole, READ.shape[1]: read}


# ---------------------------------------------------------------- what is communicated


def reductions(function, *args):
    """How often `function` sends (a part of) a [B, T, D] array over the tensor axis."""
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    return sum(
        times
        for eqn, times in equations(jaxpr)
        if eqn.primitive.name.startswith(("psum", "ppermute"))
        and "tensor" in str(eqn.params.get("axes", eqn.params.get("axis_name")))
        and eqn.outvars[0].aval.ndim == 3
        and eqn.outvars[0].aval.shape[-1] == 16
    )


def forward(model_config, mesh):
    specs = sharding.parameter_specs(model.abstract(model_config))
    local = lambda m, batch: lax.psum(
        model.loss(m, model_config, batch), sharding.BATCH_AXES
    )
    return sharding.shard_map(
        local, make_mesh(*mesh), (specs, BATCH_SPECS), sharding.REPLICATED
    )


@pytest.mark.parametrize(
    "name, unrolled, blocks",
    [
        ("standard", False, 8),
        ("ladder", False, 9),
        ("ladder", True, 8),
        ("ladder:1,2", False, 9),
        ("hybrid:last2", False, 8),
        ("parallel", False, 4),
        ("desync:2", False, 4),
        ("desync:4", False, 2),
        ("desync:3", True, 3),
        ("upper-bound", False, 0),
    ],
)
def test_the_number_of_reductions_is_the_schedules(name, unrolled, blocks):
    """The forward pass of 4 layers has one reduction for the embedding's partial and
    one for every block that reduces. The backward pass has one for every read of the
    stream. A scan with delays has one more in each direction, which reduces zeros:
    forward in its first repetition, backward in its last one.
    """
    model_config, mesh = case_model(name, layers=4), (1, 1, 8)
    plan = schedule.parse(name, 4)
    delayed = any(block.delay for layer in plan.layers for block in layer)
    back = (
        1
        + (blocks if plan.local else sum(map(len, plan.layers)))
        + (delayed and not unrolled)
    )
    with mock.patch.object(residual, "run", run_unrolled if unrolled else scanned):
        count = reductions(
            forward(model_config, mesh), model.abstract(model_config), BATCH
        )
        both = reductions(
            on_mesh(model_config, mesh, remat="reductions"),
            model.abstract(model_config),
            BATCH,
        )
    assert count == 1 + blocks, f"{name}: {count} reductions forward, not 1 + {blocks}"
    assert both == count + back, (
        f"{name}, with remat='reductions': {both - count} reductions backward, "
        f"not {back}"
    )


def known_failure(reason):
    return pytest.mark.xfail(strict=True, reason=f"AsyncReduction.progress: {reason}")


@pytest.mark.parametrize(
    "name, remat",
    [
        ("standard", "none"),
        ("standard", "reductions"),
        ("ladder", "none"),
        pytest.param(
            "ladder",
            "reductions",
            marks=known_failure(
                "products come out of a barrier with the state; XLA drops the results "
                "that are not used, JAX does not"
            ),
        ),
    ],
)
def test_a_reduction_of_three_rounds_sends_three_times_what_psum_does(name, remat):
    """Recursive doubling over 8 shards. remat="reductions" repeats no communication."""
    model_config = case_model(name, layers=4)
    counts = {
        reduction: reductions(
            on_mesh(model_config, (1, 1, 8), remat=remat, reduction=reduction),
            model.abstract(model_config),
            BATCH,
        )
        for reduction in ("psum", "recursive-doubling")
    }
    assert counts["recursive-doubling"] == 3 * counts["psum"], counts


def test_the_upper_bound_compiles_to_no_reduction_in_the_layers():
    counts = {}
    for name in ("upper-bound", "standard"):
        model_config = case_model(name, layers=2)
        specs = sharding.parameter_specs(model.abstract(model_config))
        sequence = [BATCH[name] for name in ("tokens", "positions", "segments")]

        def local(m, *sequence, model_config=model_config):
            return model.hidden(m, model_config, *sequence)[0]

        run = sharding.shard_map(
            local,
            make_mesh(1, 1, 8),
            (specs, *[sharding.TOKENS] * 3),
            sharding.REPLICATED,
        )
        text = (
            jax.jit(run, compiler_options=FAST)
            .lower(model.abstract(model_config), *sequence)
            .compile()
            .as_text()
        )
        counts[name] = text.count(" all-reduce(") + text.count(" all-reduce-start(")
    assert counts["upper-bound"] == 1, (
        f"the embedding's alone should be left; there are {counts['upper-bound']}"
    )
    assert counts["standard"] >= 3, (
        f"the same count finds {counts['standard']} in standard: it does not look right"
    )


@pytest.mark.parametrize("remat", ["none", "full"])
def test_all_matrix_products_are_of_bfloat16_summed_in_float32(remat):
    model_config = case_model("ladder", dtype="bfloat16")
    program = jax.make_jaxpr(on_mesh(model_config, (2, 2, 2), remat=remat, chunk=5))(
        model.abstract(model_config), BATCH
    )
    kinds = collections.Counter(
        tuple(str(var.aval.dtype) for var in (*eqn.invars, *eqn.outvars))
        for eqn, _ in equations(program.jaxpr)
        if eqn.primitive.name == "dot_general"
    )
    assert set(kinds) == {("bfloat16", "bfloat16", "float32")}, kinds
    assert kinds.total() >= 3 * 10


@pytest.mark.parametrize(
    "name",
    [name for name in CASES if name not in ("desync:3", "dtp:2")] + ["upper-bound"],
)
def test_no_partial_is_left_in_the_final_stream(name):
    """JAX's types of the unrolled forward pass prove that shards' streams are equal.

    The pass has no barriers: they change no value, but each result of a barrier gets
    the types of all its operands.
    """
    model_config = case_model(name, layers=2 if name == "upper-bound" else None)
    sequence = [BATCH[name] for name in ("tokens", "positions", "segments")]
    run = jax.shard_map(
        lambda m, *sequence: model.hidden(m, model_config, *sequence)[0],
        mesh=make_mesh(2, 2, 2),
        in_specs=(
            sharding.parameter_specs(model.abstract(model_config)),
            *[sharding.TOKENS] * 3,
        ),
        out_specs=sharding.TOKENS,
        check_vma=True,
    )
    refused = (
        pytest.raises(ValueError, match="tensor")
        if name == "upper-bound"
        else contextlib.nullcontext()
    )
    free = mock.patch.object(AsyncReduction, "progress", lambda self, product: product)
    with mock.patch.object(residual, "run", run_unrolled), free, refused:
        jax.eval_shape(run, model.abstract(model_config), *sequence)


# ---------------------------------------------------------------- mesh and specs

VARIANTS = [
    {},
    dict(tie_embeddings=True),
    dict(qk_norm=True),
    BIASES,
    dict(residual="parallel"),
    dict(residual="desync:2", qk_norm=True, qkv_bias=True, layers=1),
]


def test_every_parameter_has_a_spec_that_divides_the_dimension_it_names():
    names = set()
    for options in VARIANTS:
        model_config = config.Model(
            vocab_size=320,
            dim=24,
            heads=16,
            kv_heads=8,
            head_dim=10,
            ffn_dim=48,
            **{**dict(layers=3), **options},
        )
        tree = model.abstract(model_config)
        for name, leaf, spec in zip(
            *map(
                jax.tree.leaves,
                (sharding.parameter_names(tree), tree, sharding.parameter_specs(tree)),
            )
        ):
            names.add(name)
            axes = sharding.PARAMETERS[name].axes
            sizes = [getattr(model_config, sharding.DIMS[dim]) for dim in axes]
            stacked = [model_config.layers] * ("." in name)
            assert list(leaf.shape) == stacked + sizes, (
                f"{name} is {leaf.shape}, not layers + {sizes}"
            )
            assert tuple(spec) == (*(None for _ in stacked), *axes.values()), name
    assert names == set(sharding.PARAMETERS), (
        "PARAMETERS has a row that no model has, or lacks one"
    )


def one_line(function, *args):
    with pytest.raises(ConfigError) as error:
        function(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "field, size, mesh",
    [
        ("vocab_size", 31, (1, 1, 8)),
        ("heads", 12, (1, 1, 8)),
        ("kv_heads", 4, (1, 1, 8)),
        ("ffn_dim", 20, (1, 1, 8)),
        ("dim", 20, (1, 8, 1)),
    ],
)
def test_a_model_that_does_not_divide_is_one_line_with_the_field(field, size, mesh):
    options = {"kv_heads": 4} if field == "heads" else {}
    model_config = case_model("ladder", **{**options, field: size})
    text = one_line(sharding.check_fits, model_config, make_mesh(*mesh))
    assert f"model.{field}={size}" in text and (
        "mesh.tensor=8" in text or "mesh.fsdp=8" in text
    )


def test_a_batch_that_does_not_divide_is_one_line():
    assert "batch of 6" in one_line(
        sharding.check_fits, case_model("ladder"), make_mesh(2, 2, 2), 6
    )
    sharding.check_fits(case_model("ladder"), make_mesh(2, 2, 2), 8)


def test_a_mesh_that_does_not_fit_the_devices_is_one_line():
    assert "mesh data=3 x fsdp=1 x tensor=1 has 3 devices, but there are 8" in one_line(
        sharding.make_mesh, config.Mesh(3, 1, 1)
    )
    assert "data=-1 x fsdp=1 x tensor=3 does not divide the 8" in one_line(
        sharding.make_mesh, config.Mesh(-1, 1, 3)
    )
    assert tuple(sharding.make_mesh(config.Mesh(2, -1, 2)).shape.items()) == (
        ("data", 2),
        ("fsdp", 2),
        ("tensor", 2),
    )
    assert make_mesh(1, 1, 2).devices.size == 2
