"""Counts the pages that the requests on the device may have, before one is admitted.

The host does not know which pages a request has, nor what unread chunks did. It counts
the most that each may have. So the device never lacks a page for an admitted prompt; it
may lack one for a slot that grows later (decode_pages.grow).
"""

from collections.abc import Iterable, Sequence

from ladder_jax.serve.capacity import Capacity
from ladder_jax.serve.prefix_cache import PrefixCache
from ladder_jax.serve.request import Request
from ladder_jax.serve.scheduler import Work, most_tokens
from ladder_jax.serve.tracker import Chunk, Record, Tracker, whole_prompt, work_of


class PageBudget:
    """The pages that are free for sure, when a step begins.

    used: the most pages that requests and stored prefixes have.
    reserve: pages to leave free: one for each request that may grow.
    """

    def __init__(
        self,
        capacity: Capacity,
        tracker: Tracker,
        unread: Iterable[Chunk],
        prefixes: PrefixCache,
    ) -> None:
        self.capacity, self.prefixes = capacity, prefixes
        self.block_pages = capacity.options.prefix_block // capacity.page_size
        records = list(tracker)
        # A block that several have counts once.
        self._shared = {id(block) for r in records for block in r.blocks}
        shared_pages = sum(len(r.blocks) for r in records) * self.block_pages
        works = tracker.all_work(unread)
        self._own = sum(map(self.most_pages, works)) - shared_pages
        self.reserve = len(tracker.live())

    @property
    def used(self) -> int:
        """The most pages that requests and stored prefixes have."""
        return self._own + len(self._stored() | self._shared) * self.block_pages

    def _stored(self) -> set[int]:
        return {id(block) for block in self.prefixes.blocks()}

    def most_pages(self, work: Work) -> int:
        """Returns the most pages that a request may have when unread chunks end.

        Its last iteration may have left it pages for drafted tokens.
        """
        drafted = self.capacity.options.speculate
        steps = work.unread_steps * (1 + drafted)
        if work.emitted:
            steps += drafted
        tokens = max(work.prompt, most_tokens(work, steps) - 1)
        return self._pages(tokens)

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self.capacity.page_size)

    def take(self, request: Request) -> bool:
        """Takes the pages of a request's prompt; returns whether there are enough.

        It evicts stored prefixes if there are enough without them.
        """
        has_scores = request.wants_scores and not request.tokens
        blocks = [] if has_scores else self.prefixes.stored(whole_prompt(request))
        shared = self._shared | {id(block) for block in blocks}
        own = self._own - len(blocks) * self.block_pages
        own += self._pages(work_of(request).prompt)
        free = self.capacity.page_count - own - self.reserve
        if len(shared) * self.block_pages > free:
            return False
        while len(self._stored() | shared) * self.block_pages > free:
            # Requests have the blocks in `shared`, or will copy them in this step.
            self.prefixes.evict(kept=shared)
        self._own, self._shared, self.reserve = own, shared, self.reserve + 1
        return True

    def startable(self, records: Sequence[Record]) -> list[Record]:
        """Returns the first of these records that prefill can go on with.

        They have their pages, or there are enough for them now. Since their admission,
        slots may have taken pages that were free then. It evicts stored prefixes if
        there are enough without them.

        records: all that are prefilling, in their order.
        """
        size = self.capacity.options.prefix_block
        missing = [
            0 if record.computed > len(record.blocks) * size else self._missing(record)
            for record in records
        ]
        free = self.capacity.page_count - self._own + sum(missing)
        ready = []
        for record, count in zip(records, missing):
            free -= count
            if count and len(self._shared) * self.block_pages > free:
                break
            while (
                count and len(self._stored() | self._shared) * self.block_pages > free
            ):
                self.prefixes.evict(kept=self._shared)
            ready.append(record)
        return ready

    def _missing(self, record: Record) -> int:
        """Returns the pages of a prompt, without those of its shared prefix."""
        return self._pages(len(record.prompt)) - len(record.blocks) * self.block_pages
