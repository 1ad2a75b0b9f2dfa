"""Compares training speed with Hugging Face transformers on PyTorch:
`ladder-jax bench train`.

Both train the same Llama (the standard residual schedule) from the same weights on the
same batch, with the same AdamW and clipping, on the CPU with all the cores that the
process may use, or on one GPU (`--device gpu`). They take turns. The benchmark checks
that their losses in the first steps agree, since a ratio of speeds needs the same work.
transformers runs as its Trainer would: eager, sdpa attention, fused AdamW, bfloat16 by
autocast. This project runs `train_programs.make_step`. The peer needs
`pip install ladder_jax[peers]`; `--alone` leaves it out.

Other programs on the machine change the medians, and may slow down one contender more
than the other. They change two columns less: "best" is tokens a second of the fastest
step, and "a core" is tokens per second of processor time, of the step that takes the
least. Compare "a core" only where each contender has one core (`taskset -c 0`). "of
matmul" is the model's FLOPs at the fastest step over the rate of matrix products of the
contender's own library (JAX, PyTorch) in that dtype on this machine (machine.py); the
first line of the output has these rates. Peak memory is the process's on a CPU, and
on a GPU what its arrays take on the device.
"""

import contextlib
import dataclasses
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ladder_jax import files
from ladder_jax.arguments import parse
from ladder_jax.bench import contest, machine
from ladder_jax.bench.sizes import TRAIN_SIZES
from ladder_jax.config import (
    Config,
    ConfigError,
    Mesh,
    Model,
    Optimizer,
    Train,
    from_dict,
    require,
    to_dict,
)
from ladder_jax.hardware import malloc

if TYPE_CHECKING:
    from ladder_jax.model import Transformer

CHECKED_STEPS = 5  # the first steps, whose losses must agree
TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2}  # between those losses, in nats
Step = Callable[[], float]  # trains one step and returns its loss


@dataclass(frozen=True)
class Arguments:
    """Compares tokens a second of training, and peak memory, with transformers."""

    sizes: tuple[str, ...] = ("m10", "m125")
    """tiny, m10 or m125: models with random weights."""
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    """float32, bfloat16 or both."""
    batch: int = 8
    """Sequences of a step."""
    length: int = 256
    """Tokens of a sequence."""
    rounds: int = 12
    """How many turns each contender takes."""
    seconds: float = 2.0
    """About the length of a turn, which has at least one step."""
    device: machine.Device = "cpu"
    """What both run on: cpu, or one GPU."""
    alone: bool = False
    """Measure ladder_jax without the peer."""
    overlapped: bool = False
    """Measure ladder_jax also with programs that JAX starts before the last one has
    freed its memory, see malloc.run_programs_in_turn."""
    json: str | None = None
    """Write the results to this file."""


def config_of(size: str, dtype: str, batch: int = 8, length: int = 256) -> Config:
    """The Config that both contenders train with."""
    changes: Any = dict(residual="standard", dtype=dtype)
    model_config = dataclasses.replace(TRAIN_SIZES[size], **changes)
    return Config(
        model=model_config,
        mesh=Mesh(data=1),
        optimizer=Optimizer(lr_schedule="constant", warmup_steps=0, learning_rate=3e-4),
        train=Train(global_batch=batch, seq_len=length),
    )


def batch_of(config: Config) -> dict[str, np.ndarray]:
    """A batch of random tokens in whole sequences, as a training step takes it."""
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


# ---------------------------------------------------------------- the contenders


def ladder_jax(
    config: Config, weights: str, in_turn: bool = True
) -> tuple[Step, dict[str, Any]]:
    """Sets up this project.

    Args:
      config: what to train.
      weights: a folder, for the initial weights that the peer loads.
      in_turn: see malloc.run_programs_in_turn.
    Returns the step, and a message about the setup.
    """
    malloc.keep_freed_memory()
    if in_turn:
        malloc.run_programs_in_turn()
    import jax

    from ladder_jax import sharding, train_programs
    from ladder_jax.optimizer import make_optimizer

    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    state = train_programs.init_state(config, mesh, optimizer)
    if in_turn:
        save_weights(state.model, weights)
    train_step = train_programs.make_step(config, mesh, optimizer)
    batch = jax.device_put(
        batch_of(config), sharding.named_shardings(mesh, sharding.TOKENS)
    )

    def step() -> float:
        nonlocal state
        state, report = jax.block_until_ready(train_step(state, batch))
        return float(report["loss"])

    return step, dict(
        version=f"jax {jax.__version__}",
        parameters=sum(x.size for x in jax.tree.leaves(state.model)),
        flops_per_token=train_programs.flops_per_token(
            config.model, config.train.seq_len
        ),
    )


def overlapped(config: Config, weights: str) -> tuple[Step, dict[str, Any]]:
    """Sets up this project with programs that overlap; see `ladder_jax`."""
    return ladder_jax(config, weights, in_turn=False)


def transformers(config: Config, weights: str) -> tuple[Step, dict[str, Any]]:
    """Sets up transformers' LlamaForCausalLM and PyTorch's AdamW; see `ladder_jax`."""
    import torch
    from transformers import __version__ as version

    optimizer_config = config.optimizer
    device = "cuda" if os.environ["JAX_PLATFORMS"] == "cuda" else "cpu"
    model = load_llama(config.model, weights).to(device)
    model.config.use_cache = False
    model.train()
    norms = [p for p in model.parameters() if p.ndim == 1]
    matrices = [p for p in model.parameters() if p.ndim > 1]
    adamw = torch.optim.AdamW(
        [
            dict(params=matrices, weight_decay=optimizer_config.weight_decay),
            dict(params=norms, weight_decay=0.0),
        ],
        optimizer_config.learning_rate,
        (optimizer_config.beta1, optimizer_config.beta2),
        optimizer_config.eps,
        fused=True,
    )
    arrays = batch_of(config).items()
    batch = {name: torch.from_numpy(array).long().to(device) for name, array in arrays}
    mixed = config.model.dtype == "bfloat16"

    def step() -> float:
        with torch.autocast(device, torch.bfloat16, enabled=mixed):
            loss = model(
                input_ids=batch["tokens"],
                labels=batch["targets"],
                shift_labels=batch["targets"],
            ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
        adamw.step()
        adamw.zero_grad()
        return loss.item()

    return step, dict(
        version=f"transformers {version}, torch {torch.__version__}",
        parameters=sum(p.numel() for p in model.parameters()),
    )


def save_weights(model: "Transformer", folder: str | Path) -> None:
    """Writes each parameter of a model to a file of `folder`, for `load_llama`."""
    import jax

    from ladder_jax import sharding

    names = sharding.parameter_names(model)
    jax.tree.map(
        lambda name, x: np.save(Path(folder) / f"{name}.npy", np.asarray(x)),
        names,
        model,
    )


# Parameters of a layer and of the whole model -> transformers' modules.
LAYER_MODULES = {
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
MODULES = {
    "embedding": "model.embed_tokens",
    "norm": "model.norm",
    "unembedding": "lm_head",
}


def load_llama(model_config: Model, folder: str | Path) -> Any:
    """A LlamaForCausalLM with the parameters that `save_weights` wrote."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=model_config.vocab_size,
            hidden_size=model_config.dim,
            intermediate_size=model_config.ffn_dim,
            num_hidden_layers=model_config.layers,
            num_attention_heads=model_config.heads,
            num_key_value_heads=model_config.kv_heads,
            head_dim=model_config.head_dim,
            rms_norm_eps=model_config.norm_eps,
            rope_theta=model_config.rope_theta,
            max_position_embeddings=model_config.max_length,
            tie_word_embeddings=False,
            attn_implementation="sdpa",
        )
    )

    def array_of(name: str) -> np.ndarray:
        return np.load(Path(folder) / f"{name}.npy")

    _copy(array_of("embedding"), model, MODULES["embedding"], transpose=False)
    for name in ("norm", "unembedding"):
        _copy(array_of(name), model, MODULES[name])
    for name, module in LAYER_MODULES.items():
        for layer, array in enumerate(array_of(name)):
            _copy(array, model, f"model.layers.{layer}.{module}")
    return model


def _copy(array: np.ndarray, model: Any, module: str, transpose: bool = True) -> None:
    """Copies a parameter into a module's weight.

    PyTorch's matrices are [out, in]. Ours are [in, out], and [D, N, H] or [N, H, D] in
    attention.
    """
    import torch

    weight = model.get_submodule(module).weight
    if transpose:
        array = array.reshape(weight.shape[::-1]).T
    with torch.no_grad():
        weight.copy_(torch.from_numpy(np.ascontiguousarray(array)))


# Setup and the library that multiplies. The first saves the weights for the peer.
CONTENDERS: dict[str, tuple[Callable[[Config, str], Any], str]] = {
    "ladder_jax": (ladder_jax, "jax"),
    "overlapped": (overlapped, "jax"),
    "transformers": (transformers, "torch"),
}


def contend(name: str, weights: str, config: str, device: machine.Device) -> None:
    """Runs a contender in this process.

    Args:
      name: of CONTENDERS.
      weights: the folder of the initial weights.
      config: a Config as JSON.
      device: what it runs on.
    """
    contest.quiet()
    os.environ.update(machine.ENVIRONMENT[device])
    step, message = CONTENDERS[name][0](from_dict(json.loads(config)), weights)
    losses = [step() for _ in range(CHECKED_STEPS)]
    peak_bytes = device_peak(name) if device == "gpu" else contest.peak_bytes
    contest.serve(step, message | dict(losses=losses), peak_bytes)


def device_peak(name: str) -> Callable[[], int]:
    """Returns a function: the most bytes that a contender took on the GPU so far."""
    if name != "transformers":
        import jax

        return lambda: jax.devices()[0].memory_stats()["peak_bytes_in_use"]
    import torch

    return torch.cuda.max_memory_allocated


# ---------------------------------------------------------------- the comparison


def compare(
    size: str, dtype: str, arguments: Arguments, names: list[str]
) -> list[dict[str, Any]]:
    """Measures one size and dtype. Returns a row for each contender.

    Raises ArithmeticError where the contenders do not compute the same.
    """
    config = config_of(size, dtype, arguments.batch, arguments.length)
    command = [sys.executable, "-m", "ladder_jax.bench.train", "contend"]
    with contextlib.ExitStack() as stack:
        with tempfile.TemporaryDirectory() as weights:
            settings = [weights, json.dumps(to_dict(config)), arguments.device]
            contenders = [
                stack.enter_context(
                    contest.Contender(name, [*command, name, *settings])
                )
                for name in names
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
        for contender, own_turns in zip(contenders, zip(*turns)):
            medians = [np.median(turn, axis=0)[0] for turn in own_turns]
            clock, processor = np.min(np.concatenate(own_turns), axis=0)
            rows.append(
                dict(
                    size=size,
                    dtype=dtype,
                    name=contender.name,
                    **contender.message,
                    turns=[tokens / float(median) for median in medians],
                    tokens_per_s=float(np.median(np.divide(tokens, medians))),
                    best=tokens / float(clock),
                    best_per_core=tokens / float(processor),
                    peak_bytes=contender.finish(),
                )
            )
    for row in rows:
        check_same_work(row, rows[0])
    return rows


def check_same_work(row: dict[str, Any], ours: dict[str, Any]) -> None:
    """Compares a contender's losses with those of `ours`, and adds `losses_apart`, the
    largest difference, to its row. Raises ArithmeticError where it is too large."""
    apart = np.abs(np.subtract(row["losses"], ours["losses"])).max()
    row["losses_apart"] = float(apart)
    if apart > TOLERANCE[row["dtype"]] or row["parameters"] != ours["parameters"]:
        raise ArithmeticError(
            f"{row['size']} {row['dtype']}: {row['name']} does other work than "
            f"{ours['name']}: losses {row['losses']} against {ours['losses']}, "
            f"{row['parameters']} parameters against {ours['parameters']}"
        )


def add_shares(rows: list[dict[str, Any]], cpu: machine.Machine) -> None:
    """Adds to each row its fastest step's share of its own library's rate."""
    flops = rows[0]["flops_per_token"]
    for row in rows:
        _, library = CONTENDERS[row["name"]]
        row["of_matmul"] = cpu.share(row["dtype"], row["best"] * flops, library)


HEADER = (
    f"{'size':6}{'dtype':10}{'contender':14}{'tokens/s':>9}  {'quartiles':13}"
    f"{'best':>7}{'of matmul':>11}{'a core':>8}{'peak MB':>9}  losses apart  "
    "ladder_jax's ratios: tokens/s (turn by turn), best, a core; memory"
)


def table(rows: list[dict[str, Any]]) -> str:
    """`compare`'s rows as text: medians and quartiles of the turns, the fastest step,
    and ratios to the peer."""
    lines, ours = [], rows[0]
    for row in rows:
        low, high = np.quantile(row["turns"], (0.25, 0.75))
        line = (
            f"{row['size']:6}{row['dtype']:10}{row['name']:14}"
            f"{row['tokens_per_s']:9.0f}  {f'{low:.0f}-{high:.0f}':13}"
            f"{row['best']:7.0f}{row['of_matmul']:11.1%}{row['best_per_core']:8.0f}"
            f"{row['peak_bytes'] / 2**20:9.0f}"
        )
        if row is not ours:
            turns = np.divide(ours["turns"], row["turns"])
            low, high = np.quantile(turns, (0.25, 0.75))
            line += (
                f"  {row['losses_apart']:<14.1e}"
                f"{ours['tokens_per_s'] / row['tokens_per_s']:.2f} "
                f"({low:.2f}-{high:.2f}), {ours['best'] / row['best']:.2f}, "
                f"{ours['best_per_core'] / row['best_per_core']:.2f}; "
                f"{ours['peak_bytes'] / row['peak_bytes']:.2f}"
            )
        lines.append(line)
    return "\n".join(lines)


def run(arguments: Arguments) -> list[dict[str, Any]]:
    """Runs the benchmark. Prints the rows, writes them where `arguments.json` says, and
    returns them. Raises ConfigError for arguments that are not accepted."""
    for size in arguments.sizes:
        require(size in TRAIN_SIZES, "sizes", size, f"among {', '.join(TRAIN_SIZES)}")
    for dtype in arguments.dtypes:
        require(dtype in TOLERANCE, "dtypes", dtype, f"among {', '.join(TOLERANCE)}")
    left_out = dict(overlapped=not arguments.overlapped, transformers=arguments.alone)
    names = [name for name in CONTENDERS if not left_out.get(name)]
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
    cpu = machine.measure(arguments.device)
    print(cpu)
    print(HEADER, flush=True)
    rows = []
    for size in arguments.sizes:
        for dtype in arguments.dtypes:
            new_rows = compare(size, dtype, arguments, names)
            add_shares(new_rows, cpu)
            print(table(new_rows), flush=True)
            rows += new_rows
    if arguments.json:
        results = dict(
            arguments=dataclasses.asdict(arguments), machine=cpu._asdict(), rows=rows
        )
        files.write_text(arguments.json, json.dumps(results, indent=1))
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Entry point: a list of command-line arguments, or the process's own."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["contend"]:
        return contend(*arguments[1:])  # type: ignore[arg-type]
    try:
        run(parse(Arguments, arguments, "bench train"))
    except (ConfigError, ArithmeticError) as error:
        sys.exit(f"ladder-jax bench train: {error}")
    return None


if __name__ == "__main__":
    main()
