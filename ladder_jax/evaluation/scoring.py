"""Scores ids: the log-probabilities that a model gives to targets in given contexts.

`Scorer` serves perplexity and multiple choice. It sorts windows by length, pads them to
a few lengths and batches them, so that few programs are compiled.

B rows, T tokens of a row, R targets of a row, D model, V vocabulary.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from ladder_jax import attention, sharding
from ladder_jax.config import Model
from ladder_jax.cross_entropy import cross_entropy
from ladder_jax.hardware import chips, xla_options
from ladder_jax.model import Transformer, hidden, logits
from ladder_jax.residual import choose
from ladder_jax.residual.blocks import take
from ladder_jax.serve.buckets import bucket_sizes, round_up

# The shortest padded row, and the fewest targets that a program scores in a row.
_LEAST = 16
# The logits of one device that exist at a time take about this much memory.
_LOGITS_BYTES = 2**27
# The last rows of a length go in batches of an eighth: less of them is padding.
_SMALL_BATCHES = 8


class Window(NamedTuple):
    """Ids whose last `scored` are targets; all ids before a target are its context."""

    ids: np.ndarray  # int32, at least scored + 1
    scored: int


class Score(NamedTuple):
    """What the model says of a window's targets."""

    log_probs: np.ndarray  # [scored] float32, nats
    is_greedy: np.ndarray  # [scored] bool: no other id has a larger logit


class _Row(NamedTuple):
    """A row of a batch, and the windows that are read from it."""

    inputs: np.ndarray
    windows: list[int]


class _Batch(NamedTuple):
    """A batch that the device works on."""

    rows: list[_Row]
    results: tuple[jax.Array, jax.Array]


class Scorer:
    """Scores windows with one model, on any mesh of one process.

    Probabilities are over all rows of the embedding, those of a padded vocabulary
    included, as in training. A target is greedy if no id has a larger logit and no
    smaller id an equal one.

    Args:
      model: the parameters, on `mesh`.
      model_config: its dtype is that of the computation.
      mesh: the devices.
      length: the longest context, in ids.
      batch_tokens: tokens of a full batch, padding included.
      batch_rows: rows of a full batch. None: as `batch_tokens` says.
      reduction: a name of reductions.REDUCTIONS, or "auto".
    """

    def __init__(
        self,
        model: Transformer,
        model_config: Model,
        mesh: Mesh,
        *,
        length: int,
        batch_tokens: int = 8192,
        batch_rows: int | None = None,
        reduction: str = "auto",
    ) -> None:
        sharding.check_fits(model_config, mesh)
        self._model, self._mesh = model, mesh
        self.length = length
        self._lengths = bucket_sizes(min(_LEAST, length), length)
        self._batch_tokens, self._batch_rows = batch_tokens, batch_rows
        self._unit = sharding.batch_shards(mesh)
        self._program = _make_program(model_config, mesh, reduction)

    def score(
        self,
        windows: Sequence[Window],
        *,
        share: bool = False,
        progress: Callable[[int], object] = lambda count: None,
    ) -> list[Score]:
        """Returns the score of every window.

        Args:
          windows: their contexts are at most `length` ids.
          share: whether windows whose inputs begin the inputs of another window are
            read from its row. It pays for continuations of one token each.
          progress: is called with numbers of windows that are complete.
        """
        empty = Score(np.zeros(0, np.float32), np.zeros(0, bool))
        scores = [empty] * len(windows)
        before: _Batch | None = None
        for shape, rows in self._batches(windows, share):
            arrays = _fill(rows, windows, shape)
            batch = _Batch(rows, self._program(self._model, *arrays))
            if before is not None:  # the device works on the next one already
                progress(_read(before, windows, scores))
            before = batch
        if before is not None:
            progress(_read(before, windows, scores))
        progress(sum(window.scored == 0 for window in windows))
        return scores

    def _batches(
        self, windows: Sequence[Window], share: bool
    ) -> Iterator[tuple[tuple[int, int, int], list[_Row]]]:
        """Yields ((B, T, R), rows) of every batch, the longest first."""
        groups: dict[tuple[int, int], list[_Row]] = {}
        for row in self._rows(windows, share):
            length = round_up(self._lengths, len(row.inputs))
            reads = sum(windows[i].scored for i in row.windows)
            few = min(_LEAST, length)
            shape = length, few if reads <= few else length
            groups.setdefault(shape, []).append(row)
        for length, reads in sorted(groups, reverse=True):
            rows = groups[length, reads]
            full = self._batch_rows or max(self._batch_tokens // length, 1)
            full += -full % self._unit
            small = -(-full // _SMALL_BATCHES)
            small += -small % self._unit
            while rows:
                count = full if len(rows) > full - small else small
                yield (count, length, reads), rows[:count]
                rows = rows[count:]

    def _rows(self, windows: Sequence[Window], share: bool) -> list[_Row]:
        """Returns the rows to compute; with `share`, one for several windows."""
        inputs = [np.asarray(window.ids[:-1], np.int32) for window in windows]
        used = [i for i, window in enumerate(windows) if window.scored]
        if not share:
            return [_Row(inputs[i], [i]) for i in used]
        # In this descending order, the ids that begin others follow them at once.
        keys = {i: inputs[i].astype(">i4").tobytes() for i in used}
        rows: list[_Row] = []
        key, room = b"", 0
        for i in sorted(used, key=keys.__getitem__, reverse=True):
            if not (key.startswith(keys[i]) and windows[i].scored <= room):
                rows.append(_Row(inputs[i], []))
                key, room = keys[i], round_up(self._lengths, len(inputs[i]))
            rows[-1].windows.append(i)
            room -= windows[i].scored
        return rows


def _fill(
    rows: list[_Row], windows: Sequence[Window], shape: tuple[int, int, int]
) -> tuple[np.ndarray, ...]:
    """Returns tokens [B, T], lengths [B], read positions and targets [B, R]."""
    B, T, R = shape
    tokens_BT = np.zeros((B, T), np.int32)
    lengths_B = np.zeros(B, np.int32)
    reads_BR, targets_BR = np.zeros((2, B, R), np.int32)
    for b, row in enumerate(rows):
        lengths_B[b] = len(row.inputs)
        tokens_BT[b, : len(row.inputs)] = row.inputs
        column = 0
        for ids, scored in (windows[i] for i in row.windows):
            columns = slice(column, column + scored)
            reads_BR[b, columns] = np.arange(len(ids) - 1 - scored, len(ids) - 1)
            targets_BR[b, columns] = ids[len(ids) - scored :]
            column += scored
    return tokens_BT, lengths_B, reads_BR, targets_BR


def _read(batch: _Batch, windows: Sequence[Window], scores: list[Score]) -> int:
    """Waits for a batch, writes its scores; returns how many windows it completes."""
    log_probs_BR, is_greedy_BR = jax.device_get(batch.results)
    for b, row in enumerate(batch.rows):
        column = 0
        for i in row.windows:
            columns = slice(column, column + windows[i].scored)
            scores[i] = Score(log_probs_BR[b, columns], is_greedy_BR[b, columns])
            column += windows[i].scored
    return sum(len(row.windows) for row in batch.rows)


@functools.lru_cache(maxsize=8)
def _make_program(
    model_config: Model, mesh: Mesh, reduction: str
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """(model, tokens, lengths, reads, targets) -> (log_probs, is_greedy) [B, R]."""
    platform = chips.platform(mesh)
    policy = choose.reduction_for(reduction, model_config, mesh)

    def local(
        model: Transformer,
        tokens_BT: jax.Array,
        lengths_B: jax.Array,
        reads_BR: jax.Array,
        targets_BR: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        T = tokens_BT.shape[1]
        positions_BT = jnp.broadcast_to(jnp.arange(T), tokens_BT.shape)
        segments_BT = (positions_BT < lengths_B[:, None]).astype(jnp.int32)
        x_BTD, _ = hidden(
            model,
            model_config,
            tokens_BT,
            positions_BT,
            segments_BT,
            kernel=attention.kernel_for(platform, model_config, T),
            reduction=policy,
        )

        def score(arrays: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            x_1CD, targets_1C = arrays
            logits_1CV = logits(model, model_config, x_1CD)
            is_greedy_1C = _most_probable(logits_1CV) == targets_1C
            return -cross_entropy(logits_1CV, targets_1C), is_greedy_1C

        local_rows = model_config.vocab_size // mesh.shape[sharding.TENSOR]
        count = min(max(_LOGITS_BYTES // 4 // local_rows, 1), targets_BR.size)
        chunks = _chunks(take(x_BTD, reads_BR), count), _chunks(targets_BR, count)
        results = lax.map(score, chunks)
        shape, size = targets_BR.shape, targets_BR.size
        log_probs_BR, is_greedy_BR = (
            result.reshape(-1)[:size].reshape(shape) for result in results
        )
        return log_probs_BR, is_greedy_BR

    tokens, rows = sharding.TOKENS, jax.sharding.PartitionSpec(sharding.BATCH_AXES)

    def program(model: Transformer, *arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        weights = sharding.parameter_specs(model)
        in_specs = weights, tokens, rows, tokens, tokens
        run = sharding.shard_map(local, mesh, in_specs, (tokens, tokens))
        return run(model, *arrays)

    return jax.jit(program, compiler_options=xla_options.options(mesh))


def _chunks(x_BR: jax.Array, count: int) -> jax.Array:
    """[B, R, ...] as [chunks, 1, count, ...]; zeros fill the last chunk."""
    x: Any = x_BR.reshape(-1, *x_BR.shape[2:])
    padding = [(0, -len(x) % count)] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, padding).reshape(-1, 1, count, *x.shape[1:])


def _most_probable(logits_BTV: jax.Array) -> jax.Array:
    """The smallest id with the largest logit, over all tensor shards: [B, T]."""
    V = logits_BTV.shape[-1]
    largest_BT = logits_BTV.max(axis=-1)
    ids_BT = logits_BTV.argmax(axis=-1) + sharding.vocabulary_offset(V)
    is_here_BT = largest_BT == sharding.largest(largest_BT)
    ids_BT = jnp.where(is_here_BT, ids_BT, jnp.iinfo(jnp.int32).max)
    return -sharding.largest(-ids_BT)
