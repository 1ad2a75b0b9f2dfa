"""A corpus, a model and a run that are small enough for tests, the same on every
Python, jax and machine.
"""

import dataclasses
import json
import random
from pathlib import Path

import helpers
import jax
import jax.numpy as jnp

from ladder_jax import config
from ladder_jax.data import tokenizer
from ladder_jax.saving import Checkpoints

SAME = (
    "step",
    "loss",
    "gradient_norm",
    "parameter_norm",
    "learning_rate",
    "held_out_loss",
    "held_out_bits_per_byte",
)


def write_corpus(folder):
    """40 documents of 50 invented words. Every Python has the same `random.random`."""
    numbers = random.Random(0)
    pick = lambda n: int(numbers.random() * n)
    words = [
        "".join("abcdefgh"[pick(8)] for _ in range(2 + pick(5))) for _ in range(50)
    ]
    folder.mkdir(parents=True)
    for i in range(40):
        (folder / f"{i:02}.txt").write_text(
            " ".join(words[pick(50)] for _ in range(60)) + "\n"
        )
    return folder


def make(folder, **fields):
    """A config.Config with the corpus folder/corpus. `fields`: as train_steps=3."""
    tiny_config = config.Config(
        model=config.Model(
            vocab_size=264,
            dim=32,
            layers=2,
            heads=8,
            kv_heads=8,
            head_dim=4,
            ffn_dim=64,
            max_length=64,
            dtype="float32",
        ),
        data=config.Data(
            source=str(folder / "corpus"),
            token_cache=str(folder / "cache"),
            held_out_fraction=0.2,
        ),
        mesh=config.Mesh(data=2, fsdp=2, tensor=2),
        optimizer=config.Optimizer(learning_rate=3e-3, warmup_steps=5),
        train=config.Train(
            out=str(folder / "run"),
            steps=20,
            global_batch=8,
            seq_len=32,
            eval_every=7,
            save_every=3,
            log_every=1,
            eval_batches=2,
            keep_checkpoints=20,
            peak_tflops=1.0,
        ),
    )
    for name, value in fields.items():
        section, _, field = name.partition("_")
        changed = dataclasses.replace(getattr(tiny_config, section), **{field: value})
        tiny_config = dataclasses.replace(tiny_config, **{section: changed})
    return tiny_config


def recipe(folder, **fields):
    """Writes a recipe file of the same config. Returns its path."""
    path = Path(folder) / "recipe.py"
    values = json.dumps(config.to_dict(make(folder, **fields)))
    path.write_text(
        "import json\nfrom ladder_jax.config import from_dict\n"
        f"config = from_dict(json.loads({values!r}))\n"
    )
    return path


def rows(out):
    """The rows of metrics.jsonl, without what depends on the clock."""
    lines = (Path(out) / "metrics.jsonl").read_text().splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if name in SAME}
        for line in lines
    ]


def save(folder, whole, steps=(0,), scale=0.02, others=None, **meta):
    """Writes checkpoints of random parameters, as a run of the config `whole` would.

    Args:
      folder: the folder of the checkpoints.
      whole: a config.Config.
      steps: the numbers of the checkpoints, each of other parameters.
      scale: the parameters' standard deviation.
      others: what is saved beside the model, by name.
      meta: what replaces or joins the meta of a run on one tensor shard.
    """
    own = dict(
        config=config.to_dict(whole),
        tensor=1,
        tokenizer=tokenizer.ByteTokenizer().to_json(),
    )
    with Checkpoints(folder, keep=9) as checkpoints:
        for step in steps:
            parameters = helpers.random_parameters(whole.model, None, scale, seed=step)
            state = dict(model=jax.tree.map(jnp.asarray, parameters)) | (others or {})
            checkpoints.save(step, state, None, own | meta)


def write_run(folder):
    """Writes the folder of a run: checkpoints of two steps, and metrics."""
    sizes = dict(dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn_dim=64)
    model_config = config.Model(**sizes, max_length=256, dtype="float32")
    save(folder / "checkpoints", config.Config(model_config), steps=(2, 10))
    metrics = [
        dict(step=2, loss=5.5),
        dict(step=2, held_out_loss=5.4),
        dict(step=10, loss=5.1, mfu=0.1),
    ]
    helpers.write_rows(folder / "metrics.jsonl", metrics)
