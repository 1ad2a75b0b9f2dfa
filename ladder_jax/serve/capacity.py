"""Plans an engine's memory and its compiled shapes, before anything is allocated."""

import bisect

from ladder_jax.config import ConfigError, Decode, to_bytes
from ladder_jax.serve import packing
from ladder_jax.serve.buckets import between, bucket_sizes, round_up, with_halves

# A chunk that always runs all its iterations is compiled for two numbers of iterations:
# steps_per_call, and steps_per_call / SHORT_CHUNK_FACTOR.
SHORT_CHUNK_FACTOR = 4
SHORTEST_LENGTH = 64  # the shortest compiled length of a row, in tokens
# With `compute_bound`, widths from this one on have another one between each two.
LEAST_HALVED = 8
SHORTEST_PIECE = 16  # the smallest compiled width of a prefill call, in tokens


class Capacity:
    """How many requests an engine holds, and the shapes that its programs have.

    Args:
      options: config.Decode.
      length: the most tokens of a request, prompt and output together.
      token_bytes: bytes of one token's keys and values on one device.
      arrays: the number of arrays, equal in size, that hold the keys and values.
      prefix_bytes: memory for shared prefixes on one device.
      fixed_trip_count: whether a chunk always runs all iterations it is compiled for.
      page_size: tokens of a page; 0: each row has memory for `length` tokens.
      compute_bound: whether a step over more slots takes longer on these devices even
        where few requests are in them. With pages there are then more widths; with rows
        each would be compiled for all lengths.

    page_count: the pages of all requests and of stored prefixes; 0 without pages.
    slots, staging_size: the most requests in the slots and in staging.
    memory: {use: bytes on one device}, the most that keys and values ever take.
    widths, lengths: the compiled shapes of the decode state, ascending. With pages
      there is one length.
    chunk_sizes: the compiled iterations of a chunk, ascending.
    pieces: the compiled widths of a prefill call, ascending.
    carry_tokens: the compiled width of a piece that an iteration carries; 0: none.
    Raises ConfigError if decode.kv_memory does not hold decode.slots; with pages, if it
    does not hold one request.
    """

    def __init__(
        self,
        options: Decode,
        length: int,
        token_bytes: int,
        arrays: int,
        prefix_bytes: int,
        fixed_trip_count: bool,
        page_size: int = 0,
        compute_bound: bool = False,
    ) -> None:
        self.page_size = page_size
        self.options, self.length = options, length
        self.arrays, self.prefix_bytes = arrays, prefix_bytes
        self.token_bytes = token_bytes
        # The tokens that the row or the pages of the longest request have room for.
        row = -(-length // page_size) * page_size if page_size else length
        self.row_bytes = token_bytes * row
        self.slots = self._most_slots()
        self.staging_size = self.staging_size_for(self.slots)
        self.memory = self.budget(self.slots)
        self.page_count = self._page_count() if page_size else 0
        steps, prefill_budget = options.steps_per_call, options.prefill_budget
        self.widths, self.lengths = [self.slots], [length]
        if options.fit_shapes:
            self.widths = bucket_sizes(1, self.slots)
            if page_size and compute_bound:
                self.widths = with_halves(self.widths, LEAST_HALVED)
            if not page_size:  # attention reads the pages that requests have
                self.lengths = bucket_sizes(min(SHORTEST_LENGTH, length), length)
        self.chunk_sizes = [steps]
        if fixed_trip_count:
            self.chunk_sizes = sorted({-(-steps // SHORT_CHUNK_FACTOR), steps})
        self.pieces = bucket_sizes(
            min(SHORTEST_PIECE, prefill_budget), min(prefill_budget, length)
        )
        self.carry_tokens = 0
        if options.carry_tokens:
            self.carry_tokens = round_up(self.pieces, options.carry_tokens)

    @property
    def stores_prefixes(self) -> bool:
        """Whether the memory for shared prefixes holds a block, and a row does."""
        size = self.options.prefix_block
        return size <= self.length and size * self.token_bytes <= self.prefix_bytes

    def staging_size_for(self, slots: int) -> int:
        """Returns the number of staging rows of an engine with so many slots."""
        return self.options.staging or max(2, slots // 2)

    def budget(self, slots: int) -> dict[str, int]:
        """Returns {use: bytes on one device, "total": their sum} for so many slots."""
        rows = (slots + self.staging_size_for(slots)) * self.row_bytes
        # A reshape copies array by array, so one array exists twice.
        one_array = slots * self.row_bytes // self.arrays
        reshapes = self.options.fit_shapes and not self.page_size
        reshaping = one_array if reshapes else 0
        total = rows + self.prefix_bytes + reshaping
        return dict(
            rows=rows, prefixes=self.prefix_bytes, reshaping=reshaping, total=total
        )

    def _most_slots(self) -> int:
        """Returns decode.slots; if it is None, as many as decode.kv_memory holds.

        Raises ConfigError if the memory does not hold them, or not even one.
        """
        slots, kv_memory = self.options.slots, self.options.kv_memory
        if kv_memory is None or (slots and self.page_size):
            assert slots is not None  # config.Decode requires one of the two
            return slots
        memory = to_bytes(kv_memory, "decode.kv_memory")
        counts = range(1, 2**16)
        most = bisect.bisect_right(
            counts, memory, key=lambda count: self.budget(count)["total"]
        )
        if most >= (slots or 1):
            return slots or most
        needed = self.budget(slots or 1)["total"] / 2**20
        raise ConfigError(
            f"decode.kv_memory={kv_memory} is not enough for decode.slots={slots or 1} "
            f"of {self.length} tokens, which take {needed:.1f} MiB: {most} slots fit; "
            "or set a smaller decode.max_length or decode.kv_dtype"
        )

    def _page_count(self) -> int:
        """Returns how many pages decode.kv_memory holds, and slots and staging can use.

        It sets `memory` to what they take. Raises ConfigError if the longest request
        and the stored prefixes do not fit.
        """
        page_bytes = self.page_size * self.token_bytes
        block_bytes = self.options.prefix_block * self.token_bytes
        prefixes = self.prefix_bytes // block_bytes * block_bytes // page_bytes
        most = self.memory["rows"] // page_bytes + prefixes
        if self.options.kv_memory is None:
            return most
        memory = to_bytes(self.options.kv_memory, "decode.kv_memory")
        count = min(most, memory // page_bytes)
        least = self.row_bytes // page_bytes + prefixes
        if count < least:
            raise ConfigError(
                f"decode.kv_memory={self.options.kv_memory} is not enough for one "
                f"request of {self.length} tokens and decode.prefix_memory, which take "
                f"{least * page_bytes / 2**20:.1f} MiB; or set a smaller "
                "decode.max_length or decode.kv_dtype"
            )
        rows = (count - prefixes) * page_bytes
        self.memory |= dict(rows=rows, total=rows + self.prefix_bytes)
        return count

    def report(self, kv_dtype: str, kernel: str) -> str:
        """Returns slots, staging and their memory as one line of text.

        kernel: that reads pages, see page_kernels.kernel_for.
        """
        mib = {use: f"{size / 2**20:.1f} MiB" for use, size in self.memory.items()}
        pages = ""
        if self.page_size:
            pages = f" in {self.page_count} pages (attention by {kernel})"
        return (
            f"{self.slots} slots and {self.staging_size} rows of staging, of "
            f"{self.length} tokens in {kv_dtype}{pages}: {mib['rows']}, prefixes "
            f"{mib['prefixes']}, reshaping {mib['reshaping']}, together "
            f"{mib['total']} a device"
        )

    def shapes_between(
        self, start: tuple[int, int], stop: tuple[int, int]
    ) -> list[tuple[int, int]]:
        """Returns the shapes (width, length) through which a reshape to `stop` goes.

        From each shape to the next, either the width or the length changes to the
        neighbouring compiled size, so that few reshapes are compiled. The last shape is
        `stop`; the list is empty if `start` is equal to it.
        """
        (width, length), (new_width, new_length) = start, stop
        return [
            *((size, length) for size in between(self.widths, width, new_width)),
            *((new_width, size) for size in between(self.lengths, length, new_length)),
        ]

    def context_lengths(self, length: int, scored: bool = False) -> list[int]:
        """Returns the compiled contexts of a prefill call, for rows of `length` tokens.

        The context is how many tokens at the beginning of a row the call reads and
        writes. It is every second compiled length, `length` included: for the lengths
        64, 128, 256, 512 and `length` 512, the contexts are 128 and 512. A call that
        scores its prompt has the context `length` alone, so that few are compiled.
        """
        if scored:
            return [length]
        up_to_length = self.lengths[: self.lengths.index(length) + 1]
        return up_to_length[::-2][::-1]

    def prefill_shapes(self, length: int) -> list[tuple[int, int, int]]:
        """Returns (context, rows, width) of the prefill calls on rows of `length`."""
        shapes = packing.call_shapes(self.pieces, self.options.prefill_budget)
        contexts = self.context_lengths(length)
        return [(context, *shape) for context in contexts for shape in shapes]

    def scored_shapes(self, length: int) -> list[tuple[int, int, int]]:
        """Returns the same of the prefill calls that score their prompt, one row each.

        There are none without `decode.prompt_logprobs`.
        """
        if not self.options.prompt_logprobs:
            return []
        return [(length, 1, width) for width in self.pieces]

    def most_programs(self) -> int:
        """Returns the most programs that are compiled, reshapes not included."""
        chunks = len(self.widths) * (len(self.chunk_sizes) + bool(self.carry_tokens))
        prefix_programs = 3  # they read, write and drop a block
        return sum(
            chunks
            + prefix_programs
            + len(self.prefill_shapes(length))
            + len(self.scored_shapes(length))
            for length in self.lengths
        )
