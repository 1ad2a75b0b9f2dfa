"""What an engine has room for: slots and staging within a budget of memory, and the few shapes that are compiled."""

import bisect

from ladder_jax import config as configuration
from ladder_jax.config import ConfigError
from ladder_jax.serve import packing
from ladder_jax.serve.buckets import between, bucket_sizes

SHORTER = (
    4  # times fewer iterations has the short chunk of a loop that cannot end early
)


class Capacity:
    """Planned once, before anything is allocated.

    Args:
      options: config.Decode.
      length: most tokens of a request.
      token_bytes: what one token's keys and values take on one device.
      arrays: in how many arrays of equal size they are kept.
      prefixes: bytes for shared prefixes.
      fixed: whether a chunk runs all of its iterations, so that a short one has to be another program.

    slots, places: requests that decode, and that stand by in staging.
    memory: {what: bytes on one device}, all that will ever be allocated for keys and values.
    widths, lengths: of the state, that are compiled; chunks: their iterations; pieces: of a prompt.
    Raises ConfigError where decode.kv_memory does not hold decode.slots.
    """

    def __init__(self, options, length, token_bytes, arrays, prefixes, fixed):
        self.options, self.length, self.arrays, self.prefixes = (
            options,
            length,
            arrays,
            prefixes,
        )
        self.row = token_bytes * length
        self.slots = self._most_slots()
        self.places, self.memory = self.plan(self.slots)
        self.widths = (
            bucket_sizes(1, self.slots) if options.fit_shapes else [self.slots]
        )
        self.lengths = (
            bucket_sizes(min(64, length), length) if options.fit_shapes else [length]
        )
        self.chunks = (
            sorted({-(-options.steps_per_call // SHORTER), options.steps_per_call})
            if fixed
            else [options.steps_per_call]
        )
        self.pieces = bucket_sizes(
            min(16, options.prefill_budget), min(options.prefill_budget, length)
        )

    def plan(self, slots):
        """(places in staging, {what: bytes}) for so many slots."""
        places = self.options.staging or max(2, slots // 2)
        moving = (
            slots * self.row // self.arrays if self.options.fit_shapes else 0
        )  # a reshape has one array twice
        memory = dict(
            rows=(slots + places) * self.row, prefixes=self.prefixes, moving=moving
        )
        return places, memory | dict(total=sum(memory.values()))

    def _most_slots(self):
        """The slots that are asked for, if the budget holds them; where none are, as many as it holds."""
        slots, asked = self.options.slots, self.options.kv_memory
        if asked is None:
            return slots
        budget = configuration.to_bytes(asked, "decode.kv_memory")
        most = bisect.bisect_right(
            range(1, 2**16), budget, key=lambda count: self.plan(count)[1]["total"]
        )
        if most >= (slots or 1):
            return slots or most
        needed = self.plan(slots or 1)[1]["total"]
        raise ConfigError(
            f"decode.kv_memory={asked} is not enough for decode.slots={slots or 1} of {self.length} tokens, which take "
            f"{needed / 2**20:.1f}MiB: {most} slots fit; or take a smaller decode.max_length or decode.kv_dtype"
        )

    def report(self, kv_dtype):
        """What is planned, in one line."""
        m = {name: f"{value / 2**20:.1f} MiB" for name, value in self.memory.items()}
        return (
            f"{self.slots} slots and {self.places} places of {self.length} tokens in {kv_dtype}: {m['rows']}, "
            f"prefixes {m['prefixes']}, reshaping {m['moving']}, together {m['total']} a device"
        )

    def moves(self, start, stop):
        """The shapes (width, length) on the way from one to another, by neighbours, so that few moves are compiled."""
        (width, length), (to_width, to_length) = start, stop
        return [
            *((size, length) for size in between(self.widths, width, to_width)),
            *((to_width, size) for size in between(self.lengths, length, to_length)),
        ]

    def seen(self, length):
        """How much of a cache of `length` a prefill call may be compiled to look at: every second of the lengths."""
        return self.lengths[: self.lengths.index(length) + 1][::-2][::-1]

    def prefills(self, length):
        """(tokens seen, rows, width) of every prefill call that there can be into a state of this length."""
        return [
            (seen, *shape)
            for seen in self.seen(length)
            for shape in packing.call_shapes(self.pieces, self.options.prefill_budget)
        ]

    def most_programs(self):
        """As many as can ever be compiled: chunks, prefill calls, blocks of a prefix read and written."""
        chunks, blocks = len(self.widths) * len(self.chunks), 2
        return sum(
            chunks + blocks + len(self.prefills(length)) for length in self.lengths
        )
