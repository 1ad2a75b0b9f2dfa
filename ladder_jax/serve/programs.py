"""An engine's compiled programs, and the decode state on the device."""

import gc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ladder_jax import (
    decode,
    decode_scores,
    decode_shapes,
    decode_state,
    decode_weights,
    speculation,
)
from ladder_jax.model import Transformer, Unstacked
from ladder_jax.serve import packing
from ladder_jax.serve.buckets import round_up
from ladder_jax.serve.capacity import Capacity
from ladder_jax.serve.submission import Submission


class Programs:
    """Starts chunks and prefill calls; it does not wait for the device.

    weights: from decode_weights.prepare_weights. state: decode_state.DecodeState.
    width, length: the compiled shape of the state, slots and tokens.
    chunks: {iterations: compiled chunk}. prefill, scored_prefill: the compiled prefill
    calls, see decode.make_prefill. carry: of one iteration with a piece of a prompt.
    carry_saves: {(width, width of a prefill call's one row): seconds that an iteration
    saves that carries its piece}, from carrying.measure; empty before.
    padding_id: a token id outside the vocabulary.
    """

    def __init__(
        self,
        model: Transformer | Unstacked,
        spec: decode_state.DecodeSpec,
        capacity: Capacity,
        padding_id: int,
    ) -> None:
        self.spec, self.capacity = spec, capacity
        self.padding_id = padding_id
        self.weights = decode_weights.prepare_weights(spec, model)
        self.chunks = {
            size: decode.make_chunk(spec, size) for size in capacity.chunk_sizes
        }
        self.prefill = decode.make_prefill(spec)
        self.scored_prefill = decode.make_prefill(spec, scored=True)
        self.carry = decode.make_carry(spec)
        self.carry_saves: Mapping[tuple[int, int], float] = {}
        prefix_block = capacity.options.prefix_block
        self._read_block = decode.make_read_block(spec, prefix_block)
        self._write_block = decode.make_write_block(spec)
        self._drop_block = decode.make_drop_block(spec)
        # `reset` allocates the state.
        self.state: Any = None
        self.width, self.length = capacity.widths[0], capacity.lengths[0]

    def reset(self) -> None:
        """Replaces the state by an empty one of the smallest shape."""
        # Frees the old state first: the memory may not hold two states.
        self.state = None
        self.width, self.length = self.capacity.widths[0], self.capacity.lengths[0]
        self.state = decode_state.empty(
            self.spec,
            self.width,
            self.capacity.staging_size,
            self.length,
            self.capacity.page_count,
        )

    def reshape(self, width: int, length: int) -> bool:
        """Changes the shape of the state; returns False if it has it already."""
        start, stop = (self.width, self.length), (width, length)
        for shape in self.capacity.shapes_between(start, stop):
            self.state = decode_shapes.reshape(self.state, *shape)
        self.width, self.length = width, length
        return start != stop

    def run_chunk(self, cancelled: Sequence[int], steps: int) -> tuple[Any, jax.Array]:
        """Starts the smallest compiled chunk of at least `steps` iterations.

        Args:
          cancelled: request numbers to remove first, at most `most_cancelled`.
          steps: after how many iterations to end; some chunks run all that they are
            compiled for, see decode.make_chunk.
        Returns (decode_state.Events [K, W], request numbers in staging [R]).
        """
        padded = cancelled_ids(self.capacity, cancelled)
        chunk = self.chunks[round_up(self.capacity.chunk_sizes, steps)]
        self.state, events, waiting = chunk(
            self.weights, self.state, padded, np.int32(steps)
        )
        return events, waiting

    @property
    def most_cancelled(self) -> int:
        """The most requests that one chunk can remove: all that the device can hold."""
        return len(cancelled_ids(self.capacity, []))

    def run_prefill(
        self, prompts: decode_state.Prompts, scored: bool = False
    ) -> tuple[decode_state.Events, decode_scores.Scores | None]:
        """Starts a prefill call. Returns its events [P], and scores if `scored`."""
        prefill = self.scored_prefill if scored else self.prefill
        staging = self.state.shared_staging()
        staging, events, scores = prefill(self.weights, staging, prompts)
        self.state = self.state.with_staging(staging)
        return events, scores

    def run_carry(
        self, cancelled: Sequence[int], prompts: decode_state.Prompts
    ) -> tuple[Any, jax.Array, decode_state.Events]:
        """Starts one iteration that carries a piece of a prompt.

        prompts: one row of `capacity.carry_tokens`, from `pack`.
        Returns (events [1, W], request numbers in staging [R], the prompt's events
        [1]); see `run_chunk` and `run_prefill`.
        """
        self.state, events, waiting, first = self.carry(
            self.weights, self.state, cancelled_ids(self.capacity, cancelled), prompts
        )
        return events, waiting, first

    def pack(
        self,
        pieces: Sequence[packing.Piece],
        width: int,
        context: int,
        prompts: Sequence[packing.Prompt],
        states: Sequence[decode_state.SlotState],
    ) -> decode_state.Prompts:
        """Returns the arguments of a prefill call, see packing.pack."""
        return packing.pack(
            pieces,
            width,
            context,
            prompts,
            states,
            self.capacity.staging_size,
            self.padding_id,
        )

    def read_block(self, index: int, start: int) -> Any:
        """Returns a block, from token `start` on in staging row `index`."""
        staging, block = self._read_block(
            self.state.shared_staging(), np.int32(index), np.int32(start)
        )
        self.state = self.state.with_staging(staging)
        return block

    def write_block(self, index: int, start: int, block: Any, number: int) -> None:
        """Gives a block of `read_block` to row `index`, from token `start` on.

        number: of the row's request.
        """
        staging = self.state.shared_staging()
        staging = self._write_block(
            staging, np.int32(index), np.int32(start), block, np.int32(number)
        )
        self.state = self.state.with_staging(staging)

    def drop_block(self, block: Any) -> None:
        """Frees a block of `read_block`, which the host does not use any more."""
        if self.spec.page_size:
            staging = self._drop_block(self.state.shared_staging(), block)
            self.state = self.state.with_staging(staging)

    # ------------------------------------------------------------ compilation

    def compiled(self) -> tuple[int, int]:
        """Returns (programs compiled so far, the most that there can be).

        Engines of this process that run the same programs share them and this count.
        """
        functions: tuple[Any, ...] = (
            *self.chunks.values(),
            self.carry,
            self.prefill,
            self.scored_prefill,
            self._read_block,
            self._write_block,
            self._drop_block,
        )
        count = sum(function._cache_size() for function in functions)
        return count, self.capacity.most_programs()

    def warm_up(self, progress: Callable[[list[Any]], Any]) -> None:
        """Compiles every program that the engine can need, and resets the state.

        progress: wraps the list of shapes, as tqdm does.
        """
        widths, lengths = self.capacity.widths, self.capacity.lengths
        # Each reshape goes through all shapes between its start and its end, so these
        # loops compile all reshapes between neighbouring shapes, in both directions.
        for width in widths:
            self.reshape(width, lengths[-1])
            self.reshape(width, lengths[0])
        for length in lengths:
            self.reshape(widths[-1], length)
            self.reshape(widths[0], length)
        shapes: list[tuple[int, int, Any, bool]] = []
        for length in lengths:
            shapes += [(length, width, None, False) for width in widths]
            for shape in self.capacity.prefill_shapes(length):
                shapes.append((length, widths[-1], shape, False))
            for shape in self.capacity.scored_shapes(length):
                shapes.append((length, widths[-1], shape, True))
        for length, width, prefill_shape, scored in progress(shapes):
            self.reshape(width, length)
            if prefill_shape is None:
                for steps in self.capacity.chunk_sizes:
                    self.run_chunk([], steps)
                if self.capacity.carry_tokens:
                    self.run_carry_padding()
            else:
                self.run_padding(*prefill_shape, scored=scored)
        if self.capacity.stores_prefixes:
            for length in lengths:
                self.reshape(widths[0], length)
                block = self.read_block(0, 0)
                self.write_block(0, 0, block, decode_state.NO_REQUEST)
                self.drop_block(block)
        self.reset()
        # Without `freeze`, Python's garbage collector visits a million objects of JAX
        # now and then, and all requests wait for most of a second.
        gc.collect()
        gc.freeze()

    def run_padding(
        self, context: int, count: int, width: int, *, scored: bool = False
    ) -> None:
        """Runs a prefill call of `count` rows of padding."""
        prompts = padding_prompts(self.spec, self.capacity, context, count, width)
        self.run_prefill(prompts, scored)

    def run_carry_padding(self) -> None:
        """Runs an iteration that carries padding."""
        context = self.capacity.context_lengths(self.length)[0]
        shape = context, 1, self.capacity.carry_tokens
        self.run_carry([], padding_prompts(self.spec, self.capacity, *shape))


def cancelled_ids(capacity: Capacity, cancelled: Sequence[int]) -> np.ndarray:
    """Returns request numbers as an argument of the chunk, padded with NO_REQUEST.

    There is room for as many as the device can hold.
    """
    padded = np.full(
        capacity.slots + capacity.staging_size, decode_state.NO_REQUEST, np.int32
    )
    padded[: len(cancelled)] = cancelled
    return padded


def padding_prompts(
    spec: decode_state.DecodeSpec,
    capacity: Capacity,
    context: int,
    count: int,
    width: int,
) -> decode_state.Prompts:
    """Returns the arguments of a prefill call of `count` rows of padding."""
    padding_row = packing.Piece(capacity.staging_size, 0, width, False)
    state = decode_state.empty_slots(1, spec)._replace(history=None, table=None)
    if state.drafting is not None:
        state = state._replace(drafting=state.drafting._replace(tokens=None))
    return packing.pack(
        [padding_row] * count,
        width,
        context,
        [packing.Prompt(np.zeros(width, np.int32))] * count,
        [state] * count,
        capacity.staging_size,
        spec.model_config.vocab_size,
    )


def array(value: Any, dtype: Any = np.int32) -> Any:
    """Returns a value as an array of one row, [1]."""
    return np.asarray([value], dtype)


def slot_state(
    number: int,
    submission: Submission,
    admission_order: int,
    max_stop_ids: int,
    generated: int = 0,
    drafts: bool = False,
) -> decode_state.SlotState:
    """Returns the decode_state.SlotState [1] of a request, NumPy arrays.

    admission_order: the device admits the staged request with the lowest one first.
    generated: the tokens that the request has generated before it lost its slot.
    drafts: whether the engine drafts tokens, see speculation.py.
    """

    stop_ids = submission.stop_token_ids
    padding = [decode_state.NO_REQUEST] * (max_stop_ids - len(stop_ids))
    drafting = None
    if drafts:
        drafting = speculation.Drafting(
            tokens=None,
            allowed=array(submission.speculate, bool),
            rate=array(speculation.FIRST_RATE, np.float32),
        )
    return decode_state.SlotState(
        request=array(number),
        active=array(False, bool),
        admission_order=array(admission_order),
        token=array(0),
        position=array(0),
        remaining=array(submission.max_tokens - generated),
        required=array(submission.min_tokens - generated),
        stops=array([*stop_ids, *padding]),
        logprobs=array(submission.logprobs is not None, bool),
        sampling=submission.params,
        history=None,  # prefill sets it, the table and the drafting's tokens
        table=None,
        drafting=drafting,
    )
