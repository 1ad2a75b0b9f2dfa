"""Typed configuration of a run: frozen dataclasses, checked when they are made.

A recipe in `configs/` builds one `Config`; any field can be overridden on the command line
(`--train.steps 50`); every checkpoint carries the `Config` it was made with as JSON.
"""

import dataclasses
import math
import runpy
import traceback
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ladder_jax import schedule


class ConfigError(ValueError):
    """A mistake in a configuration: the message names the field, its value and what is accepted."""


def require(ok: object, name: str, value: object, accepted: str) -> None:
    """Raises ConfigError, which names the field, its value and what is accepted, unless `ok`."""
    if not ok:
        raise ConfigError(f"{name}={value!r} is not accepted: it must be {accepted}")


def _fits(value, hint):
    """Whether `value` is of type `hint` (int, finite float, str, bool, None, Literal, Union, dataclass)."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, a) for a in args)
    if origin is Literal:
        return value in args and type(value) in {type(a) for a in args}
    if hint is type(None):
        return value is None
    if hint is float:
        return (
            isinstance(value, (int, float))
            and not isinstance(value, bool)
            and math.isfinite(value)
        )
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _describe(hint):
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(a) for a in args)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, args))
    return str(hint) if origin else {type(None): "None"}.get(hint, hint.__name__)


class _Section:
    """A group of fields: checks their types, then calls `check` for what types cannot say."""

    section: typing.ClassVar[str] = ""

    def __post_init__(self):
        for name, hint in typing.get_type_hints(type(self)).items():
            if typing.get_origin(hint) is not typing.ClassVar:
                value = getattr(self, name)
                require(_fits(value, hint), self._path(name), value, _describe(hint))
        self.check()

    def check(self):
        pass

    def _path(self, name):
        return f"{self.section}.{name}" if self.section else name

    def need(self, name, ok, accepted):
        require(ok, self._path(name), getattr(self, name), accepted)

    def positive(self, *names):
        for name in names:
            self.need(name, getattr(self, name) > 0, "greater than 0")


@dataclass(frozen=True)
class RopeScaling(_Section):
    """Llama-3.1's rescaling of rotary frequencies for contexts longer than those trained on."""

    section = "model.rope_scaling"
    factor: float = 1.0  # 1: none
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192

    def check(self):
        self.positive("factor", "low_freq_factor", "original_length")
        self.need(
            "high_freq_factor",
            self.high_freq_factor > self.low_freq_factor,
            "greater than low_freq_factor",
        )


@dataclass(frozen=True)
class Model(_Section):
    """A Llama-family decoder and the residual schedule that its blocks follow."""

    section = "model"
    vocab_size: int = 320
    dim: int = 256
    layers: int = 4
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 32
    ffn_dim: int = 768
    max_length: int = 2048  # longest context, tokens
    residual: str = "ladder"  # residual schedule, see schedule.py
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = RopeScaling()
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    qk_norm: bool = False  # RMSNorm on every head's query and key (Qwen3)
    qkv_bias: bool = False  # biases on query, key and value (Qwen2)
    init_std: float = 0.02
    dtype: Literal["float32", "bfloat16"] = (
        "bfloat16"  # of compute; parameters are float32
    )

    def check(self):
        self.positive(
            "vocab_size",
            "dim",
            "layers",
            "heads",
            "kv_heads",
            "head_dim",
            "ffn_dim",
            "max_length",
            "rope_theta",
            "norm_eps",
            "init_std",
        )
        self.need(
            "kv_heads",
            self.heads % self.kv_heads == 0,
            f"a divisor of model.heads={self.heads}",
        )
        self.need("head_dim", self.head_dim % 2 == 0, "even, for rotary embedding")
        try:
            schedule.parse(self.residual, self.layers)
        except ValueError as error:
            raise ConfigError(
                f"model.residual={self.residual!r} is not accepted: {error}"
            ) from None


@dataclass(frozen=True)
class Mesh(_Section):
    """Devices along each mesh axis; one of them may be -1: as many as are left."""

    section = "mesh"
    data: int = -1  # replicas of the parameters
    fsdp: int = 1  # shards of every parameter and of the optimizer state, gathered layer by layer
    tensor: int = 1  # shards of every block's work (tensor parallelism)
    reduction: Literal[
        "auto",
        "psum",
        "one-shot",
        "recursive-doubling",
        "halving-doubling",
        "direct",
        "ring",
    ] = "auto"  # by choice.py, for the machine and each message; psum where it is not known

    def check(self):
        for name in ("data", "fsdp", "tensor"):
            self.need(
                name,
                getattr(self, name) > 0 or getattr(self, name) == -1,
                "greater than 0, or -1 for the rest",
            )
        rest = [
            name for name in ("data", "fsdp", "tensor") if getattr(self, name) == -1
        ]
        for name in rest[1:]:
            self.need(name, False, f"given, where mesh.{rest[0]} is -1")


@dataclass(frozen=True)
class Data(_Section):
    """Where text comes from and how it becomes tokens."""

    section = "data"
    source: str = (
        "builtin"  # "builtin" (Python's own documentation), or a folder, file or glob
    )
    text_field: str = (
        "text"  # the field of JSONL rows and Parquet columns that holds the text
    )
    tokenizer: str = "bytes"  # "bytes", or the path of a Hugging Face tokenizer.json
    held_out_fraction: float = 0.02  # share of the documents kept for evaluation
    token_cache: str = "~/.cache/ladder_jax"  # tokens are kept here, so that a corpus is tokenised once

    def check(self):
        self.need(
            "held_out_fraction", 0 < self.held_out_fraction < 1, "between 0 and 1"
        )
        for name in ("source", "text_field", "tokenizer", "token_cache"):
            self.need(name, getattr(self, name) != "", "non-empty")


@dataclass(frozen=True)
class Optimizer(_Section):
    """AdamW, a learning-rate schedule in steps, and global-norm clipping."""

    section = "optimizer"
    learning_rate: float = 3e-4
    lr_schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: int = 100
    decay_steps: int | None = (
        None  # of the final decay; None: all after warm-up (cosine), a fifth of the run (wsd)
    )
    final_lr_fraction: float = 0.1  # of the learning rate, where the decay ends
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # on matrices alone: not on norms, biases
    clip_norm: float | None = 1.0

    def check(self):
        self.positive("learning_rate", "eps")
        for name in ("warmup_steps", "weight_decay"):
            self.need(name, getattr(self, name) >= 0, "0 or more")
        for name in ("beta1", "beta2"):
            self.need(name, 0 <= getattr(self, name) < 1, "from 0 to below 1")
        self.need("final_lr_fraction", 0 <= self.final_lr_fraction <= 1, "from 0 to 1")
        self.need(
            "decay_steps",
            self.decay_steps is None or self.decay_steps > 0,
            "greater than 0",
        )
        self.need(
            "clip_norm",
            self.clip_norm is None or self.clip_norm > 0,
            "greater than 0, or None for no clipping",
        )


@dataclass(frozen=True)
class Train(_Section):
    """How long and on how much at a time, and what is kept."""

    section = "train"
    out: str = "runs/default"  # metrics, checkpoints and plots go here
    steps: int = 1000
    global_batch: int = 8  # sequences a step, over all devices
    seq_len: int = 256  # tokens a sequence
    grad_accum_steps: int = (
        1  # parts that a step's batch is computed in, one after another
    )
    remat: Literal["none", "dots", "reductions", "full"] = "none"  # see model.REMAT
    loss_chunk: int = 0  # tokens whose logits exist at once on a device; 0: all of them
    seed: int = 0
    log_every: int = 10
    eval_every: int = 200
    eval_batches: int = 8
    save_every: int = 200
    keep_checkpoints: int = 3  # newest checkpoints kept
    profile_steps: int = 0  # steps to trace, after the first two
    sample_tokens: int = 0  # tokens of text that the model writes at the end
    tensorboard: bool = False
    peak_tflops: float | None = (
        None  # of one device, for MFU; None: from the table in chips.py
    )

    def check(self):
        self.positive(
            "steps",
            "global_batch",
            "seq_len",
            "grad_accum_steps",
            "log_every",
            "eval_every",
            "eval_batches",
            "save_every",
            "keep_checkpoints",
        )
        for name in ("loss_chunk", "profile_steps", "sample_tokens"):
            self.need(name, getattr(self, name) >= 0, "0 or more")
        self.need("seed", 0 <= self.seed < 2**32, "from 0 to 2 ** 32 - 1")
        self.need(
            "out",
            self.out != "" and "://" not in self.out,
            "a folder (of a bucket, mount it)",
        )
        self.need(
            "grad_accum_steps",
            self.global_batch % self.grad_accum_steps == 0,
            f"a divisor of train.global_batch={self.global_batch}",
        )
        self.need(
            "peak_tflops",
            self.peak_tflops is None or self.peak_tflops > 0,
            "greater than 0",
        )


@dataclass(frozen=True)
class Decode(_Section):
    """The decode engine: what is kept on the device, and how long one call of it runs."""

    section = "decode"
    slots: int | None = (
        8  # requests that decode together, at most; None: as many as kv_memory holds
    )
    staging: int | None = (
        None  # prefilled requests that wait on the device; None: half of slots, 2 or more
    )
    max_length: int | None = (
        None  # longest request, prompt and output, tokens; None: model.max_length
    )
    steps_per_call: int = 16  # iterations of one jitted call, at most
    queue_size: int = 1024  # requests that wait on the host
    kv_dtype: Literal["auto", "float32", "bfloat16", "int8"] = (
        "auto"  # of cached keys and values; auto: the model's,
    )
    # float32 on CPUs, where writing into a bfloat16 cache costs copies of it
    kv_memory: str | None = (
        None  # budget of one device for them, such as 512MiB; None: what slots and staging take
    )
    prefill_budget: int = 256  # prompt tokens computed in one call, and at most so many between two chunks
    prefix_memory: str = "0"  # of kv_memory, for prefixes that prompts share
    prefix_block: int = (
        32  # tokens of a shared prefix that are kept, and found again, together
    )
    max_logprobs: int = 0  # most alternatives a request may ask for
    max_stop_ids: int = 4  # most ids a request may stop at
    max_logit_bias: int = 16  # most ids a request may bias
    fit_shapes: bool = (
        True  # shrink and grow the compiled width and length to what is live
    )
    unroll_layers: bool = True  # one array a layer, so that decoding copies no slices of a stack (compiles longer)
    loop: Literal["auto", "while", "fixed"] = (
        "auto"  # ends early, or K iterations with masks; auto: fixed on GPU
    )

    def check(self):
        self.positive("steps_per_call", "queue_size", "prefill_budget", "prefix_block")
        self.need(
            "slots",
            self.slots is not None or self.kv_memory is not None,
            "a number, unless decode.kv_memory says how much there is for them",
        )
        self.need(
            "slots", self.slots is None or self.slots > 0, "greater than 0, or None"
        )
        for name in ("max_logprobs", "max_stop_ids", "max_logit_bias"):
            self.need(name, getattr(self, name) >= 0, "0 or more")
        for name in ("staging", "max_length"):
            self.need(
                name,
                getattr(self, name) is None or getattr(self, name) > 0,
                "greater than 0, or None",
            )
        for name in ("kv_memory", "prefix_memory"):
            if getattr(self, name) is not None:
                to_bytes(getattr(self, name), self._path(name))


def to_bytes(text, name):
    """The bytes that "512MiB", "2GiB", "1.5GB" or "1000" mean; ConfigError names the field `name` if it is none."""
    units = {
        "": 1,
        "b": 1,
        **{
            f"{letter}{suffix}": base**power
            for power, letter in enumerate("kmgt", 1)
            for suffix, base in (("", 1024), ("ib", 1024), ("b", 1000))
        },
    }
    number = text.strip().lower().rstrip("bkmgti")
    unit = text.strip().lower()[len(number) :]
    try:
        value = float(number) * units[unit]
    except (ValueError, KeyError):
        value = -1
    require(value >= 0, name, text, "a size such as 512MiB or 2GiB")
    return int(value)


@dataclass(frozen=True)
class Config(_Section):
    """Everything that defines a run."""

    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    mesh: Mesh = field(default_factory=Mesh)
    optimizer: Optimizer = field(default_factory=Optimizer)
    train: Train = field(default_factory=Train)

    def check(self):
        if self.train.seq_len > self.model.max_length:
            raise ConfigError(
                f"train.seq_len={self.train.seq_len} is not accepted: it must be at most "
                f"model.max_length={self.model.max_length}"
            )


def to_dict(config):
    """`config` as plain values, ready for JSON."""
    return dataclasses.asdict(config)


# Fields as checkpoints of ladder_jax 0.1.0 name them, and values of theirs, as they are named now.
RENAMED_FIELDS = {
    "train.batch": "global_batch",
    "train.length": "seq_len",
    "train.accumulate": "grad_accum_steps",
    "train.keep": "keep_checkpoints",
    "data.held_out": "held_out_fraction",
    "data.cache": "token_cache",
    "optimizer.schedule": "lr_schedule",
    "optimizer.final_fraction": "final_lr_fraction",
    "model.attention_bias": "qkv_bias",
    "decode.chunk": "steps_per_call",
    "decode.prefill": "prefill_budget",
    "decode.queue": "queue_size",
    "decode.fit": "fit_shapes",
    "decode.unstack": "unroll_layers",
    "decode.length": "max_length",
    "decode.bias": "max_logit_bias",
    "decode.stop_ids": "max_stop_ids",
    "decode.top_logprobs": "max_logprobs",
}
RENAMED_VALUES = {("train.remat", "products"): "dots"}


def from_dict(values, cls=Config):
    """The inverse of `to_dict`; accepts the names of older checkpoints. Raises ConfigError on an unknown field."""
    values = {
        RENAMED_FIELDS.get(f"{cls.section}.{name}", name): RENAMED_VALUES.get(
            (f"{cls.section}.{name}", value) if isinstance(value, str) else None, value
        )
        for name, value in values.items()
    }
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}
    for name in values:
        if name not in known:
            path = f"{cls.section}.{name}" if cls.section else name
            raise ConfigError(f"{path} is not a field: {', '.join(sorted(known))} are")
    made = {}
    for name, value in values.items():
        section = next(
            (
                h
                for h in (hints[name], *typing.get_args(hints[name]))
                if dataclasses.is_dataclass(h)
            ),
            None,
        )
        made[name] = (
            from_dict(value, section) if section and isinstance(value, dict) else value
        )
    return cls(**made)


def from_recipe(path):
    """The `config` that a recipe, a Python file, defines. Raises ConfigError that names the file and the line."""
    if not Path(path).is_file():
        known = ", ".join(sorted(str(p) for p in Path("configs").glob("*.py")))
        raise ConfigError(
            f"recipe {path!r} does not exist"
            + (f": there are {known}" if known else "")
        )
    try:
        made = runpy.run_path(path).get("config")
    except Exception as error:
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename == path
        ]
        line = (
            error.lineno
            if isinstance(error, SyntaxError)
            else lines[-1]
            if lines
            else None
        )
        kind = "" if isinstance(error, ConfigError) else f"{type(error).__name__}: "
        raise ConfigError(
            f"recipe {path!r}{f', line {line}' if line else ''}: {kind}{error}"
        ) from error
    if not isinstance(made, Config):
        raise ConfigError(
            f"recipe {path!r} defines no `config` of type ladder_jax.config.Config"
        )
    return made
