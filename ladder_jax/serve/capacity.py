"""Plans an engine's memory and its compiled shapes, before anything is allocated."""

import bisect

from ladder_jax.config import ConfigError, Decode, to_bytes
from ladder_jax.serve import packing
from ladder_jax.serve.buckets import between, bucket_sizes

# A chunk that always runs all its iterations is compiled at two sizes: steps_per_call,
# and this many times fewer.
SHORT_CHUNK = 4
# The shortest compiled length of the state, and width of a prefill call, in tokens.
SHORTEST_LENGTH = 64
SHORTEST_PIECE = 16


class Capacity:
    """How many requests an engine holds, and the shapes that its programs have.

    Args:
      options: config.Decode.
      length: most tokens of a request, prompt and output.
      token_bytes: of one token's keys and values on one device.
      arrays: how many arrays of equal size the keys and values are.
      prefix_bytes: memory for shared prefixes on one device.
      fixed_trip_count: whether a chunk always runs all iterations it is compiled for.

    slots, places: the most requests in the slots and in staging.
    memory: {use: bytes on one device}, all that is ever allocated for keys and values.
    widths, lengths: the compiled shapes of the decode state, ascending.
    chunk_sizes: the compiled iterations of a chunk, ascending.
    pieces: the compiled widths of a prefill call, ascending.
    Raises ConfigError if decode.kv_memory does not hold decode.slots.
    """

    def __init__(
        self,
        options: Decode,
        length: int,
        token_bytes: int,
        arrays: int,
        prefix_bytes: int,
        fixed_trip_count: bool,
    ) -> None:
        self.options, self.length = options, length
        self.arrays, self.prefix_bytes = arrays, prefix_bytes
        self.row_bytes = token_bytes * length
        self.slots = self._most_slots()
        self.places = self.staging_places(self.slots)
        self.memory = self.budget(self.slots)
        steps, prefill_budget = options.steps_per_call, options.prefill_budget
        self.widths, self.lengths = [self.slots], [length]
        if options.fit_shapes:
            self.widths = bucket_sizes(1, self.slots)
            self.lengths = bucket_sizes(min(SHORTEST_LENGTH, length), length)
        self.chunk_sizes = [steps]
        if fixed_trip_count:
            self.chunk_sizes = sorted({-(-steps // SHORT_CHUNK), steps})
        self.pieces = bucket_sizes(
            min(SHORTEST_PIECE, prefill_budget), min(prefill_budget, length)
        )

    def staging_places(self, slots: int) -> int:
        """Returns the places in staging beside so many slots."""
        return self.options.staging or max(2, slots // 2)

    def budget(self, slots: int) -> dict[str, int]:
        """Returns {use: bytes on one device, "total": their sum} for so many slots."""
        rows = (slots + self.staging_places(slots)) * self.row_bytes
        # A reshape moves array by array, so one array exists twice.
        one_array = slots * self.row_bytes // self.arrays
        reshaping = one_array if self.options.fit_shapes else 0
        total = rows + self.prefix_bytes + reshaping
        return dict(
            rows=rows, prefixes=self.prefix_bytes, reshaping=reshaping, total=total
        )

    def _most_slots(self) -> int:
        """Returns decode.slots if the memory holds them; if None, as many as it holds.

        Raises ConfigError if the memory does not hold them.
        """
        slots, kv_memory = self.options.slots, self.options.kv_memory
        if kv_memory is None:
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

    def report(self, kv_dtype: str) -> str:
        """Describes the plan in one line."""
        mib = {use: f"{size / 2**20:.1f} MiB" for use, size in self.memory.items()}
        return (
            f"{self.slots} slots and {self.places} places in staging, of "
            f"{self.length} tokens in {kv_dtype}: {mib['rows']}, prefixes "
            f"{mib['prefixes']}, reshaping {mib['reshaping']}, together "
            f"{mib['total']} a device"
        )

    def moves(
        self, start: tuple[int, int], stop: tuple[int, int]
    ) -> list[tuple[int, int]]:
        """Returns the shapes (width, length) on the way from one shape to another.

        Each differs from the one before by one size of width or of length, so that few
        reshapes are compiled.
        """
        (width, length), (new_width, new_length) = start, stop
        return [
            *((size, length) for size in between(self.widths, width, new_width)),
            *((new_width, size) for size in between(self.lengths, length, new_length)),
        ]

    def seen(self, length: int) -> list[int]:
        """Returns how many tokens of a cache row a prefill call can be compiled to see.

        These are the compiled lengths up to `length`, without every second one: for
        lengths 64, 128, 256, 512 and `length` 512, they are 128 and 512.
        """
        shorter = self.lengths[: self.lengths.index(length) + 1]
        first = (len(shorter) - 1) % 2  # so that the last one is among them
        return shorter[first::2]

    def prefills(self, length: int) -> list[tuple[int, int, int]]:
        """Returns (tokens seen, rows, width) of every prefill call for a length."""
        shapes = packing.call_shapes(self.pieces, self.options.prefill_budget)
        return [(seen, *shape) for seen in self.seen(length) for shape in shapes]

    def most_programs(self) -> int:
        """Returns how many programs there can be, reshapes not included."""
        chunks = len(self.widths) * len(self.chunk_sizes)
        prefix_blocks = 2  # reading one and writing one
        return sum(
            chunks + prefix_blocks + len(self.prefills(length))
            for length in self.lengths
        )
