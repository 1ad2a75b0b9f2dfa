"""Batch decoding beside other engines, on the same weights: `ladder-jax bench peers`.

A batch of prompts decodes greedily, all of one length, the end of a sequence ignored: what every engine can do, so that
forward passes are compared and not scheduling. Tokens a second are batch x (N - 1) over the time of N new tokens less
that of one, so that prefill does not count. Contenders take turns, each in its own process with all the cores that the
process may use:

    ladder_jax     the decode engine
    transformers   `generate`, sdpa, dynamic cache
    vllm           offline `LLM.generate` (there are builds for CPUs)
    llama_cpp      `llama_decode` of all sequences at once, by llama-cpp-python; float32 alone

The peers load what this project writes, a Llama with the standard residual schedule. The tokens are compared: a batch's
first request must begin alike everywhere. `pip install ladder_jax[peers]` brings transformers. The others are measured
where they are installed, here or in an environment of their own, which needs ladder_jax[peers] too:

    ladder-jax bench peers --pythons vllm=../vllm/bin/python llama_cpp=../llama/bin/python
"""

import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ladder_jax.bench import contest
from ladder_jax.bench.decode import SIZES
from ladder_jax.config import ConfigError, Decode, Mesh

ALIKE = (
    8  # first tokens of the first request that all contenders must agree in (float32)
)


@dataclass(frozen=True)
class Arguments:
    """Tokens a second of batch decoding, beside transformers and vLLM on the same weights."""

    size: str = "m125"
    """tiny, small or m125: a model with random weights."""
    dtypes: tuple[str, ...] = ("float32",)
    batches: tuple[int, ...] = (1, 8, 32)
    prompt: int = 64
    tokens: int = 128
    """New tokens of a request."""
    rounds: int = 3
    """Turns that each contender takes."""
    engines: tuple[str, ...] = ("transformers", "vllm", "llama_cpp")
    """The peers. One that is not installed is left out, and said so."""
    pythons: tuple[str, ...] = ()
    """NAME=PATH: the Python that runs a contender, where it is not this one."""
    json: str | None = None
    """A file for the results."""


def prompts_of(config, batch, length):
    """The prompts [batch, length], ids."""
    return (
        np.random.default_rng(0)
        .integers(0, config.vocab_size, (batch, length))
        .tolist()
    )


# ---------------------------------------------------------------- the contenders, each in its own process
# Each makes a function (prompts, new tokens) -> the first request's tokens.


def ladder_jax(config, weights, batch, length):
    """This project's engine, with as many slots as the batch has requests."""
    import jax

    from ladder_jax import model, sharding
    from ladder_jax.bench.train import save
    from ladder_jax.serve.engine import Engine

    mesh = sharding.make_mesh(Mesh(data=1), jax.devices()[:1])
    parameters = jax.jit(functools.partial(model.init, config))(jax.random.key(0))
    save(parameters, weights)
    engine = Engine(
        parameters,
        config,
        mesh,
        Decode(slots=batch, staging=batch, max_length=length, prefill_budget=2048),
    )
    return lambda prompts, count: (
        engine.generate(prompts, max_tokens=count, stop_token_ids=())[0].tokens
    )


def transformers(config, weights, batch, length):
    import torch

    from ladder_jax.bench.train import load

    model = load(config, weights).to(getattr(torch, config.dtype)).eval()

    def run(prompts, count):
        with torch.inference_mode():
            made = model.generate(
                torch.tensor(prompts),
                attention_mask=torch.ones(len(prompts), len(prompts[0])),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
            )
        return made[0, len(prompts[0]) :].tolist()

    return run


def vllm(config, weights, batch, length):
    os.environ |= dict(
        VLLM_CPU_KVCACHE_SPACE="2",
        HF_HUB_OFFLINE="1",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
    )
    from vllm import LLM, SamplingParams

    from ladder_jax.bench.train import load

    folder = Path(weights) / "hugging_face"
    load(config, weights).save_pretrained(folder)
    engine = LLM(
        str(folder),
        dtype=config.dtype,
        max_model_len=length,
        max_num_seqs=batch,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    )

    def run(prompts, count):
        asked = SamplingParams(
            temperature=0, max_tokens=count, ignore_eos=True, detokenize=False
        )
        made = engine.generate(
            [dict(prompt_token_ids=prompt) for prompt in prompts], asked, use_tqdm=False
        )
        return list(made[0].outputs[0].token_ids)

    return run


def llama_cpp(config, weights, batch, length):
    import llama_cpp as llama

    from ladder_jax.bench.train import load

    path = Path(weights) / "model.gguf"
    write_gguf(load(config, weights).state_dict(), config, path)
    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(
        str(path).encode(), llama.llama_model_default_params()
    )
    asked = llama.llama_context_default_params()
    asked.n_ctx, asked.n_seq_max, asked.n_batch, asked.n_ubatch = (
        batch * length,
        batch,
        batch * length,
        512,
    )
    asked.type_k = asked.type_v = llama.GGML_TYPE_F32
    asked.n_threads = asked.n_threads_batch = len(os.sched_getaffinity(0))
    context = llama.llama_init_from_model(model, asked)
    tokens = llama.llama_batch_init(batch * length, 0, 1)

    def forward(rows, start):
        """Greedy choices after every sequence's next tokens, `rows` [batch, T], which stand at `start`."""
        tokens.n_tokens = rows.size
        for i, (sequence, offset) in enumerate(np.ndindex(rows.shape)):
            tokens.token[i], tokens.pos[i] = int(rows[sequence, offset]), start + offset
            tokens.n_seq_id[i], tokens.seq_id[i][0] = 1, sequence
            tokens.logits[i] = offset == rows.shape[1] - 1
        if llama.llama_decode(context, tokens):
            raise RuntimeError("llama_decode failed")
        last = (
            sequence * rows.shape[1] + rows.shape[1] - 1 for sequence in range(batch)
        )
        logits = [
            np.ctypeslib.as_array(
                llama.llama_get_logits_ith(context, i), (config.vocab_size,)
            )
            for i in last
        ]
        return np.array([[row.argmax()] for row in logits])

    def run(prompts, count):
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        rows, start, first = np.array(prompts), 0, []
        for _ in range(count):
            rows, start = forward(rows, start), start + rows.shape[1]
            first.append(int(rows[0, 0]))
        return first

    return run


def write_gguf(state, config, path):
    """Writes a LlamaForCausalLM's state dict as float32 GGUF, without a tokenizer."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_length)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.ffn_dim)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.layers)
    for name, value in state.items():
        array = value.float().numpy()
        if name.endswith(
            ("q_proj.weight", "k_proj.weight")
        ):  # llama.cpp rotates neighbours, not halves
            array = (
                array.reshape(-1, 2, config.head_dim // 2, config.dim)
                .swapaxes(1, 2)
                .reshape(array.shape)
            )
        writer.add_tensor(
            names.get_name(name, (".weight",)), np.ascontiguousarray(array)
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


CONTENDERS = {
    "ladder_jax": ladder_jax,
    "transformers": transformers,
    "vllm": vllm,
    "llama_cpp": llama_cpp,
}
NEEDS = {
    "ladder_jax": ("jax",),
    "transformers": ("torch", "transformers"),
    "vllm": ("vllm", "transformers"),
    "llama_cpp": ("llama_cpp", "gguf", "transformers"),
}  # transformers makes the weights' names


def contend(name, weights, asked):
    """What a contender's process runs; `asked`: size, dtype, batch, prompt and tokens as JSON."""
    contest.quiet()
    asked = json.loads(asked)
    length = asked["prompt"] + asked["tokens"]
    config = dataclasses.replace(
        SIZES[asked["size"]],
        residual="standard",
        dtype=asked["dtype"],
        max_length=length,
    )
    prompts = prompts_of(config, asked["batch"], asked["prompt"])
    run = CONTENDERS[name](config, weights, asked["batch"], length)
    counts = [1, asked["tokens"]]
    first = [run(prompts, count) for count in 2 * counts][
        1
    ]  # twice: whatever compiles has done so then

    def step():
        run(prompts, counts[0])
        counts.reverse()

    contest.serve(step, dict(tokens=first))


# ---------------------------------------------------------------- the comparison


def find(arguments):
    """{contender: the Python that runs it}, of those that are installed. Raises ConfigError for a name or a path."""
    pythons = {}
    for entry in arguments.pythons:
        name, _, path = entry.partition("=")
        if name not in CONTENDERS or not shutil.which(path):
            raise ConfigError(
                f"pythons={entry!r} is not accepted: it must be NAME=PATH, a Python's path and one of "
                f"{', '.join(CONTENDERS)}"
            )
        pythons[name] = path
    unknown = set(arguments.engines) - CONTENDERS.keys()
    if unknown:
        raise ConfigError(
            f"engines={unknown.pop()!r} is not accepted: it must be among {', '.join(CONTENDERS)}"
        )
    found = {}
    for name in (
        "ladder_jax",
        *(name for name in arguments.engines if name != "ladder_jax"),
    ):
        python = found[name] = pythons.get(name, sys.executable)
        wanted = ["ladder_jax", *NEEDS[name]]
        look = f"import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, {wanted})))"
        if subprocess.run([python, "-c", look]).returncode:
            del found[name]
            print(
                f"{name} is left out: {python} does not have all of {', '.join(wanted)}",
                file=sys.stderr,
            )
    if "ladder_jax" not in found:
        raise ConfigError(
            f"pythons=ladder_jax={python} is not accepted: ladder_jax is not installed there"
        )
    return found


def compare(dtype, batch, found, arguments):
    """{name: (tokens/s of every turn)} of one batch size; found: `find`'s."""
    asked = dict(
        size=arguments.size,
        dtype=dtype,
        batch=batch,
        prompt=arguments.prompt,
        tokens=arguments.tokens,
    )
    with tempfile.TemporaryDirectory() as weights:
        command = ["-m", "ladder_jax.bench.peers", "contend"]
        contenders = [
            contest.Contender(
                name, [python, *command, name, weights, json.dumps(asked)]
            )
            for name, python in found.items()
        ]
        for contender in contenders:
            wanted, got = contenders[0].said["tokens"], contender.said["tokens"]
            if len(got) != arguments.tokens or (
                dtype == "float32" and got[:ALIKE] != wanted[:ALIKE]
            ):
                raise ArithmeticError(
                    f"batch {batch}: {contender.name} does other work than {contenders[0].name}: "
                    f"tokens {got[:ALIKE]}... against {wanted[:ALIKE]}..."
                )
        made = {name: [] for name in found}
        for _ in range(arguments.rounds):
            for contender in contenders:
                (one, _), (all, _) = contender.turn(2)
                made[contender.name].append(
                    batch * (arguments.tokens - 1) / (all - one)
                )
        for contender in contenders:
            contender.finish()
    return made


def run(arguments):
    """The whole benchmark; prints a table, writes what `json` names, returns the rows."""
    if arguments.size not in SIZES:
        raise ConfigError(
            f"size={arguments.size!r} is not accepted: it must be one of {', '.join(SIZES)}"
        )
    for name in ("prompt", "rounds"):
        if getattr(arguments, name) < 1:
            raise ConfigError(
                f"{name}={getattr(arguments, name)} is not accepted: it must be 1 or more"
            )
    if arguments.tokens < 2 or min(arguments.batches, default=1) < 1:
        raise ConfigError(
            "tokens must be 2 or more, and every one of batches 1 or more"
        )
    found = find(arguments)
    rows = []
    print(
        f"{arguments.size}, {arguments.prompt} tokens of prompt, {arguments.tokens} new; tokens/s, median of "
        f"{arguments.rounds} turns (least-most); ratio of ladder_jax to each, turn by turn, median"
    )
    for dtype in arguments.dtypes:
        for batch in arguments.batches:
            able = {
                name: found[name]
                for name in found
                if (name, dtype) != ("llama_cpp", "bfloat16")
            }
            made = compare(dtype, batch, able, arguments)
            cells = []
            for name, rates in made.items():
                ratio = float(np.median(np.divide(made["ladder_jax"], rates)))
                rows.append(
                    dict(
                        dtype=dtype,
                        batch=batch,
                        name=name,
                        tokens_per_s=float(np.median(rates)),
                        turns=rates,
                        ratio=ratio,
                    )
                )
                cells.append(
                    f"{name} {np.median(rates):.0f} ({min(rates):.0f}-{max(rates):.0f})"
                    + (f" {ratio:.2f}x" if name != "ladder_jax" else "")
                )
            print(f"{dtype:9} batch {batch:3}: " + ", ".join(cells), flush=True)
    if arguments.json:
        Path(arguments.json).write_text(
            json.dumps(
                dict(arguments=dataclasses.asdict(arguments), rows=rows), indent=1
            )
        )
    return rows


if __name__ == "__main__":
    if sys.argv[1:2] != ["contend"]:
        sys.exit("use: ladder-jax bench peers")
    contend(*sys.argv[2:])
