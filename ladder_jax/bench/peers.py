"""Compares batch decoding with other engines on the same weights:
`ladder-jax bench peers`.

A batch of prompts of one length decodes greedily, and no token ends a sequence: every
engine can do this, so that forward passes are compared and not scheduling. Tokens a
second are batch x (N - 1) over a time: that of N new tokens minus that of one, so that
prefill does not count. Contenders take turns, each in its own process, with all cores
that this process may use:

    ladder_jax     the decode engine
    transformers   `generate`, sdpa, dynamic cache
    vllm           offline `LLM.generate` (there are builds for CPUs)
    llama_cpp      `llama_decode` of all sequences at once, by llama-cpp-python; float32

The peers load the weights that this project writes, a Llama with the standard residual
schedule. The first tokens of a batch's first request must be the same everywhere.
"of matmul" is 2 FLOPs a token and parameter, over the machine's own rate of matrix
products in that dtype (machine.py); a batch of one is bound by memory instead.

`pip install ladder_jax[peers]` installs transformers. The benchmark leaves out the
other engines unless they are installed, here or in an environment of their own, which
needs ladder_jax[peers] too:

    ladder-jax bench peers \\
        --pythons vllm=../vllm/bin/python llama_cpp=../llama/bin/python
"""

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ladder_jax import files
from ladder_jax.bench import contest, machine
from ladder_jax.bench.sizes import DECODE_SIZES, multiplied_parameters
from ladder_jax.config import ConfigError, Decode, Mesh, Model, require

# How many first tokens of the first request must be the same everywhere (float32).
COMPARED = 8
Prompts = list[list[int]]
# (prompts, count) -> the `count` new tokens of the first prompt, after decoding all.
Run = Callable[[Prompts, int], list[int]]


@dataclass(frozen=True)
class Arguments:
    """Compares tokens a second of batch decoding with other engines."""

    size: str = "m125"
    """tiny, small or m125: a model with random weights."""
    dtypes: tuple[str, ...] = ("float32",)
    """float32, bfloat16 or both."""
    batches: tuple[int, ...] = (1, 8, 32)
    """The batch sizes to measure, in requests."""
    prompt: int = 64
    """Tokens of a prompt."""
    tokens: int = 128
    """New tokens of a request."""
    rounds: int = 3
    """How often each contender is measured."""
    engines: tuple[str, ...] = ("transformers", "vllm", "llama_cpp")
    """The engines to compare with. The benchmark leaves out, with a message, those that
    are not installed."""
    pythons: tuple[str, ...] = ()
    """NAME=PATH: the Python at PATH runs the engine NAME. By default, this Python runs
    all engines."""
    json: str | None = None
    """Write the results to this file."""


def random_prompts(model_config: Model, batch: int, length: int) -> Prompts:
    """Prompts of random token ids [batch, length]."""
    rng = np.random.default_rng(0)
    return rng.integers(0, model_config.vocab_size, (batch, length)).tolist()


# ---------------------------------------------------------------- the contenders
# Each sets itself up in a process of its own.
#   model_config   the model
#   weights        a folder: ladder_jax, which comes first, writes its weights there
#   batch, length  how many requests, and how many tokens of each there is room for


def ladder_jax(model_config: Model, weights: str, batch: int, length: int) -> Run:
    """This project's engine, with a slot for every request of the batch."""
    import jax

    from ladder_jax import model, sharding
    from ladder_jax.bench.train import save_weights
    from ladder_jax.serve.engine import Engine

    mesh = sharding.make_mesh(Mesh(data=1), jax.devices()[:1])
    init = jax.jit(functools.partial(model.init, model_config))
    parameters = init(jax.random.key(0))
    save_weights(parameters, weights)
    options = Decode(
        slots=batch,
        staging=batch,
        max_length=length,
        prefill_budget=2048,
        burst_ms=0,
    )
    engine = Engine(parameters, model_config, mesh, options)

    def run(prompts: Prompts, count: int) -> list[int]:
        requests = engine.generate(prompts, max_tokens=count, stop_token_ids=())
        return requests[0].tokens

    return run


def transformers(model_config: Model, weights: str, batch: int, length: int) -> Run:
    """transformers' `generate`."""
    import torch

    from ladder_jax.bench.train import load_llama

    dtype = getattr(torch, model_config.dtype)
    model = load_llama(model_config, weights).to(dtype).eval()

    def run(prompts: Prompts, count: int) -> list[int]:
        with torch.inference_mode():
            output = model.generate(
                torch.tensor(prompts),
                attention_mask=torch.ones(len(prompts), len(prompts[0])),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
            )
        return output[0, len(prompts[0]) :].tolist()

    return run


def vllm(model_config: Model, weights: str, batch: int, length: int) -> Run:
    """vLLM's offline engine, without prefix caching."""
    os.environ |= dict(
        VLLM_CPU_KVCACHE_SPACE="2",
        HF_HUB_OFFLINE="1",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
    )
    from vllm import LLM, SamplingParams

    from ladder_jax.bench.train import load_llama

    folder = Path(weights) / "hugging_face"
    load_llama(model_config, weights).save_pretrained(folder)
    engine = LLM(
        str(folder),
        dtype=model_config.dtype,
        max_model_len=length,
        max_num_seqs=batch,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    )

    def run(prompts: Prompts, count: int) -> list[int]:
        params = SamplingParams(
            temperature=0, max_tokens=count, ignore_eos=True, detokenize=False
        )
        inputs = [dict(prompt_token_ids=prompt) for prompt in prompts]
        outputs = engine.generate(inputs, params, use_tqdm=False)
        return list(outputs[0].outputs[0].token_ids)

    return run


def llama_cpp(model_config: Model, weights: str, batch: int, length: int) -> Run:
    """llama.cpp's `llama_decode`, with as many threads as there are cores."""
    import llama_cpp as llama

    from ladder_jax.bench.train import load_llama

    path = Path(weights) / "model.gguf"
    state = load_llama(model_config, weights).state_dict()
    write_gguf(state, model_config, path)
    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(
        str(path).encode(), llama.llama_model_default_params()
    )
    params = llama.llama_context_default_params()
    params.n_ctx = params.n_batch = batch * length
    params.n_seq_max, params.n_ubatch = batch, 512
    params.type_k = params.type_v = llama.GGML_TYPE_F32
    params.n_threads = params.n_threads_batch = len(os.sched_getaffinity(0))
    context = llama.llama_init_from_model(model, params)
    tokens = llama.llama_batch_init(batch * length, 0, 1)

    def forward(rows_BT: np.ndarray, start: int) -> np.ndarray:
        """Decodes new tokens [B, T] from position `start` on. Returns the likeliest
        next tokens [B, 1]."""
        tokens.n_tokens, last = rows_BT.size, rows_BT.shape[1] - 1
        for i, (sequence, offset) in enumerate(np.ndindex(rows_BT.shape)):
            tokens.token[i] = int(rows_BT[sequence, offset])
            tokens.pos[i] = start + offset
            tokens.n_seq_id[i], tokens.seq_id[i][0] = 1, sequence
            tokens.logits[i] = offset == last
        if llama.llama_decode(context, tokens):
            raise RuntimeError("llama_decode failed")
        likeliest = []
        for sequence in range(batch):
            pointer = llama.llama_get_logits_ith(
                context, sequence * rows_BT.shape[1] + last
            )
            logits_V = np.ctypeslib.as_array(pointer, (model_config.vocab_size,))
            likeliest.append([logits_V.argmax()])
        return np.array(likeliest)

    def run(prompts: Prompts, count: int) -> list[int]:
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        rows_BT, start, first = np.array(prompts), 0, []
        for _ in range(count):
            rows_BT, start = forward(rows_BT, start), start + rows_BT.shape[1]
            first.append(int(rows_BT[0, 0]))
        return first

    return run


def write_gguf(state: dict[str, Any], model_config: Model, path: Path) -> None:
    """Writes a LlamaForCausalLM's state dict as float32 GGUF, without a tokenizer."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(model_config.max_length)
    writer.add_embedding_length(model_config.dim)
    writer.add_block_count(model_config.layers)
    writer.add_feed_forward_length(model_config.ffn_dim)
    writer.add_head_count(model_config.heads)
    writer.add_head_count_kv(model_config.kv_heads)
    writer.add_rope_dimension_count(model_config.head_dim)
    writer.add_rope_freq_base(model_config.rope_theta)
    writer.add_layer_norm_rms_eps(model_config.norm_eps)
    writer.add_vocab_size(model_config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model_config.layers)
    for name, value in state.items():
        array = value.float().numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            array = interleave_halves(array, model_config.head_dim)
        tensor = names.get_name(name, (".weight",))
        if tensor is None:
            raise ValueError(f"GGUF has no name for the tensor {name!r}")
        writer.add_tensor(tensor, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleave_halves(matrix: np.ndarray, head_dim: int) -> np.ndarray:
    """Reorders each head's rows: llama.cpp rotates neighbours, transformers halves."""
    heads = matrix.reshape(-1, 2, head_dim // 2, matrix.shape[1])
    return heads.swapaxes(1, 2).reshape(matrix.shape)


CONTENDERS = {
    "ladder_jax": ladder_jax,
    "transformers": transformers,
    "vllm": vllm,
    "llama_cpp": llama_cpp,
}
# Modules that each needs. The peers need transformers to convert the weights.
NEEDS = {
    "ladder_jax": ("jax",),
    "transformers": ("torch", "transformers"),
    "vllm": ("vllm", "transformers"),
    "llama_cpp": ("llama_cpp", "gguf", "transformers"),
}


def contend(name: str, weights: str, work_json: str) -> None:
    """Runs a contender in this process.

    Args:
      name: of CONTENDERS.
      weights: the folder of the weights.
      work_json: a JSON object with size, dtype, batch, prompt and tokens.
    """
    contest.quiet()
    work = json.loads(work_json)
    length = work["prompt"] + work["tokens"]
    model_config = dataclasses.replace(
        DECODE_SIZES[work["size"]],
        residual="standard",
        dtype=work["dtype"],
        max_length=length,
    )
    prompts = random_prompts(model_config, work["batch"], work["prompt"])
    run = CONTENDERS[name](model_config, weights, work["batch"], length)
    counts = [1, work["tokens"]]
    for _ in range(2):  # the first time compiles
        _, tokens = [run(prompts, count) for count in counts]

    def step() -> None:
        """Decodes one token in odd calls, and all tokens in even ones."""
        run(prompts, counts[0])
        counts.reverse()

    contest.serve(step, dict(tokens=tokens))


# ---------------------------------------------------------------- the comparison


def find_contenders(arguments: Arguments) -> dict[str, str]:
    """Finds the contenders that are installed: {name: the Python that runs it}.

    Raises ConfigError for an unknown name, or a path without a Python.
    """
    known = ", ".join(CONTENDERS)
    pythons = {}
    for entry in arguments.pythons:
        name, _, path = entry.partition("=")
        require(
            name in CONTENDERS and shutil.which(path),
            "pythons",
            entry,
            f"NAME=PATH, a Python's path and one of {known}",
        )
        pythons[name] = path
    for name in arguments.engines:
        require(name in CONTENDERS, "engines", name, f"among {known}")
    installed = {}
    for name in dict.fromkeys(("ladder_jax", *arguments.engines)):
        python = pythons.get(name, sys.executable)
        modules = ["ladder_jax", *NEEDS[name]]
        if _has_modules(python, modules):
            installed[name] = python
        elif name == "ladder_jax":
            raise ConfigError(
                f"pythons=ladder_jax={python} is not accepted: "
                "ladder_jax is not installed there"
            )
        else:
            print(
                f"{name} is left out: {python} does not have all of "
                f"{', '.join(modules)}",
                file=sys.stderr,
            )
    return installed


def _has_modules(python: str, modules: list[str]) -> bool:
    """Whether a Python has all of these modules installed."""
    script = (
        "import importlib.util as u, sys; "
        f"sys.exit(not all(map(u.find_spec, {modules})))"
    )
    return not subprocess.run([python, "-c", script], start_new_session=True).returncode


def compare(
    dtype: str, batch: int, pythons: dict[str, str], arguments: Arguments
) -> dict[str, list[float]]:
    """Measures one batch size: {contender: tokens a second of every turn}.

    Args:
      dtype: of the weights and the computation.
      batch: requests.
      pythons: see `find_contenders`.
      arguments: the benchmark's.
    Raises ArithmeticError where contenders write other tokens than ladder_jax.
    """
    work = dict(
        size=arguments.size,
        dtype=dtype,
        batch=batch,
        prompt=arguments.prompt,
        tokens=arguments.tokens,
    )
    command = ["-m", "ladder_jax.bench.peers", "contend"]
    with tempfile.TemporaryDirectory() as weights, contextlib.ExitStack() as stack:
        contenders = [
            stack.enter_context(
                contest.Contender(
                    name, [python, *command, name, weights, json.dumps(work)]
                )
            )
            for name, python in pythons.items()
        ]
        for contender in contenders:
            _check_same_tokens(contender, contenders[0], dtype, batch, arguments.tokens)
        rates: dict[str, list[float]] = {name: [] for name in pythons}
        for _ in range(arguments.rounds):
            for contender in contenders:
                (one_token, _), (all_tokens, _) = contender.turn(2)
                seconds = all_tokens - one_token
                rates[contender.name].append(batch * (arguments.tokens - 1) / seconds)
        for contender in contenders:
            contender.finish()
    return rates


def _check_same_tokens(
    contender: contest.Contender,
    ours: contest.Contender,
    dtype: str,
    batch: int,
    count: int,
) -> None:
    expected, tokens = ours.message["tokens"], contender.message["tokens"]
    differ = dtype == "float32" and tokens[:COMPARED] != expected[:COMPARED]
    if len(tokens) != count or differ:
        raise ArithmeticError(
            f"batch {batch}: {contender.name} does other work than {ours.name}: "
            f"tokens {tokens[:COMPARED]}... against {expected[:COMPARED]}..."
        )


def run(arguments: Arguments) -> list[dict[str, Any]]:
    """Runs the benchmark. Prints a table, writes what `arguments.json` names, and
    returns the rows. Raises ConfigError for arguments that are not accepted."""
    _check(arguments)
    pythons = find_contenders(arguments)
    cpu = machine.measure()
    flops_per_token = 2 * multiplied_parameters(DECODE_SIZES[arguments.size])
    print(
        f"{cpu}\n{arguments.size}, {arguments.prompt} tokens of prompt, "
        f"{arguments.tokens} new; tokens/s, median of {arguments.rounds} turns "
        "(least-most), of matmul; ratio of ladder_jax to each, turn by turn, median"
    )
    rows = []
    for dtype in arguments.dtypes:
        for batch in arguments.batches:
            supported = {
                name: python
                for name, python in pythons.items()
                if (name, dtype) != ("llama_cpp", "bfloat16")
            }
            cells = []
            rates = compare(dtype, batch, supported, arguments)
            for name, turns in rates.items():
                rate = float(np.median(turns))
                row = dict(
                    dtype=dtype,
                    batch=batch,
                    name=name,
                    tokens_per_s=rate,
                    of_matmul=cpu.share(dtype, rate * flops_per_token),
                    turns=turns,
                    ratio=float(np.median(np.divide(rates["ladder_jax"], turns))),
                )
                rows.append(row)
                cells.append(_cell(row))
            print(f"{dtype:9} batch {batch:3}: " + ", ".join(cells), flush=True)
    if arguments.json:
        results = dict(
            arguments=dataclasses.asdict(arguments), machine=cpu._asdict(), rows=rows
        )
        files.write_text(arguments.json, json.dumps(results, indent=1))
    return rows


def _check(arguments: Arguments) -> None:
    sizes = ", ".join(DECODE_SIZES)
    require(arguments.size in DECODE_SIZES, "size", arguments.size, f"one of {sizes}")
    require(arguments.prompt >= 1, "prompt", arguments.prompt, "1 or more")
    require(arguments.rounds >= 1, "rounds", arguments.rounds, "1 or more")
    require(arguments.tokens >= 2, "tokens", arguments.tokens, "2 or more")
    for batch in arguments.batches:
        require(batch >= 1, "batches", batch, "1 or more")
    for dtype in arguments.dtypes:
        known = ", ".join(machine.DTYPES)
        require(dtype in machine.DTYPES, "dtypes", dtype, f"among {known}")


def _cell(row: dict[str, Any]) -> str:
    text = (
        f"{row['name']} {row['tokens_per_s']:.0f} "
        f"({min(row['turns']):.0f}-{max(row['turns']):.0f}, {row['of_matmul']:.1%})"
    )
    return text if row["name"] == "ladder_jax" else f"{text} {row['ratio']:.2f}x"


if __name__ == "__main__":
    if sys.argv[1:2] != ["contend"]:
        sys.exit("use: ladder-jax bench peers")
    contend(*sys.argv[2:])
