"""Stores keys and values of prompt beginnings on the device, for later prompts.

A prefix is a chain of blocks. The key of a block is its tokens and all tokens before
it, so two prompts share exactly the blocks that their common beginning fills. If a
block is evicted, `find` does not return the blocks after it any more.
"""

import itertools
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from typing import Any

import numpy as np


class PrefixCache:
    """Stores blocks of prompt tokens; the least recently used one is evicted first.

    Args:
      size: tokens of a block.
      budget: bytes for all blocks.
      block_bytes: bytes of one block.
      drop: gets every block that is evicted.

    `room` is the most blocks that fit; `hits`, `misses` and `evicted` count blocks.
    """

    def __init__(
        self,
        size: int,
        budget: int,
        block_bytes: int,
        drop: Callable[[Any], None] = lambda block: None,
    ) -> None:
        self.drop = drop
        self.size = size
        self.budget = budget
        self.block_bytes = block_bytes
        self.room = budget // max(block_bytes, 1)
        self.hits = 0
        self.misses = 0
        self.evicted = 0
        # {the bytes of all tokens up to a block's end: the block's keys and values}
        self._blocks: OrderedDict[bytes, Any] = OrderedDict()

    @property
    def used_bytes(self) -> int:
        """Bytes of the blocks that are stored."""
        return len(self._blocks) * self.block_bytes

    def find(self, prompt: np.ndarray) -> list[Any]:
        """Returns the blocks that `prompt` [T] int32 begins with.

        No block has the last token of the prompt: the model must compute that one.
        """
        blocks = []
        for key in self._keys(prompt, len(prompt) - 1):
            block = self._blocks.get(key)
            if block is None:
                self.misses += 1
                break
            self.hits += 1
            self._blocks.move_to_end(key)
            blocks.append(block)
        return blocks

    def stored(self, prompt: np.ndarray) -> list[Any]:
        """Returns the same blocks as `find`, and counts and reorders nothing."""
        keys = self._keys(prompt, len(prompt) - 1)
        blocks = (self._blocks.get(key) for key in keys)
        return list(itertools.takewhile(lambda block: block is not None, blocks))

    def blocks(self) -> list[Any]:
        """Returns all blocks, the least recently used one first."""
        return list(self._blocks.values())

    def missing(self, prompt: np.ndarray) -> list[tuple[int, bytes]]:
        """Returns (start, key) of the blocks of `prompt` that are not stored yet.

        It returns none after the first `room` blocks of the prompt: to store such a
        block would evict one before it, and then `find` would not return it.
        """
        keys = itertools.islice(self._keys(prompt, len(prompt)), self.room)
        return [
            (i * self.size, key)
            for i, key in enumerate(keys)
            if key not in self._blocks
        ]

    def add(self, key: bytes, block: Any) -> None:
        """Stores a block, and evicts the least recently used ones if room runs out."""
        self._blocks[key] = block
        while len(self._blocks) > self.room:
            self.evict()

    def evict(self, kept: Collection[int] = ()) -> None:
        """Removes the least recently used block whose `id` is not among `kept`."""
        blocks = self._blocks.items()
        key = next(key for key, block in blocks if id(block) not in kept)
        self.evicted += 1
        self.drop(self._blocks.pop(key))

    def clear(self) -> None:
        """Removes all blocks."""
        self._blocks.clear()

    def _keys(self, prompt: np.ndarray, length: int) -> Iterator[bytes]:
        """Yields the keys of the whole blocks in the first `length` tokens."""
        for end in range(self.size, length + 1, self.size):
            yield prompt[:end].tobytes()
