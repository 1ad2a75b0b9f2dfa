"""What only a GPU shows: `JAX_PLATFORMS=cuda,cpu python -m pytest tests/test_gpu.py`.

The same model on a CPU is the reference. Models have heads of 64 and bfloat16, so that
attention goes through cuDNN, or float32 with full-precision products.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ladder_jax import config, generate, sharding, train_programs
from ladder_jax.optimizer import make_optimizer
from ladder_jax.serve.engine import Engine
from tests import helpers, page_attention

pytestmark = pytest.mark.skipif(
    jax.default_backend() != "gpu", reason="needs a GPU: JAX_PLATFORMS=cuda,cpu"
)

SCHEDULES = ("standard", "ladder", "parallel", "hybrid:last1")


def make_model(residual: str, dtype: str) -> config.Model:
    return config.Model(
        residual=residual,
        dtype=dtype,
        vocab_size=512,
        dim=256,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=64,
        ffn_dim=512,
        max_length=256,
    )


def mesh_on(platform: str) -> jax.sharding.Mesh:
    return sharding.make_mesh(config.Mesh(data=1), jax.devices(platform)[:1])


def losses_on(platform: str, residual: str, dtype: str, steps: int = 3) -> list[float]:
    """The losses of the first training steps on random tokens."""
    run = config.Config(
        model=make_model(residual, dtype),
        mesh=config.Mesh(data=1),
        optimizer=config.Optimizer(lr_schedule="constant", warmup_steps=0),
        train=config.Train(global_batch=4, seq_len=128, loss_chunk=64),
    )
    mesh = mesh_on(platform)
    optimizer = make_optimizer(run.optimizer, run.train.steps)
    state = train_programs.init_state(run, mesh, optimizer)
    step = train_programs.make_step(run, mesh, optimizer)
    tokens = np.random.default_rng(0).integers(0, 512, (4, 129), np.int32)
    batch = dict(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        segments=np.repeat(np.arange(1, 3, dtype=np.int32), 64)[None].repeat(4, 0),
        positions=np.tile(np.arange(64, dtype=np.int32), (4, 2)),
        weights=np.ones((4, 128), np.float32),
    )
    batch = jax.device_put(batch, sharding.named_shardings(mesh, sharding.TOKENS))
    losses = []
    for _ in range(steps):
        state, report = step(state, batch)
        losses.append(float(report["loss"]))
    return losses


@pytest.mark.parametrize("residual", SCHEDULES)
@pytest.mark.parametrize("dtype, tolerance", [("float32", 2e-5), ("bfloat16", 2e-2)])
def test_training_steps_have_the_cpus_losses(residual, dtype, tolerance):
    with jax.default_matmul_precision("highest"):
        on_gpu = losses_on("gpu", residual, dtype)
    on_cpu = losses_on("cpu", residual, dtype)
    assert on_gpu[-1] < on_gpu[0]
    np.testing.assert_allclose(on_gpu, on_cpu, atol=tolerance, rtol=0)


@pytest.mark.parametrize("residual", SCHEDULES)
def test_the_engine_has_the_tokens_of_one_request_alone_and_of_the_cpu(residual):
    model_config = make_model(residual, "float32")
    random = np.random.default_rng(1)
    prompts = [
        random.integers(0, 512, n).tolist() for n in (1, 3, 17, 40, 5, 64, 2, 33)
    ]
    options = config.Decode(slots=3, steps_per_call=4, max_length=128)
    answers = {}
    with jax.default_matmul_precision("highest"):
        for platform in ("gpu", "cpu"):
            mesh = mesh_on(platform)
            parameters = helpers.random_parameters(model_config, mesh, scale=0.08)
            engine = Engine(parameters, model_config, mesh, options)
            results = engine.generate(prompts, max_tokens=24)
            answers[platform] = [list(r.tokens) for r in results]
            if platform == "gpu":
                alone = [
                    list(
                        generate.generate(
                            parameters, model_config, mesh, prompt, max_tokens=24
                        )
                    )
                    for prompt in prompts
                ]
    assert answers["gpu"] == alone
    assert answers["gpu"] == answers["cpu"]


@pytest.mark.parametrize("kv_layout", ["pages", "rows"])
def test_bfloat16_tokens_are_the_cpus_best_or_near_them(kv_layout):
    """Whether a token's logit is the CPU's largest, but for what bfloat16 rounds."""
    own = make_model("ladder", "bfloat16")
    exact = dataclasses.replace(own, dtype="float32")
    random = np.random.default_rng(3)
    prompts = [random.integers(0, 512, n).tolist() for n in (1, 17, 40, 5, 64, 33)]
    options = config.Decode(slots=3, max_length=128, kv_layout=kv_layout)
    mesh, cpu = mesh_on(jax.default_backend()), mesh_on("cpu")
    engine = Engine(
        helpers.random_parameters(own, mesh, scale=0.08), own, mesh, options
    )
    parameters = helpers.random_parameters(exact, cpu, scale=0.08)
    forward = generate.make_forward(exact, cpu)
    for prompt, result in zip(prompts, engine.generate(prompts, max_tokens=24)):
        text = [*prompt, *result.tokens]
        tokens = np.asarray([text + [0] * (128 - len(text))], np.int32)
        positions = np.arange(128, dtype=np.int32)[None]
        cache = generate.empty_cache(exact, cpu, 1, 128)
        logits = np.asarray(forward(parameters, tokens, positions, cache)[0])[0]
        for place in range(len(prompt), len(text)):
            row = logits[place - 1]
            assert row[text[place]] > row.max() - 0.06 * row.std()


def test_bfloat16_logits_are_near_the_cpus_in_float32():
    """Within what bfloat16 rounds: 8 bits of 2 layers' sums."""
    model_config = make_model("ladder", "bfloat16")
    tokens = np.random.default_rng(2).integers(0, 512, (2, 128), np.int32)
    positions = np.tile(np.arange(128, dtype=np.int32), (2, 1))
    logits = {}
    for platform, dtype in (("gpu", "bfloat16"), ("cpu", "float32")):
        own = dataclasses.replace(model_config, dtype=dtype)
        mesh = mesh_on(platform)
        parameters = helpers.random_parameters(own, mesh, scale=0.05)
        cache = generate.empty_cache(own, mesh, 2, 128)
        out, _ = generate.make_forward(own, mesh)(parameters, tokens, positions, cache)
        logits[platform] = np.asarray(out, np.float32)
    spread = logits["cpu"].std()
    assert np.abs(logits["gpu"] - logits["cpu"]).max() < 0.06 * spread
    assert jnp.isfinite(logits["gpu"]).all()


@pytest.mark.parametrize(
    "heads, groups, page_size, entries, H, dtype",
    [
        (8, 4, 16, 32, 128, "bfloat16"),  # a shard of 8B's, whole
        (1, 8, 64, 32, 128, "bfloat16"),
        (3, 3, 32, 20, 64, "bfloat16"),
        (8, 1, 128, 6, 64, "int8"),
        (8, 4, 32, 6, 128, "float8_e4m3fn"),
    ],
)
def test_the_kernel_of_pages(heads, groups, page_size, entries, H, dtype):
    page_attention.check("triton", heads, groups, 1, page_size, entries, H, dtype)
