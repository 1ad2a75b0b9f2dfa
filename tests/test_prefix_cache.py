"""The prefix cache: which blocks prompts share, and which are evicted first."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ladder_jax.serve.prefix_cache import PrefixCache


def ids(*tokens):
    return np.array(tokens, np.int32)


def add(cache, prompt):
    """Stores the missing blocks of a prompt; a block is the list of its tokens."""
    for start, key in cache.missing(prompt):
        cache.add(key, prompt[start : start + cache.size].tolist())


def test_prompts_share_the_whole_blocks_of_their_common_beginning():
    cache = PrefixCache(size=2, budget=100, block_bytes=10)
    add(cache, ids(1, 2, 3, 4, 5, 6))
    assert cache.find(ids(1, 2, 3, 4, 9, 9, 9)) == [[1, 2], [3, 4]]
    assert cache.find(ids(1, 2, 3, 9, 9)) == [[1, 2]]
    assert cache.find(ids(9, 2, 3, 4, 5)) == [], "equal blocks after other tokens"
    assert (cache.hits, cache.misses) == (3, 3)


def test_the_last_token_of_a_prompt_is_never_part_of_a_found_block():
    cache = PrefixCache(size=2, budget=100, block_bytes=10)
    add(cache, ids(1, 2, 3, 4))
    assert cache.find(ids(1, 2, 3, 4)) == [[1, 2]]
    assert cache.find(ids(1, 2)) == []
    assert cache.find(ids(1)) == []


def test_the_least_recently_used_block_is_evicted():
    cache = PrefixCache(size=1, budget=3, block_bytes=1)
    for token in (1, 2, 3):
        add(cache, ids(token))
    assert cache.find(ids(1, 0)) == [[1]], "1 is used again"
    add(cache, ids(4))
    assert cache.evicted == 1
    is_stored = {token: bool(cache.find(ids(token, 0))) for token in (1, 2, 3, 4)}
    assert is_stored == {1: True, 2: False, 3: True, 4: True}


def test_without_an_evicted_block_later_blocks_are_not_reached():
    cache = PrefixCache(size=1, budget=2, block_bytes=1)
    add(cache, ids(1, 2))
    add(cache, ids(3))
    assert cache.find(ids(1, 2, 0)) == []
    assert [start for start, _ in cache.missing(ids(1, 2))] == [0]


def test_a_cache_without_room_stores_nothing():
    cache = PrefixCache(size=2, budget=9, block_bytes=10)
    assert cache.missing(ids(1, 2, 3, 4)) == []
    assert cache.find(ids(1, 2, 3, 4)) == []


def test_a_long_prompt_never_evicts_its_own_beginning():
    cache = PrefixCache(size=1, budget=1, block_bytes=1)
    add(cache, ids(1))
    add(cache, ids(1, 2, 3))
    assert cache.find(ids(1, 2, 3)) == [[1]]
    assert cache.evicted == 0


def test_a_cleared_cache_finds_nothing():
    cache = PrefixCache(size=1, budget=9, block_bytes=1)
    add(cache, ids(1, 2))
    cache.clear()
    assert cache.find(ids(1, 2, 3)) == []


@given(
    st.integers(1, 3),
    st.integers(0, 4),
    st.lists(st.lists(st.integers(0, 1), max_size=7), max_size=12),
)
def test_found_blocks_are_the_beginning_of_the_prompt(size, room, prompts):
    """After a prompt, its first block at least is found, if there is room for one."""
    cache = PrefixCache(size=size, budget=room, block_bytes=1)
    for tokens in prompts:
        prompt = ids(*tokens)
        blocks = cache.find(prompt)
        shared = [token for block in blocks for token in block]
        assert shared == tokens[: len(shared)]
        assert len(shared) < max(len(tokens), 1)
        add(cache, prompt)
        most = min(max(len(tokens) - 1, 0) // size, room)
        assert min(most, 1) <= len(cache.find(prompt)) <= most
