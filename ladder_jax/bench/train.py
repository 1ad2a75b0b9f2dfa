"""Training speed beside Hugging Face transformers on PyTorch: `python -m ladder_jax.bench.train`.

Both train the same Llama (the standard residual schedule) from the same weights on the same batch, with the same AdamW
and clipping, on one device, with all the cores that the process may use, taking turns. The first steps' losses are
compared, so that a ratio is one of the same work. transformers runs as its Trainer would: eager, sdpa attention, fused
AdamW, bfloat16 by autocast. This project runs `train.make_step`. Needs `pip install ladder_jax[peers]`, or `--alone`.

On a machine with other work the medians say who bears it better. The fastest steps on the clock, "best", and those that
take the least of the processors' time, "a core", say who is faster; the latter with one core each (`taskset -c 0`).
"""

import dataclasses
import importlib.util
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ladder_jax import config as configuration
from ladder_jax.arguments import parse
from ladder_jax.bench import contest
from ladder_jax.config import Config, ConfigError, Mesh, Model, Optimizer, Train
from ladder_jax.hardware import malloc

SIZES = {
    "tiny": Model(
        vocab_size=256, dim=64, layers=2, heads=4, kv_heads=2, head_dim=16, ffn_dim=128
    ),
    "m10": Model(
        vocab_size=4096,
        dim=320,
        layers=6,
        heads=5,
        kv_heads=5,
        head_dim=64,
        ffn_dim=896,
    ),
    "m125": Model(
        vocab_size=32000,
        dim=768,
        layers=12,
        heads=12,
        kv_heads=12,
        head_dim=64,
        ffn_dim=2048,
    ),
}
CHECKED = 5  # first steps whose losses are compared
TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2}  # of those losses, nats


@dataclass(frozen=True)
class Arguments:
    """Tokens a second of training, beside Hugging Face transformers on PyTorch, with the peak memory of both."""

    sizes: tuple[str, ...] = ("m10", "m125")
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    batch: int = 8
    length: int = 256
    rounds: int = 12
    """Turns that each contender takes."""
    seconds: float = 2.0
    """Length of a turn, about: one step at least."""
    alone: bool = False
    """Without the peer."""
    json: str | None = None
    """A file for the results."""


def config_of(size, dtype, batch=8, length=256):
    """The Config that both sides train with."""
    return Config(
        model=dataclasses.replace(SIZES[size], residual="standard", dtype=dtype),
        mesh=Mesh(data=1),
        optimizer=Optimizer(lr_schedule="constant", warmup_steps=0, learning_rate=3e-4),
        train=Train(global_batch=batch, seq_len=length),
    )


def batch_of(config):
    """One batch of random tokens, whole sequences: the dict that a training step takes."""
    shape = config.train.global_batch, config.train.seq_len
    tokens = np.random.default_rng(0).integers(
        0, config.model.vocab_size, (shape[0], shape[1] + 1), np.int32
    )
    positions = np.tile(np.arange(shape[1], dtype=np.int32), (shape[0], 1))
    return dict(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        segments=np.ones(shape, np.int32),
        positions=positions,
        weights=np.ones(shape, np.float32),
    )


# ---------------------------------------------------------------- the contenders, each in its own process


def ladder_jax(config, weights):
    """This project. Writes its first weights to the folder `weights`, for the other side to load."""
    malloc.keep_freed_memory()
    import jax

    from ladder_jax import sharding, train
    from ladder_jax.optimizer import make_optimizer

    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    state = train.init_state(config, mesh, optimizer)
    save(state.model, weights)
    function = train.make_step(config, mesh, optimizer)
    batch = jax.device_put(
        batch_of(config), sharding.named_shardings(mesh, sharding.TOKENS)
    )

    def step():
        nonlocal state
        state, report = jax.block_until_ready(function(state, batch))
        return float(report["loss"])

    return step, dict(
        version=f"jax {jax.__version__}",
        parameters=sum(x.size for x in jax.tree.leaves(state.model)),
    )


def transformers(config, weights):
    """transformers' LlamaForCausalLM and PyTorch's AdamW, from the weights in the folder `weights`."""
    import torch
    from transformers import __version__ as version

    m, o = config.model, config.optimizer
    model = load(m, weights)
    model.config.use_cache = False
    model.train()
    norms = [p for p in model.parameters() if p.ndim == 1]
    matrices = [p for p in model.parameters() if p.ndim > 1]
    groups = [
        dict(params=matrices, weight_decay=o.weight_decay),
        dict(params=norms, weight_decay=0.0),
    ]
    adamw = torch.optim.AdamW(
        groups, o.learning_rate, (o.beta1, o.beta2), o.eps, fused=True
    )
    batch = {
        name: torch.from_numpy(value).long() for name, value in batch_of(config).items()
    }

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=m.dtype == "bfloat16"):
            loss = model(
                input_ids=batch["tokens"],
                labels=batch["targets"],
                shift_labels=batch["targets"],
            ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), o.clip_norm)
        adamw.step()
        adamw.zero_grad()
        return loss.item()

    return step, dict(
        version=f"transformers {version}, torch {torch.__version__}",
        parameters=sum(p.numel() for p in model.parameters()),
    )


def save(model, folder):
    """Writes the parameters of a model.Transformer for `load`, one file each."""
    import jax

    from ladder_jax import sharding

    names = sharding.parameter_names(model)
    jax.tree.map(
        lambda name, x: np.save(Path(folder) / f"{name}.npy", np.asarray(x)),
        names,
        model,
    )


def load(config, folder):
    """The LlamaForCausalLM (matrices [out, in]) of what `save` wrote (layers stacked); config: config.Model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.dim,
            intermediate_size=config.ffn_dim,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_dim,
            rms_norm_eps=config.norm_eps,
            rope_theta=config.rope_theta,
            max_position_embeddings=config.max_length,
            tie_word_embeddings=False,
            attn_implementation="sdpa",
        )
    )
    rows = {
        "attention.norm": "input_layernorm",
        "attention.wq": "self_attn.q_proj",
        "attention.wk": "self_attn.k_proj",
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj",
        "mlp.norm": "post_attention_layernorm",
        "mlp.gate": "mlp.gate_proj",
        "mlp.up": "mlp.up_proj",
        "mlp.down": "mlp.down_proj",
    }
    places = {
        "embedding": "model.embed_tokens",
        "norm": "model.norm",
        "unembedding": "lm_head",
    }
    for name, place in places.items() | rows.items():
        array = np.load(Path(folder) / f"{name}.npy")
        for layer in range(config.layers) if name in rows else [None]:
            path = place if layer is None else f"model.layers.{layer}.{place}"
            value, parameter = (
                array if layer is None else array[layer],
                model.get_submodule(path).weight,
            )
            if name != "embedding":
                value = value.reshape(
                    parameter.shape[::-1]
                ).T  # [D, N, H] and [N, H, D] become [in, out]
            with torch.no_grad():
                parameter.copy_(torch.from_numpy(np.ascontiguousarray(value)))
    return model


CONTENDERS = {"ladder_jax": ladder_jax, "transformers": transformers}


def contend(name, weights, config):
    """What a contender's process runs; `config` as JSON."""
    contest.quiet()
    step, said = CONTENDERS[name](configuration.from_dict(json.loads(config)), weights)
    contest.serve(step, said | dict(losses=[step() for _ in range(CHECKED)]))


# ---------------------------------------------------------------- the comparison


def compare(size, dtype, arguments, names):
    """The rows of one size and dtype: a dict for each contender."""
    with tempfile.TemporaryDirectory() as weights:
        config = json.dumps(
            configuration.to_dict(
                config_of(size, dtype, arguments.batch, arguments.length)
            )
        )
        command = [sys.executable, "-m", "ladder_jax.bench.train", "contend"]
        contenders = [
            contest.Contender(name, [*command, name, weights, config]) for name in names
        ]
    steps = [
        max(1, round(arguments.seconds / contender.turn(1)[0][0]))
        for contender in contenders
    ]
    turns = [
        [contender.turn(count) for contender, count in zip(contenders, steps)]
        for _ in range(arguments.rounds)
    ]
    tokens = arguments.batch * arguments.length
    rows = []
    for contender, own in zip(contenders, zip(*turns)):
        best = np.min(np.concatenate(own), axis=0)
        rows.append(
            dict(
                size=size,
                dtype=dtype,
                name=contender.name,
                **contender.said,
                turns=[tokens / float(np.median(turn, axis=0)[0]) for turn in own],
                best=tokens / best[0],
                best_per_core=tokens / best[1],
                peak_bytes=contender.finish(),
            )
        )
    for row in rows:
        row["tokens_per_s"] = float(np.median(row["turns"]))
        apart = np.abs(np.subtract(row["losses"], rows[0]["losses"])).max()
        row["losses_apart"] = float(apart)
        if apart > TOLERANCE[dtype] or row["parameters"] != rows[0]["parameters"]:
            raise ArithmeticError(
                f"{size} {dtype}: {row['name']} does other work than {rows[0]['name']}: "
                f"losses {row['losses']} against {rows[0]['losses']}, "
                f"{row['parameters']} parameters against {rows[0]['parameters']}"
            )
    return rows


HEADER = (
    f"{'size':6}{'dtype':10}{'contender':14}{'tokens/s':>9}  {'quartiles':13}{'best':>7}{'a core':>8}"
    f"{'peak MB':>9}  losses apart  ladder_jax's ratios: tokens/s (turn by turn), best, a core; memory"
)


def table(rows):
    """`compare`'s rows as text: medians of the turns, their quartiles, the fastest step, and ratios to the peer."""
    lines, ours = [], rows[0]
    for row in rows:
        low, high = np.quantile(row["turns"], (0.25, 0.75))
        line = (
            f"{row['size']:6}{row['dtype']:10}{row['name']:14}{row['tokens_per_s']:9.0f}  "
            f"{f'{low:.0f}-{high:.0f}':13}{row['best']:7.0f}{row['best_per_core']:8.0f}"
            f"{row['peak_bytes'] / 2**20:9.0f}"
        )
        if row is not ours:
            low, high = np.quantile(
                np.divide(ours["turns"], row["turns"]), (0.25, 0.75)
            )
            line += (
                f"  {row['losses_apart']:<14.1e}{ours['tokens_per_s'] / row['tokens_per_s']:.2f} "
                f"({low:.2f}-{high:.2f}), {ours['best'] / row['best']:.2f}, "
                f"{ours['best_per_core'] / row['best_per_core']:.2f}; "
                f"{ours['peak_bytes'] / row['peak_bytes']:.2f}"
            )
        lines.append(line)
    return "\n".join(lines)


def run(arguments):
    """The whole benchmark; returns the rows, prints them, and writes them where `arguments.json` says."""
    for size in arguments.sizes:
        if size not in SIZES:
            raise ConfigError(
                f"sizes={size!r} is not accepted: it must be among {', '.join(SIZES)}"
            )
    for dtype in arguments.dtypes:
        if dtype not in TOLERANCE:
            raise ConfigError(
                f"dtypes={dtype!r} is not accepted: it must be among {', '.join(TOLERANCE)}"
            )
    names = list(CONTENDERS)[: 1 if arguments.alone else None]
    missing = [
        name
        for name in ("torch", "transformers")
        if importlib.util.find_spec(name) is None
    ]
    if missing and not arguments.alone:
        raise ConfigError(
            f"{' and '.join(missing)} not installed: pip install ladder_jax[peers], "
            "or --alone to measure without the peer"
        )
    print(HEADER, flush=True)
    rows = []
    for size in arguments.sizes:
        for dtype in arguments.dtypes:
            compared = compare(size, dtype, arguments, names)
            print(table(compared), flush=True)
            rows += compared
    if arguments.json:
        Path(arguments.json).write_text(
            json.dumps(
                dict(arguments=dataclasses.asdict(arguments), rows=rows), indent=1
            )
        )
    return rows


def main(arguments=None):
    """Entry point: a list of command-line arguments, or the process's own."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["contend"]:
        return contend(*arguments[1:])
    try:
        run(parse(Arguments, arguments, "bench train"))
    except (ConfigError, ArithmeticError) as error:
        sys.exit(f"ladder-jax bench train: {error}")


if __name__ == "__main__":
    main()
