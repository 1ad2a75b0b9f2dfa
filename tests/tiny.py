"""A corpus, a model and a run that are small enough for tests, the same on every
Python, jax and machine.
"""

import contextlib
import dataclasses
import json
import random
from pathlib import Path

import jax

from ladder_jax import config, model
from ladder_jax.checkpoint import Checkpoints
from ladder_jax.data import tokenizer

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


def write_run(folder):
    """Writes the folder of a run: checkpoints of two steps, and metrics."""
    sizes = dict(dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn_dim=64)
    model_config = config.Model(**sizes, max_length=256, dtype="float32")
    meta = dict(
        config=config.to_dict(config.Config(model_config)),
        tensor=1,
        tokenizer=tokenizer.ByteTokenizer().to_json(),
    )
    with Checkpoints(folder / "checkpoints", keep=2) as checkpoints:
        for step in (2, 10):
            parameters = model.init(model_config, jax.random.key(step))
            checkpoints.save(step, dict(model=parameters), None, meta)
    metrics = [
        dict(step=2, loss=5.5),
        dict(step=2, held_out_loss=5.4),
        dict(step=10, loss=5.1, mfu=0.1),
    ]
    lines = [json.dumps(row) + "\n" for row in metrics]
    (folder / "metrics.jsonl").write_text("".join(lines))


@contextlib.contextmanager
def compiled_once(folder):
    """Inside, runs share compiled programs, also with processes that get these
    settings."""
    settings = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    try:
        yield {name.upper(): str(value) for name, value in settings.items()}
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
