"""The model on every mesh and schedule equals the plain reference, gradients included.

Its messages are counted.
"""

import collections
import contextlib
import functools
import math
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax import lax
from jaxprs import equations

from ladder_jax import config, kv_cache, model, schedule, sharding
from ladder_jax.config import ConfigError
from ladder_jax.residual import layers as residual
from ladder_jax.residual.overlap import AsyncReduction

FAST = {"xla_backend_optimization_level": 0}  # compiles in half the time
B, T, V = 8, 8, 32

# By schedule: how many layers, and other fields of the model. 16 query heads share 8
# key-value heads.
CASES = {
    "standard": (2, dict(tie_embeddings=True, qkv_bias=True)),
    "ladder": (3, dict(qk_norm=True, qkv_bias=True, rope_scaling=True)),
    "ladder:1,2": (3, dict(tie_embeddings=True, qk_norm=True)),
    "hybrid:0": (2, dict(qkv_bias=True)),
    "hybrid:last1": (2, dict(rope_scaling=True)),
    "delays:0,1,2,1": (2, dict(qk_norm=True, tie_embeddings=True)),
    "parallel": (2, dict(qk_norm=True, qkv_bias=True, rope_scaling=True)),
    "desync:2": (2, dict(tie_embeddings=True, qkv_bias=True)),
    "desync:4": (4, dict(qk_norm=True)),
    "desync:3": (2, dict(rope_scaling=True)),
}
MESHES = [(1, 1, 8), (2, 2, 2), (1, 1, 1), (8, 1, 1), (1, 8, 1)]  # data, fsdp, tensor


def settings(residual, layers=None, **options):
    """The model of a case; `options` replace what the case says."""
    if residual in CASES:
        options = {**CASES[residual][1], **options}
    if options.pop("rope_scaling", False):
        options["rope_scaling"] = config.RopeScaling(factor=8.0, original_length=16)
    return config.Model(
        **{
            **dict(
                vocab_size=V,
                dim=16,
                layers=layers or CASES[residual][0],
                heads=16,
                kv_heads=8,
                head_dim=4,
                ffn_dim=16,
                residual=residual,
                dtype="float32",
            ),
            **options,
        }
    )


@functools.cache
def make_mesh(shape):
    return sharding.make_mesh(config.Mesh(*shape), jax.devices()[: math.prod(shape)])


def parameters(cfg):
    """Random parameters: norms around 1 and no zeros, so that each of them matters."""
    random = np.random.default_rng(0)
    draw = lambda name, leaf: jnp.asarray(
        name.endswith("norm") + 0.3 * random.normal(size=leaf.shape), jnp.float32
    )
    return jax.tree.map(
        draw, sharding.parameter_names(model.abstract(cfg)), model.abstract(cfg)
    )


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


def on_mesh(cfg, mesh, **options):
    """(parameters, batch) -> (mean loss, gradients) of the whole batch."""
    specs = sharding.parameter_specs(model.abstract(cfg))

    def local(parameters, batch):
        weight = lax.psum(batch["weights"].sum(), sharding.BATCH_AXES)
        loss, gradients = jax.value_and_grad(
            lambda m: model.loss(m, cfg, batch, **options) / weight
        )(parameters)
        return lax.psum(loss, sharding.BATCH_AXES), sharding.sum_gradients(
            gradients, specs
        )

    return sharding.shard_map(
        local, make_mesh(mesh), (specs, BATCH_SPECS), (sharding.REPLICATED, specs)
    )


@functools.cache
def ours(cfg, mesh, unrolled=False, **options):
    with mock.patch.object(residual, "run", run_unrolled if unrolled else residual.run):
        return jax.jit(on_mesh(cfg, mesh, **options), compiler_options=FAST)(
            parameters(cfg), BATCH
        )


@functools.cache
def reference_of(cfg, ranks):
    return jax.value_and_grad(lambda m: reference.loss(m, cfg, BATCH, ranks))(
        parameters(cfg)
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


def assert_same(got, expected, tolerance, what):
    """The same loss, and gradients within `tolerance` of each one's largest value."""
    (loss, gradients), (expected_loss, expected_gradients) = got, expected
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
    cfg = settings(name)
    expected = reference_of(cfg, mesh[2] if name.startswith("desync") else 1)
    assert_same(
        ours(cfg, mesh), expected, 1e-5, f"{name} on data, fsdp, tensor = {mesh}"
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
    cfg = settings("ladder:1,2")
    assert_same(
        ours(cfg, (2, 2, 2), **options),
        ours(cfg, (2, 2, 2)),
        2e-6,
        f"ladder:1,2 with {options}",
    )


@pytest.mark.parametrize("name", ["ladder", "hybrid:0", "parallel", "desync:4"])
@pytest.mark.slow
def test_unrolled_layers_are_the_scanned(name):
    cfg = settings(name)
    assert_same(
        ours(cfg, (2, 2, 2), unrolled=True),
        ours(cfg, (2, 2, 2)),
        2e-6,
        f"{name}, unrolled",
    )


@pytest.mark.parametrize("name", ["hybrid:0-1", "delays:1,1,1,1,2,2"])
def test_the_blocks_after_a_scan_have_a_delay_of_their_own(name):
    """Two layers in a scan, then one whose first block has another delay."""
    cfg = settings(name, layers=3)
    assert_same(ours(cfg, (1, 1, 8)), reference_of(cfg, 1), 1e-5, name)


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
    expected = reference_of(settings("standard"), 1)
    assert_same(
        ours(settings(name, **STANDARD), mesh),
        expected,
        1e-5,
        f"{name} on {mesh} against standard",
    )


@pytest.mark.parametrize("name", [*CASES, "upper-bound"])
def test_parameters_are_standards_but_for_parallels_second_norm(name):
    def counted(name):
        tree = model.abstract(
            settings(name, layers=2, qk_norm=True, qkv_bias=True, tie_embeddings=False)
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
        settings("ladder", dtype=dtype) for dtype in ("float32", "bfloat16")
    )
    (loss, gradients), (rough_loss, rough_gradients) = (
        ours(cfg, (2, 2, 2)) for cfg in (exact, rough)
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
    cfg = settings(name, layers=2)
    rows, length = 2, 8
    segments = jnp.array([[1, 1, 1, 2, 2, 2, 2, 3], [1, 1, 1, 1, 1, 1, 1, 1]])
    positions = jnp.array([[0, 1, 2, 0, 1, 2, 3, 0], [0, 1, 2, 3, 4, 5, 6, 7]])
    tokens = jnp.arange(rows * length).reshape(
        rows, length
    )  # every token its own row of the embedding
    specs = sharding.parameter_specs(model.abstract(cfg))
    probe = jnp.asarray(np.random.default_rng(1).normal(size=cfg.dim), jnp.float32)

    def local(parameters):
        _, back = jax.vjp(
            lambda m: model.hidden(m, cfg, tokens, positions, segments)[0] @ probe,
            parameters,
        )
        outputs = jnp.eye(rows * length).reshape(-1, rows, length)
        return jax.vmap(lambda output: back(output)[0].embedding[...])(outputs)

    run = sharding.shard_map(
        local, make_mesh((1, 1, 2)), (specs,), sharding.P(None, "tensor", None)
    )
    gradient_OVD = jax.jit(run, compiler_options=FAST)(parameters(cfg))
    influence = (
        np.abs(np.asarray(gradient_OVD)[:, : rows * length])
        .sum(axis=-1)
        .reshape(rows, length, rows, length)
    )
    for r, t, r2, t2 in np.ndindex(influence.shape):
        sees = r == r2 and t2 <= t and segments[r, t] == segments[r, t2]
        assert (influence[r, t, r2, t2] != 0) == sees, (
            f"{name}: the output at row {r}, token {t} "
            f"{'ignores' if sees else 'depends on'} row {r2}, token {t2} "
            f"({influence[r, t, r2, t2]:.1e})"
        )


# ---------------------------------------------------------------- read positions

READ = jnp.array(
    [[5, 2]] + [[0, 7]] * (B - 1)
)  # other places in the first row, not in order


def prefilled(cfg, unstacked, tensor, read):
    """(program, arguments) of a prefill: the logits at the positions `read`, or at all,
    and the caches by layer."""
    tree = model.unstack(parameters(cfg)) if unstacked else parameters(cfg)
    empty = kv_cache.KV(*(jnp.zeros((B, cfg.kv_heads, T, cfg.head_dim)),) * 2)
    empty = (
        [empty] * cfg.layers
        if unstacked
        else jax.tree.map(lambda x: jnp.stack([x] * cfg.layers), empty)
    )
    cache_spec = sharding.P(*[None] * (1 if unstacked else 2), "tensor")

    def local(tree, empty):
        positions_BT = jnp.tile(jnp.arange(T), (B, 1))
        x_BRD, filled = model.hidden(
            tree, cfg, BATCH["tokens"], positions_BT, cache=empty, read_BR=read
        )
        return model.logits(tree, cfg, x_BRD), jax.tree.map(
            lambda *xs: jnp.stack(xs), *filled
        ) if unstacked else filled

    run = sharding.shard_map(
        local,
        make_mesh((1, 1, tensor)),
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
def test_what_is_read_alone_is_what_is_read_of_all(name, tensor, unstacked):
    cfg = settings(name)
    run = lambda read: jax.jit(
        (made := prefilled(cfg, unstacked, tensor, read))[0], compiler_options=FAST
    )(*made[1])
    (whole_BTV, kept), (some_BRV, kept_too) = run(None), run(READ)
    np.testing.assert_allclose(
        some_BRV, jnp.take_along_axis(whole_BTV, READ[..., None], axis=1), atol=1e-5
    )
    for one, other in zip(
        jax.tree.leaves(kept), jax.tree.leaves(kept_too), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=1e-5)


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
def test_reductions_that_only_read_places_wait_for_are_of_them_alone(
    name, unstacked, whole, read
):
    """Of 3 layers and the embedding; a scan with delays has one more (see below)."""
    run, arguments = prefilled(settings(name, layers=3), unstacked, 8, READ)
    lengths = collections.Counter(
        eqn.outvars[0].aval.shape[1]
        for eqn, times in equations(jax.make_jaxpr(run)(*arguments).jaxpr)
        for _ in range(times)
        if eqn.primitive.name.startswith("psum")
    )
    assert lengths == {T: whole, READ.shape[1]: read}


# ---------------------------------------------------------------- what is communicated


def reductions(function, *args):
    """How often `function` sends a [B, T, D] array, or a part, over the tensor axis."""
    made = jax.make_jaxpr(function)(*args)
    return sum(
        times
        for eqn, times in equations(made.jaxpr)
        if eqn.primitive.name.startswith(("psum", "ppermute"))
        and "tensor" in str(eqn.params.get("axes", eqn.params.get("axis_name")))
        and eqn.outvars[0].aval.ndim == 3
        and eqn.outvars[0].aval.shape[-1] == 16
    )


def forward(cfg, mesh):
    specs = sharding.parameter_specs(model.abstract(cfg))
    local = lambda m, batch: lax.psum(model.loss(m, cfg, batch), sharding.BATCH_AXES)
    return sharding.shard_map(
        local, make_mesh(mesh), (specs, BATCH_SPECS), sharding.REPLICATED
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
    """Of 4 layers. Forward: one for the embedding's partial and one for every block
    that reduces (a scan with delays reduces zeros in its first repetition). Backward:
    one for every read of the stream (a scan that ends before a read without delay
    reduces zeros in its last repetition)."""
    cfg, mesh, plan = settings(name, layers=4), (1, 1, 8), schedule.parse(name, 4)
    delayed = any(block.delay for layer in plan.layers for block in layer)
    back = (
        1
        + (blocks if plan.local else sum(map(len, plan.layers)))
        + (delayed and not unrolled)
    )
    with mock.patch.object(residual, "run", run_unrolled if unrolled else scanned):
        count = reductions(forward(cfg, mesh), model.abstract(cfg), BATCH)
        both = reductions(
            on_mesh(cfg, mesh, remat="reductions"), model.abstract(cfg), BATCH
        )
    assert count == 1 + blocks, f"{name}: {count} reductions forward, not 1 + {blocks}"
    assert both == count + back, (
        f"{name}, with remat='reductions': {both - count} reductions backward, "
        f"not {back}"
    )


def known(reason):
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
            marks=known(
                "products come out of a barrier with the state; XLA drops the results "
                "that are not used, JAX does not"
            ),
        ),
    ],
)
def test_a_reduction_of_three_rounds_sends_three_times_what_psum_does(name, remat):
    """Recursive doubling over 8 shards. remat="reductions" repeats no communication."""
    cfg = settings(name, layers=4)
    sent = {
        reduction: reductions(
            on_mesh(cfg, (1, 1, 8), remat=remat, reduction=reduction),
            model.abstract(cfg),
            BATCH,
        )
        for reduction in ("psum", "recursive-doubling")
    }
    assert sent["recursive-doubling"] == 3 * sent["psum"], sent


def test_the_upper_bound_compiles_to_no_reduction_in_the_layers():
    counts = {}
    for name in ("upper-bound", "standard"):
        cfg = settings(name, layers=2)
        specs = sharding.parameter_specs(model.abstract(cfg))
        sequence = [BATCH[name] for name in ("tokens", "positions", "segments")]
        local = lambda m, *sequence, cfg=cfg: model.hidden(m, cfg, *sequence)[0]
        run = sharding.shard_map(
            local,
            make_mesh((1, 1, 8)),
            (specs, *[sharding.TOKENS] * 3),
            sharding.REPLICATED,
        )
        text = (
            jax.jit(run, compiler_options=FAST)
            .lower(model.abstract(cfg), *sequence)
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
    cfg = settings("ladder", dtype="bfloat16")
    made = jax.make_jaxpr(on_mesh(cfg, (2, 2, 2), remat=remat, chunk=5))(
        model.abstract(cfg), BATCH
    )
    kinds = collections.Counter(
        tuple(str(var.aval.dtype) for var in (*eqn.invars, *eqn.outvars))
        for eqn, _ in equations(made.jaxpr)
        if eqn.primitive.name == "dot_general"
    )
    assert set(kinds) == {("bfloat16", "bfloat16", "float32")}, kinds
    assert kinds.total() >= 3 * 10


@pytest.mark.parametrize(
    "name", [name for name in CASES if name != "desync:3"] + ["upper-bound"]
)
def test_no_partial_is_left_in_the_final_stream(name):
    """JAX's types of the unrolled forward pass prove that shards' streams are equal.

    Without barriers, which change no value: each result has the types of all operands.
    """
    cfg = settings(name, layers=2 if name == "upper-bound" else None)
    sequence = [BATCH[name] for name in ("tokens", "positions", "segments")]
    run = jax.shard_map(
        lambda m, *sequence: model.hidden(m, cfg, *sequence)[0],
        mesh=make_mesh((2, 2, 2)),
        in_specs=(
            sharding.parameter_specs(model.abstract(cfg)),
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
        jax.eval_shape(run, model.abstract(cfg), *sequence)


# ---------------------------------------------------------------- mesh and specs

VARIANTS = [
    {},
    dict(tie_embeddings=True),
    dict(qk_norm=True),
    dict(qkv_bias=True),
    dict(residual="parallel"),
    dict(residual="desync:2", qk_norm=True, qkv_bias=True, layers=1),
]


def test_every_parameter_has_a_spec_that_divides_the_dimension_it_names():
    seen = set()
    for options in VARIANTS:
        cfg = config.Model(
            vocab_size=320,
            dim=24,
            heads=16,
            kv_heads=8,
            head_dim=10,
            ffn_dim=48,
            **{**dict(layers=3), **options},
        )
        tree = model.abstract(cfg)
        for name, leaf, spec in zip(
            *map(
                jax.tree.leaves,
                (sharding.parameter_names(tree), tree, sharding.parameter_specs(tree)),
            )
        ):
            seen.add(name)
            axes = sharding.PARAMETERS[name].axes
            sizes = [getattr(cfg, sharding.DIMS[dim]) for dim in axes]
            stacked = [cfg.layers] * ("." in name)
            assert list(leaf.shape) == stacked + sizes, (
                f"{name} is {leaf.shape}, not layers + {sizes}"
            )
            assert tuple(spec) == (*(None for _ in stacked), *axes.values()), name
    assert seen == set(sharding.PARAMETERS), (
        "rows of PARAMETERS that no model has, or the reverse"
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
    cfg = settings("ladder", **{**options, field: size})
    text = one_line(sharding.check_fits, cfg, make_mesh(mesh))
    assert f"model.{field}={size}" in text and (
        "mesh.tensor=8" in text or "mesh.fsdp=8" in text
    )


def test_a_batch_that_does_not_divide_is_one_line():
    assert "batch of 6" in one_line(
        sharding.check_fits, settings("ladder"), make_mesh((2, 2, 2)), 6
    )
    sharding.check_fits(settings("ladder"), make_mesh((2, 2, 2)), 8)


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
    assert make_mesh((1, 1, 2)).devices.size == 2
