"""The job `ladder-jax eval`: perplexity on documents, or tasks of lm-eval."""

import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from ladder_jax import checkpoint
from ladder_jax.arguments import POSITIONAL
from ladder_jax.config import Config, ConfigError, Data, Mesh, require
from ladder_jax.data import corpus, sources
from ladder_jax.data.formats import Part
from ladder_jax.evaluation.perplexity import Estimate, encode, score, summarize
from ladder_jax.loading import Loaded, load

# Where the user gives no context: the most ids for a model that was not trained here.
_CONTEXT = 2048
_MESH = Mesh(data=1)


@dataclass(frozen=True)
class Arguments:
    """Measures a model's perplexity on documents. With --tasks, runs tasks of
    lm-evaluation-harness instead."""

    checkpoint: str = field(metadata=POSITIONAL)
    """A run's folder, its checkpoints folder, or the folder of one step."""
    data: str | None = None
    """A folder, file or glob of text, JSON Lines or Parquet, or builtin. None: the
    documents that the run held out."""
    text_field: str | None = None
    """The field of JSONL rows and Parquet columns that holds the text. None: the
    run's data.text_field."""
    max_tokens: int | None = None
    """Score no more tokens than this, the first ones of the data. None: all."""
    context: int | None = None
    """The most tokens before a target. None: train.seq_len of a model that was trained
    here, else 2048, or model.max_length if that is less. With --tasks: the most tokens
    of prompt and continuation; None: model.max_length."""
    stride: int | None = None
    """How many targets a window scores, after a document's first window. Fewer give
    each target more context, and take longer. None: as many as --context."""
    bos: bool = True
    """Predict a document's first token from the begin token (the end token, if the
    tokenizer has no begin token). Without it, the first token is not scored."""
    eos: bool = False
    """Score the end token of each document, too, as the held-out loss in training
    does."""
    tasks: tuple[str, ...] = ()
    """Tasks or groups of tasks of lm-evaluation-harness, such as arc_easy hellaswag."""
    num_fewshot: int | None = None
    """Solved examples in each prompt. None: as the task says."""
    limit: float | None = None
    """Examples of each task; below 1, a share of them. None: all."""
    include_path: tuple[str, ...] = ()
    """Folders with tasks of your own (YAML), such as configs/eval."""
    apply_chat_template: bool = False
    """Write prompts with the tokenizer's chat template."""
    system_instruction: str | None = None
    """The system message of every prompt of a task."""
    batch_tokens: int = 8192
    """Tokens that the devices score together, padding included."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """The dtype of the computation. auto: model.dtype."""
    weights_dtype: Literal["auto", "int8"] = "auto"
    """int8: measure the model with the int8 weights of decode.weights_dtype=int8."""
    json: bool = False
    """Print JSON."""
    step: int | None = None
    """The step of the checkpoint. None: the newest."""
    devices: int | None = None
    """Emulate this many devices on the CPU."""
    mesh: Mesh = _MESH


def run(arguments: Arguments) -> str:
    """Runs the job, and returns the text to print."""
    mesh = None if arguments.mesh == _MESH else arguments.mesh
    check(arguments)
    if arguments.tasks:
        return run_tasks(arguments, mesh)
    meta = checkpoint.read_meta(arguments.checkpoint, arguments.step)
    loaded = _load(arguments, mesh)
    loaded = with_dtype(loaded, arguments.dtype)
    trained_here = "corpus" in meta
    texts = read_texts(arguments, loaded.config, trained_here)
    context = choose_context(arguments.context, loaded.config, trained_here)
    stride = context if arguments.stride is None else arguments.stride
    require(1 <= stride <= context, "stride", stride, f"from 1 to {context}, --context")
    documents = list(
        encode(
            texts,
            loaded.tokenizer,
            bos=arguments.bos,
            eos=arguments.eos,
            max_tokens=arguments.max_tokens,
        )
    )
    losses = score(
        loaded,
        documents,
        context=context,
        stride=stride,
        batch_tokens=arguments.batch_tokens,
        reduction=arguments.mesh.reduction,
    )
    results = summarize(documents, losses)
    settings = dict(
        data=arguments.data or loaded.config.data.source,
        held_out=arguments.data is None,
        context=context,
        stride=stride,
        bos=arguments.bos,
        eos=arguments.eos,
        dtype=loaded.config.model.dtype,
        weights_dtype=arguments.weights_dtype,
    )
    return to_json(settings, results) if arguments.json else report(settings, results)


def run_tasks(arguments: Arguments, mesh: Mesh | None) -> str:
    """Runs tasks of lm-evaluation-harness, and returns the text to print."""
    from ladder_jax.evaluation import harness, tasks

    harness.require_installed()
    loaded = _load(arguments, mesh)
    return tasks.run(
        with_dtype(loaded, arguments.dtype),
        arguments.tasks,
        include_path=arguments.include_path,
        num_fewshot=arguments.num_fewshot,
        limit=arguments.limit,
        apply_chat_template=arguments.apply_chat_template,
        system_instruction=arguments.system_instruction,
        as_json=arguments.json,
        max_length=arguments.context,
        batch_tokens=arguments.batch_tokens,
        reduction=arguments.mesh.reduction,
    )


def _load(arguments: Arguments, mesh: Mesh | None) -> Loaded:
    return load(
        arguments.checkpoint,
        step=arguments.step,
        mesh=mesh,
        weights_dtype=arguments.weights_dtype,
    )


def check(arguments: Arguments) -> None:
    """Raises ConfigError for options that do not go together or are out of range."""
    for name in ("context", "stride", "max_tokens", "batch_tokens"):
        value = getattr(arguments, name)
        require(value is None or value >= 1, name, value, "1 or more")
    if arguments.tasks:
        names = ["data", "text_field", "max_tokens", "stride", "bos", "eos"]
        rule = "left out with --tasks"
    else:
        names = ["num_fewshot", "limit", "include_path", "apply_chat_template"]
        names += ["system_instruction"]
        rule = "given with --tasks"
    defaults = {each.name: each.default for each in dataclasses.fields(Arguments)}
    for name in names:
        value = getattr(arguments, name)
        require(value == defaults[name], name, value, rule)


def with_dtype(loaded: Loaded, dtype: str) -> Loaded:
    """Returns `loaded` with another dtype of computation; "auto" keeps it."""
    if dtype == "auto":
        return loaded
    changed: Any = dict(dtype=dtype)
    model_config = dataclasses.replace(loaded.config.model, **changed)
    return loaded._replace(
        config=dataclasses.replace(loaded.config, model=model_config)
    )


# ---------------------------------------------------------------- documents


def read_texts(
    arguments: Arguments, config: Config, trained_here: bool
) -> Iterator[str]:
    """Yields the documents to score.

    Raises ConfigError, when the first is read, if there is none.
    """
    text_field = arguments.text_field or config.data.text_field
    if arguments.data is None:
        if not trained_here:
            raise ConfigError(
                "this checkpoint was not trained here, and so has no held-out "
                "documents: give --data PATH"
            )
        data_config = dataclasses.replace(config.data, text_field=text_field)
        return corpus.documents(data_config, held_out=True)
    return read_source(Data(source=arguments.data, text_field=text_field))


def read_source(data_config: Data) -> Iterator[str]:
    """Yields every document of a source; ConfigError if there is none."""
    tally, is_empty = sources.Tally(), True
    source = data_config.source
    try:
        for path in sources.files(source, tally):
            for text in sources.read(source, Part(path), data_config.text_field, tally):
                is_empty = False
                yield text
        if is_empty:
            raise sources.no_document(data_config, tally)
    except ConfigError as error:
        message = str(error).replace("data.source", "data")
        message = message.replace("data.text_field", "--text-field")
        raise ConfigError(message) from None


def choose_context(context: int | None, config: Config, trained_here: bool) -> int:
    """Returns the most ids before a target. context: what the user gave."""
    most = config.model.max_length
    if context is None:
        return min(config.train.seq_len if trained_here else _CONTEXT, most)
    require(context <= most, "context", context, f"at most model.max_length={most}")
    return context


# ---------------------------------------------------------------- output


def to_json(settings: dict[str, Any], results: dict[str, Any]) -> str:
    """Returns settings and results as JSON; NAME_stderr is a standard error."""
    values: dict[str, Any] = dict(settings)
    for name, value in results.items():
        if isinstance(value, Estimate):
            values[name] = value.value if math.isfinite(value.value) else None
            values[f"{name}_stderr"] = value.error
        else:
            values[name] = value
    return json.dumps(values, indent=2)


def report(settings: dict[str, Any], results: dict[str, Any]) -> str:
    """Returns settings and results as lines of text."""
    what = "held-out documents" if settings["held_out"] else "documents"
    start = "bos" if settings["bos"] else "nothing; its first token is not scored"
    end = "scored" if settings["eos"] else "not scored"
    weights = ", int8 weights" if settings["weights_dtype"] == "int8" else ""
    lines = [
        f"{results['documents']:,} {what} of {settings['data']!r}: "
        f"{results['tokens']:,} tokens, {results['words']:,} words, "
        f"{results['bytes']:,} bytes",
        f"each document alone, after {start}; its end token is {end}; context "
        f"{settings['context']} tokens, stride {settings['stride']}; "
        f"{settings['dtype']}{weights}",
    ]
    for name, title, unit in (
        ("loss", "loss", "nats a token"),
        ("bits_per_byte", "bits per byte", ""),
        ("perplexity", "perplexity", "a token"),
        ("word_perplexity", "perplexity", "a word"),
        ("byte_perplexity", "perplexity", "a byte"),
    ):
        if name in results:
            value, error = results[name]
            spread = "" if error is None else f"± {error:.4g}"
            lines.append(f"{title:14}{value:<12.6g}{spread:12}{unit}".rstrip())
    if results["documents"] > 1:
        lines.append("±: one standard error over documents")
    return "\n".join(lines)
