"""Batch decoding beside other engines, on the same weights: `ladder-jax bench peers`.

A batch of prompts decodes greedily, all of one length, the end of a sequence ignored: what every engine can do, so that
forward passes are compared and not scheduling. Tokens a second are batch x (N - 1) over the time of N new tokens less
that of one, so that prefill does not count. Contenders take turns, each in its own process with all the cores that the
process may use:

    ladder_jax     the decode engine
    transformers   `generate`, sdpa, dynamic cache
    vllm           offline `LLM.generate`, where vLLM is installed (there are builds for CPUs)

transformers and vLLM load what this project writes, a Llama with the standard residual schedule. The tokens are
compared: a batch's first request must begin alike everywhere. Needs `pip install ladder_jax[peers]`.
"""
import dataclasses
import functools
import importlib.util
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ladder_jax.bench import contest
from ladder_jax.bench.decode import SIZES
from ladder_jax.config import ConfigError, Decode, Mesh

ALIKE = 8           # first tokens of the first request that all contenders must agree in (float32)


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
    engines: tuple[str, ...] = ("transformers", "vllm")
    """The peers. One that is not installed is left out, and said so."""
    json: str | None = None
    """A file for the results."""


def prompts_of(config, batch, length):
    """The prompts [batch, length], ids."""
    return np.random.default_rng(0).integers(0, config.vocab_size, (batch, length)).tolist()


# ---------------------------------------------------------------- the contenders, each in its own process
# Each makes a function (prompts, new tokens) -> the first request's tokens.

def ladder_jax(config, weights, batch, length):
    """This project's engine, with as many slots as the batch has requests."""
    import jax

    from ladder_jax import model, sharding
    from ladder_jax.bench.train import save
    from ladder_jax.engine import Engine
    mesh = sharding.make_mesh(Mesh(data=1), jax.devices()[:1])
    parameters = jax.jit(functools.partial(model.init, config))(jax.random.key(0))
    save(parameters, weights)
    engine = Engine(parameters, config, mesh, Decode(slots=batch, staging=batch, length=length, prefill=2048))
    return lambda prompts, count: engine.generate(prompts, max_tokens=count, stop_ids=())[0].tokens


def transformers(config, weights, batch, length):
    import torch

    from ladder_jax.bench.train import load
    model = load(config, weights).to(getattr(torch, config.dtype)).eval()
    model.save_pretrained(Path(weights) / "hugging_face")

    def run(prompts, count):
        with torch.inference_mode():
            made = model.generate(torch.tensor(prompts), attention_mask=torch.ones(len(prompts), len(prompts[0])),
                                  max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)
        return made[0, len(prompts[0]):].tolist()
    return run


def vllm(config, weights, batch, length):
    os.environ |= dict(VLLM_CPU_KVCACHE_SPACE="2", HF_HUB_OFFLINE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0")
    from vllm import LLM, SamplingParams
    engine = LLM(str(Path(weights) / "hugging_face"), dtype=config.dtype, max_model_len=length, max_num_seqs=batch,
                 enable_prefix_caching=False, skip_tokenizer_init=True)

    def run(prompts, count):
        asked = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
        made = engine.generate([dict(prompt_token_ids=prompt) for prompt in prompts], asked, use_tqdm=False)
        return list(made[0].outputs[0].token_ids)
    return run


CONTENDERS = {"ladder_jax": ladder_jax, "transformers": transformers, "vllm": vllm}


def contend(name, weights, asked):
    """What a contender's process runs; `asked`: size, dtype, batch, prompt and tokens as JSON."""
    contest.quiet()
    asked = json.loads(asked)
    length = asked["prompt"] + asked["tokens"]
    config = dataclasses.replace(SIZES[asked["size"]], residual="standard", dtype=asked["dtype"], max_length=length)
    prompts = prompts_of(config, asked["batch"], asked["prompt"])
    run = CONTENDERS[name](config, weights, asked["batch"], length)
    counts = [1, asked["tokens"]]
    first = [run(prompts, count) for count in counts][1]

    def step():
        run(prompts, counts[0])
        counts.reverse()
    contest.serve(step, dict(tokens=first))


# ---------------------------------------------------------------- the comparison

def compare(dtype, batch, names, arguments):
    """{name: (tokens/s of every turn)} of one batch size, in `names`' order."""
    asked = dict(size=arguments.size, dtype=dtype, batch=batch, prompt=arguments.prompt, tokens=arguments.tokens)
    with tempfile.TemporaryDirectory() as weights:
        command = [sys.executable, "-m", "ladder_jax.bench.peers", "contend"]
        contenders = [contest.Contender(name, [*command, name, weights, json.dumps(asked)]) for name in names]
        for contender in contenders:
            wanted, got = contenders[0].said["tokens"], contender.said["tokens"]
            if len(got) != arguments.tokens or (dtype == "float32" and got[:ALIKE] != wanted[:ALIKE]):
                raise ArithmeticError(f"batch {batch}: {contender.name} does other work than {contenders[0].name}: "
                                      f"tokens {got[:ALIKE]}... against {wanted[:ALIKE]}...")
        made = {name: [] for name in names}
        for _ in range(arguments.rounds):
            for contender in contenders:
                (one, _), (all, _) = contender.turn(2)
                made[contender.name].append(batch * (arguments.tokens - 1) / (all - one))
        for contender in contenders:
            contender.finish()
    return made


def run(arguments):
    """The whole benchmark; prints a table, writes what `json` names, returns the rows."""
    if arguments.size not in SIZES:
        raise ConfigError(f"size={arguments.size!r} is not accepted: it must be one of {', '.join(SIZES)}")
    for name in ("prompt", "rounds"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"{name}={getattr(arguments, name)} is not accepted: it must be 1 or more")
    if arguments.tokens < 2 or min(arguments.batches, default=1) < 1:
        raise ConfigError("tokens must be 2 or more, and every one of batches 1 or more")
    unknown = set(arguments.engines) - set(CONTENDERS)
    if unknown:
        raise ConfigError(f"engines={unknown.pop()!r} is not accepted: it must be among transformers, vllm")
    names = ["ladder_jax"]
    for name in sorted(set(arguments.engines) | {"transformers"} if "vllm" in arguments.engines else arguments.engines):
        if importlib.util.find_spec(name) is not None:
            names.append(name)
        else:
            print(f"{name} is not installed, and left out", file=sys.stderr)
    rows = []
    print(f"{arguments.size}, {arguments.prompt} tokens of prompt, {arguments.tokens} new; tokens/s, median of "
          f"{arguments.rounds} turns (least-most); ratio of ladder_jax to each, turn by turn, median")
    for dtype in arguments.dtypes:
        for batch in arguments.batches:
            made = compare(dtype, batch, names, arguments)
            cells = []
            for name, rates in made.items():
                ratio = float(np.median(np.divide(made["ladder_jax"], rates)))
                rows.append(dict(dtype=dtype, batch=batch, name=name, tokens_per_s=float(np.median(rates)),
                                 turns=rates, ratio=ratio))
                cells.append(f"{name} {np.median(rates):.0f} ({min(rates):.0f}-{max(rates):.0f})"
                             + (f" {ratio:.2f}x" if name != "ladder_jax" else ""))
            print(f"{dtype:9} batch {batch:3}: " + ", ".join(cells), flush=True)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(dict(arguments=dataclasses.asdict(arguments), rows=rows), indent=1))
    return rows


if __name__ == "__main__":
    if sys.argv[1:2] != ["contend"]:
        sys.exit("use: ladder-jax bench peers")
    contend(*sys.argv[2:])
