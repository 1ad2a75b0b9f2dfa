"""The perplexity of a model on documents.

Every document is scored alone: it starts after the tokenizer's bos and sees no other
document. A document longer than the context is cut into windows that overlap by
context - stride ids; each target is scored once, and the last window is full:

    context 4, stride 2     bos  a  b  c  d  e  f
    window 1                 x   x  x  x             scores a b c d
    window 2                        x  x  x  x       scores e f

These are the windows of lm-eval's `loglikelihood_rolling`.
"""

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from ladder_jax.config import ConfigError
from ladder_jax.data.tokenizer import Tokenizer
from ladder_jax.evaluation.scoring import Scorer, Window
from ladder_jax.loading import Loaded

# Documents that are tokenised together.
_TOGETHER = 256


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


# ---------------------------------------------------------------- documents


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
