"""Recipes: a test builds each at full size and traces one step of it on its own mesh,
at the cost of shapes alone.
"""

import ast
import functools
import math
import re
import shlex
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ROOT
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from ladder_jax import cli, model, sharding, train_programs, training
from ladder_jax.config import from_recipe
from ladder_jax.hardware import chips
from ladder_jax.optimizer import make_optimizer

RECIPES = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))

PARAMETERS = {
    "demo": None,  # not anybody's model
    "scratch_1b": 1_208_083_968
    + 49152 * 1536,  # the paper counts one of two embeddings: 1.2B
    "scratch_3b": 3_510_819_072 + 49152 * 2304,  # 3.5B
    "llama3_8b": 8_030_261_248,
    "llama31_8b_hybrid": 8_030_261_248,
    "smollm2_hybrid": 134_515_008,
    "codellama_34b": 33_743_970_304,
    "llama3_70b": 70_553_706_496,
    # BLOOM has 176,247,271,424. Here: 70 layers of four square matrices, three matrices
    # of the MLP and two norms; a norm; one embedding for both ends.
    "bloom_176b": 70 * (4 * 14336**2 + 3 * 14336 * 50176 + 2 * 14336)
    + 14336
    + 250880 * 14336,
    # Published with 8 key-value heads. 8 more have a key and a value matrix each in 126
    # layers.
    "llama3_405b": 405_853_388_800 + 126 * 2 * 16384 * 8 * 128,
}


@functools.cache
def recipe(name, *overrides):
    """A recipe's config, as the command line makes it."""
    path = str(ROOT / "configs" / f"{name}.py")
    return cli.parse(
        cli.TrainArguments, list(overrides), name, cli.TrainArguments(from_recipe(path))
    ).config


def documentation(name):
    """A recipe's docstring."""
    return ast.get_docstring(ast.parse((ROOT / "configs" / f"{name}.py").read_text()))


@functools.cache
def parameters(config):
    return model.abstract(config)


def count(config):
    return sum(leaf.size for leaf in jax.tree.leaves(parameters(config)))


def bytes_of(tree):
    return sum(
        math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
    )


def shards(tree):
    """A device's share of a tree of arrays that say how they are sharded."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.sharding.shard_shape(x.shape), x.dtype), tree
    )


@pytest.fixture
def planned(monkeypatch):
    """The mesh of a config, of devices that are not there."""
    cpu = SimpleNamespace(platform="cpu", device_kind="cpu")  # plain attention
    monkeypatch.setattr(AbstractMesh, "devices", np.array([cpu]))
    return lambda config: AbstractMesh(
        (config.mesh.data, config.mesh.fsdp, config.mesh.tensor),
        sharding.AXES,
        axis_types=(AxisType.Auto,) * 3,
    )


def batch_of(config, rows):
    return {
        name: jax.ShapeDtypeStruct(
            (rows, config.train.seq_len),
            jnp.float32 if name == "weights" else jnp.int32,
        )
        for name in training.BATCH_FIELDS
    }


def kept_for_backward(config, mesh):
    """What one device's forward pass of one accumulated part leaves for its backward
    pass. Parameters may be among it."""

    def forward(parameters, batch):
        return jax.tree.leaves(
            jax.vjp(
                lambda parameters: model.loss(
                    parameters,
                    config.model,
                    batch,
                    remat=config.train.remat,
                    chunk=config.train.loss_chunk,
                    sequence_parallel=config.mesh.sequence_parallel,
                ),
                parameters,
            )[1]
        )

    specs = (
        sharding.parameter_specs(parameters(config.model)),
        dict.fromkeys(training.BATCH_FIELDS, sharding.TOKENS),
    )
    local = sharding.shard_map(forward, mesh, specs, PartitionSpec())
    return jax.eval_shape(
        local,
        parameters(config.model),
        batch_of(config, config.train.global_batch // config.train.grad_accum_steps),
    )


ANYWHERE = {"demo", "smollm2_hybrid"}  # recipes for any machine
FROM_SCRATCH = [n for n in RECIPES if n not in ANYWHERE and not n.endswith("hybrid")]


def test_every_recipe_is_tested():
    assert RECIPES == sorted(PARAMETERS)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_fits_its_hardware_at_full_size(name, planned):
    config = recipe(name)
    mesh, optimizer = (
        planned(config),
        make_optimizer(config.optimizer, config.train.steps),
    )
    assert PARAMETERS[name] in (None, count(config.model))
    sharding.check_fits(
        config.model, mesh, config.train.global_batch // config.train.grad_accum_steps
    )

    state = train_programs.abstract_state(config, mesh, optimizer)
    after, results = jax.eval_shape(
        train_programs.make_step(config, mesh, optimizer),
        state,
        batch_of(config, config.train.global_batch),
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    assert results["loss"].shape == ()
    evaluated = jax.eval_shape(
        train_programs.make_evaluation(config, mesh),
        state.model,
        batch_of(config, config.train.global_batch),
    )
    assert [x.shape for x in evaluated] == [(), ()]

    # A device's memory: as the recipe says, and less than the device has. A step that
    # accumulates holds gradients twice.
    held, gradients = (
        bytes_of(shards(state)),
        bytes_of(shards(state.model)) * (1 + (config.train.grad_accum_steps > 1)),
    )
    activations = bytes_of(kept_for_backward(config, mesh))
    print(
        f"{name}: {held / 1e9:.1f} GB of parameters and AdamW state, "
        f"{gradients / 1e9:.1f} GB of gradients, "
        f"{activations / 1e9:.1f} GB kept for the backward pass"
    )
    hardware = re.search(
        r"Hardware: +(\d+) .* of (\d+) GB.*; a device holds (\S+) GB of parameters and "
        r"AdamW state",
        " ".join(documentation(name).split()),
    )
    if name in ANYWHERE:
        return
    devices, memory, written = hardware.groups()
    assert int(devices) == mesh.size and written == f"{held / 1e9:.1f}"
    assert held + gradients + activations < 0.9 * float(memory) * 1e9


@pytest.mark.parametrize("name", RECIPES)
def test_the_numbers_of_a_recipes_docstring_are_right(name):
    """Command, hardware, time and result are in order; the steps give the time."""
    text = documentation(name)
    places = [
        re.search(rf"^{word}: +\S", text, re.MULTILINE).start()
        for word in ("Command", "Hardware", "Time", "Result")
    ]
    assert places == sorted(places)
    assert f"configs/{name}.py" in text or name == "demo"
    if name in ANYWHERE:
        return
    config = recipe(name)
    written, unit, steps, step = re.search(
        r"Time: +(\S+) (hours|days) = (\S+) steps of (\S+) s, an MFU of \d+%: modelled",
        text,
    ).groups()
    assert steps == f"{config.train.steps:,}"
    seconds = config.train.steps * float(step)
    assert written == f"{seconds / {'hours': 3600, 'days': 86400}[unit]:.1f}"
    device = re.search(r"Hardware: +\d+ (?:NVIDIA )?(.*?) of", text).group(1).lower()
    described = SimpleNamespace(platform="accelerator", device_kind=device)
    assert chips.peak_flops(described, "bfloat16")


@pytest.mark.parametrize("name", FROM_SCRATCH)
def test_a_step_is_4_million_tokens_and_a_run_105_billion(name):
    """As in the paper's runs from scratch, so that runs differ in the model alone."""
    config = recipe(name).train
    assert (
        config.global_batch * config.seq_len == 2048 * 2048 and config.steps == 25_000
    )


# What the docstrings say can be changed: a recipe with options -> its parameters.
ONE_B, THREE_B = PARAMETERS["scratch_1b"], PARAMETERS["scratch_3b"]
HEADS_32 = "--model.heads 32 --model.kv-heads 32 --model.head-dim 72"
PUBLISHED_405B = (
    "llama3_405b --model.kv-heads 8 --mesh.fsdp 128 --mesh.tensor 8 "
    "--train.grad-accum-steps 8"
)
VARIANTS = {
    "scratch_1b --model.residual standard --train.out runs/scratch_1b_standard": ONE_B,
    # One norm a layer less.
    "scratch_1b --model.residual parallel": ONE_B - 40 * 1536,
    "scratch_1b --mesh.data 1 --train.grad-accum-steps 32": ONE_B,
    "scratch_1b --mesh.fsdp 1 --mesh.tensor 8": ONE_B,
    "scratch_3b --mesh.fsdp 2 --mesh.tensor 4": THREE_B,
    f"scratch_3b {HEADS_32} --mesh.fsdp 1 --mesh.tensor 8": THREE_B,
    "llama3_8b --model.residual hybrid:last16": PARAMETERS["llama3_8b"],
    "llama3_70b --model.residual desync:2": PARAMETERS["llama3_70b"],
    PUBLISHED_405B: 405_853_388_800,
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_of_a_recipe_fits_its_mesh(variant, planned):
    config = recipe(*shlex.split(variant))
    sharding.check_fits(
        config.model,
        planned(config),
        config.train.global_batch // config.train.grad_accum_steps,
    )
    assert count(config.model) == VARIANTS[variant]


def test_36_heads_do_not_divide_by_8(planned):
    config = recipe("scratch_3b", "--mesh.fsdp", "1", "--mesh.tensor", "8")
    with pytest.raises(
        ValueError, match="model.heads=36 does not divide by mesh.tensor=8"
    ):
        sharding.check_fits(config.model, planned(config))
