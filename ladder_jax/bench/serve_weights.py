"""Writes a model with random weights twice, for two servers: as a checkpoint of this
project, and as a Llama that other servers load.

    python -m ladder_jax.bench.serve_weights '{"size": "small", ...}'

It runs in a process of its own, so that the load generator needs no JAX.
"""

import dataclasses
import functools
import json
import sys
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from ladder_jax.bench.sizes import DECODE_SIZES
from ladder_jax.config import Config, Model, Train, to_dict
from ladder_jax.data.tokenizer import HuggingFace, byte_alphabet
from ladder_jax.data.tokenizer_files import Special

END = "<|endoftext|>"


def made_up_tokenizer(size: int) -> HuggingFace:
    """A byte-level tokenizer with exactly `size` ids, so that both servers may emit
    every id that the model has.

    Texts become bytes. The other ids stand for words that only outputs have.
    """
    vocabulary = dict.fromkeys(byte_alphabet())
    ids = {character: number for number, character in enumerate(vocabulary)}
    ids |= {f"Ġw{number}": number for number in range(len(ids), size - 1)}
    made = tokenizers.Tokenizer(models.BPE(ids, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([END])
    return HuggingFace(made.to_str(), Special({"eos": END}))


def write(model_config: Model, out: Path, hugging_face: Path) -> None:
    """Writes the same random weights to both folders; those of transformers in the
    dtype of the computation."""
    import jax

    from ladder_jax import hugging_face as hf
    from ladder_jax import model
    from ladder_jax.saving import Checkpoints

    length = min(Train().seq_len, model_config.max_length)
    tokenizer = made_up_tokenizer(model_config.vocab_size)
    init = jax.jit(functools.partial(model.init, model_config))
    meta = dict(
        config=to_dict(Config(model_config, train=Train(seq_len=length))),
        tensor=1,
        tokenizer=tokenizer.to_json(),
    )
    with Checkpoints(out / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(1, dict(model=init(jax.random.key(0))), None, meta)
    hf.save_hf(out, hugging_face, dtype=model_config.dtype)


def main(arguments: dict[str, str]) -> None:
    """Writes the model; the arguments are size, dtype, max_length, out, hugging_face
    (a folder)."""
    changes: Any = dict(
        residual="standard",
        dtype=arguments["dtype"],
        max_length=int(arguments["max_length"]),
    )
    model_config = dataclasses.replace(DECODE_SIZES[arguments["size"]], **changes)
    write(model_config, Path(arguments["out"]), Path(arguments["hugging_face"]))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
