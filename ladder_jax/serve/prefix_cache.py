"""Keys and values of prompt beginnings, kept on the device for the prompts that share them.

A prefix is a chain of blocks of tokens; a block is found by its tokens and all before them, so prompts share exactly
the blocks that they have in common, and an evicted block hides only those behind it. Least recently used go first.
"""

from collections import OrderedDict


class PrefixCache:
    """At most `budget` bytes of blocks of `size` tokens, each of `block_bytes`."""

    def __init__(self, size, budget, block_bytes):
        self.size, self.budget, self.room = size, budget, budget // max(block_bytes, 1)
        self.hits = self.misses = self.evicted = 0  # blocks
        self._blocks = (
            OrderedDict()
        )  # (bytes of all tokens up to its end) -> keys and values

    def find(self, prompt):
        """The blocks that `prompt` (int32 array) begins with, without its last token, which must be computed."""
        found = []
        for key in self._keys(prompt, len(prompt) - 1):
            block = self._blocks.get(key)
            if block is None:
                self.misses += 1
                break
            self.hits += 1
            self._blocks.move_to_end(key)
            found.append(block)
        return found

    def missing(self, prompt):
        """(start, key) of the whole blocks of `prompt` that are not kept; none where there is no room for any."""
        keys = self._keys(prompt, len(prompt)) if self.room else ()
        return [
            (i * self.size, key)
            for i, key in enumerate(keys)
            if key not in self._blocks
        ][: self.room]

    def add(self, key, block):
        """Keeps a block, and lets the least recently used go where there is no room."""
        self._blocks[key] = block
        while len(self._blocks) > self.room:
            self._blocks.popitem(last=False)
            self.evicted += 1

    def clear(self):
        """Forgets all of them."""
        self._blocks.clear()

    def _keys(self, prompt, length):
        return (
            prompt[:end].tobytes() for end in range(self.size, length + 1, self.size)
        )
