"""The job `ladder-jax eval`: perplexity on documents, or tasks of lm-eval.

Every document is scored alone: it starts after the tokenizer's bos and sees no other
document. A document longer than the context is cut into windows that overlap by
context - stride ids; each target is scored once, and the last window is full:

    context 4, stride 2     bos  a  b  c  d  e  f
    window 1                 x   x  x  x             scores a b c d
    window 2                        x  x  x  x       scores e f

These are the windows of lm-eval's `loglikelihood_rolling`.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from tqdm import tqdm

from ladder_jax import checkpoint
from ladder_jax.arguments import POSITIONAL
from ladder_jax.config import Config, ConfigError, Data, Mesh, require
from ladder_jax.data import corpus, sources
from ladder_jax.data.tokenizer import Tokenizer
from ladder_jax.loading import Loaded, load
from ladder_jax.scoring import Scorer, Window

# Where the user gives no context: the most ids for a model that was not trained here.
_CONTEXT = 2048
# Documents that are tokenised together.
_TOGETHER = 256
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
    json: bool = False
    """Print JSON."""
    step: int | None = None
    """The step of the checkpoint. None: the newest."""
    devices: int | None = None
    """Emulate this many devices on the CPU."""
    mesh: Mesh = _MESH


class Document(NamedTuple):
    """A document as ids: every id after the first one is a target."""

    ids: np.ndarray  # int32
    bytes: int  # of the text of its targets, in UTF-8
    words: int  # pieces of that text between whitespace


class Estimate(NamedTuple):
    """A value, and its standard error over documents; None for one document."""

    value: float
    error: float | None

    def map(self, function: Callable[[float], float], slope: float) -> "Estimate":
        """Returns `function` of the value; `slope` is its derivative there."""
        error = None if self.error is None else self.error * slope
        return Estimate(function(self.value), error)


def run(arguments: Arguments) -> str:
    """Runs the job, and returns the text to print."""
    mesh = None if arguments.mesh == _MESH else arguments.mesh
    check(arguments)
    if arguments.tasks:
        return run_tasks(arguments, mesh)
    meta = checkpoint.read_meta(arguments.checkpoint, arguments.step)
    loaded = load(arguments.checkpoint, step=arguments.step, mesh=mesh)
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
    )
    return to_json(settings, results) if arguments.json else report(settings, results)


def run_tasks(arguments: Arguments, mesh: Mesh | None) -> str:
    """Runs tasks of lm-evaluation-harness, and returns the text to print."""
    from ladder_jax import lm_eval_model, lm_eval_tasks

    lm_eval_model.require_installed()
    loaded = load(arguments.checkpoint, step=arguments.step, mesh=mesh)
    return lm_eval_tasks.run(
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
            for text in sources.read(source, path, data_config.text_field, tally):
                is_empty = False
                yield text
        if is_empty:
            raise sources.no_document(data_config, tally, "it is empty")
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


def encode(
    texts: Iterable[str],
    tokenizer: Tokenizer,
    *,
    bos: bool = True,
    eos: bool = False,
    max_tokens: int | None = None,
) -> Iterator[Document]:
    """Yields the documents, until they have `max_tokens` targets.

    The last one is cut there. Names of special tokens are plain text, as in training.
    """
    left = math.inf if max_tokens is None else max_tokens
    for batch in _batches(texts, _TOGETHER):
        for text, ids in zip(batch, tokenizer.encode_batch(batch)):
            first = [tokenizer.bos] if bos else ids[:1]
            targets = ids if bos else ids[1:]
            is_cut = len(targets) + eos > left
            if not bos or is_cut:
                targets = targets[: int(min(left, len(targets)))]
                text, size = _text_of(first[: not bos], targets, tokenizer)
            else:
                size = len(text.encode("utf-8", "replace"))
            if eos and not is_cut:
                targets = [*targets, tokenizer.eos]
            left -= len(targets)
            if targets:
                yield Document(
                    np.array([*first, *targets], np.int32), size, len(text.split())
                )
            if left <= 0:
                return


def _batches(texts: Iterable[str], count: int) -> Iterator[list[str]]:
    batch = []
    for text in texts:
        batch.append(text)
        if len(batch) == count:
            yield batch
            batch = []
    if batch:
        yield batch


def _text_of(
    before: list[int], ids: list[int], tokenizer: Tokenizer
) -> tuple[str, int]:
    """Returns the text of `ids`, and its bytes; a character may be incomplete.

    before: the id before them, if there is one.
    """
    previous: int | None = None
    parts = []
    for token in [*before, *ids]:
        data = tokenizer.token_bytes(token, previous)
        parts.append(data or b"")
        previous = previous if data is None else token
    content = b"".join(parts[len(before) :])
    return content.decode("utf-8", "replace"), len(content)


# ---------------------------------------------------------------- scores


def windows_of(ids: np.ndarray, context: int, stride: int) -> Iterator[Window]:
    """Yields the windows of a document: every id but the first is scored once."""
    count = len(ids) - 1
    done = min(context, count)
    yield Window(ids[: done + 1], done)
    while done < count:
        scored = min(stride, count - done)
        done += scored
        yield Window(ids[done - context : done + 1], scored)


def score(
    loaded: Loaded,
    documents: list[Document],
    *,
    context: int,
    stride: int,
    batch_tokens: int = 8192,
    reduction: str = "auto",
) -> np.ndarray:
    """Returns the loss of every document: the sum over its targets, in nats."""
    scorer = Scorer(
        loaded.model,
        loaded.config.model,
        loaded.mesh,
        length=min(context, max((len(d.ids) - 1 for d in documents), default=1)),
        batch_tokens=batch_tokens,
        reduction=reduction,
    )
    windows, owners = [], []
    for number, document in enumerate(documents):
        for window in windows_of(document.ids, context, stride):
            windows.append(window)
            owners.append(number)
    # A bar where stderr is a terminal.
    with tqdm(total=len(windows), unit="window", disable=None, file=sys.stderr) as bar:
        scores = scorer.score(windows, progress=bar.update)
    losses = np.zeros(len(documents))
    for number, result in zip(owners, scores):
        losses[number] -= result.log_probs.sum(dtype=np.float64)
    if not np.isfinite(losses).all():
        bad = int(np.flatnonzero(~np.isfinite(losses))[0])
        raise FloatingPointError(
            f"the loss of document {bad} (from 0) is {losses[bad]}: the parameters of "
            "this checkpoint are not finite, or its activations overflow"
        )
    return losses


def summarize(documents: list[Document], losses: np.ndarray) -> dict[str, Any]:
    """Returns the counts, and an Estimate of every measure.

    Raises ConfigError if there is no target.
    """
    targets = np.array([len(document.ids) - 1 for document in documents])
    sizes = np.array([document.bytes for document in documents])
    words = np.array([document.words for document in documents])
    if not sizes.sum():
        raise ConfigError(
            "the data has no token to score: give more text, or leave out --no-bos"
        )
    token, byte = ratio(losses, targets), ratio(losses, sizes)
    results = dict(
        documents=len(documents),
        tokens=int(targets.sum()),
        words=int(words.sum()),
        bytes=int(sizes.sum()),
        loss=token,
        bits_per_byte=byte.map(lambda x: x / math.log(2), 1 / math.log(2)),
        perplexity=_exp(token),
        byte_perplexity=_exp(byte),
    )
    if words.sum():
        results["word_perplexity"] = _exp(ratio(losses, words))
    return results


def ratio(losses: np.ndarray, counts: np.ndarray) -> Estimate:
    """Returns sum(losses) / sum(counts), and its standard error over documents.

    The error is that of a ratio of two means (Cochran, Sampling Techniques, section
    2.11): documents are taken as drawn independently.
    """
    value, n = losses.sum() / counts.sum(), len(losses)
    if n < 2:
        return Estimate(float(value), None)
    squares = np.square(losses - value * counts).sum()
    error = math.sqrt(n / (n - 1) * squares) / counts.sum()
    return Estimate(float(value), float(error))


def _exp(estimate: Estimate) -> Estimate:
    with np.errstate(over="ignore"):
        value = float(np.exp(estimate.value))
    return estimate.map(lambda _: value, value)


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
    lines = [
        f"{results['documents']:,} {what} of {settings['data']!r}: "
        f"{results['tokens']:,} tokens, {results['words']:,} words, "
        f"{results['bytes']:,} bytes",
        f"each document alone, after {start}; its end token is {end}; context "
        f"{settings['context']} tokens, stride {settings['stride']}; "
        f"{settings['dtype']}",
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
