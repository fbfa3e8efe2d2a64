"""The block allocator against a shadow that knows, for every block, which key its content belongs to."""

from __future__ import annotations

import random

import pytest

from moe_ray.engine.blocks import ROOT_KEY, BlockAllocator, block_key


def chain(tokens: list[int], size: int) -> list[bytes]:
    keys, parent = [], ROOT_KEY
    for start in range(0, len(tokens) - size + 1, size):
        parent = block_key(parent, tokens[start : start + size])
        keys.append(parent)
    return keys


def hold(allocator: BlockAllocator, keys: list[bytes]) -> list[int]:
    blocks = allocator.allocate(len(keys))
    assert blocks is not None
    for block, key in zip(blocks, keys, strict=True):
        allocator.register(block, key)
    return blocks


@pytest.mark.parametrize("seed", range(12))
def test_random_lives_never_mix_contents(seed: int) -> None:
    rng = random.Random(seed)
    size, count = rng.choice([1, 2, 4]), rng.randint(3, 24)
    allocator = BlockAllocator(count, size)
    content: dict[int, bytes] = {}  # what was last computed into a block
    tables: list[list[int]] = []
    seen = {"hit": 0, "full": 0, "evicted": 0, "duplicate": 0}
    for _ in range(1500):
        action = rng.random()
        if action < 0.45:
            tokens = [rng.randrange(2) for _ in range(size * rng.randint(1, 5))]
            keys = chain(tokens, size)
            cached = allocator.lookup(keys)
            for block, key in zip(cached, keys, strict=False):
                assert content[block] == key, "the cache handed out a block with another content"
            seen["hit"] += len(cached)
            before = allocator.num_free
            fresh = allocator.allocate(len(keys) - len(cached))
            if fresh is None:
                assert len(keys) - len(cached) > before
                assert allocator.num_free == before, "a refused allocation took blocks"
                allocator.release(cached)
                seen["full"] += 1
            else:
                held = {block for table in tables for block in table} | set(cached)
                assert not held & set(fresh), "a block that somebody holds was handed out"
                assert len(set(fresh)) == len(fresh)
                tables.append(cached + fresh)
                for block, key in zip(fresh, keys[len(cached) :], strict=True):
                    seen["evicted"] += content.pop(block, None) is not None
                    if rng.random() < 0.8:  # else: its computation never came to an end
                        content[block] = key
                        known = allocator.lookup([key])
                        allocator.release(known)
                        allocator.register(block, key)
                        seen["duplicate"] += known not in ([], [block])
        elif tables:
            allocator.release(tables.pop(rng.randrange(len(tables))))
        allocator.check_integrity(tables)
    for table in tables:
        allocator.release(table)
    allocator.check_integrity([])
    assert allocator.num_free == count
    assert min(seen["hit"], seen["full"], seen["evicted"]) > 0, seen


def test_the_longest_unused_is_evicted_first_and_a_sequence_from_its_end() -> None:
    allocator = BlockAllocator(6, 1)
    old, new = chain([1, 2, 3], 1), chain([7, 8, 9], 1)
    old_blocks, new_blocks = hold(allocator, old), hold(allocator, new)
    allocator.release(new_blocks)
    allocator.release(old_blocks)
    allocator.release(allocator.lookup(new))  # used again: now `old` is the one unused for longest
    evicted = []
    for _ in range(6):
        evicted += allocator.allocate(1) or []
        allocator.check_integrity([evicted])
    assert evicted == [*reversed(old_blocks), *reversed(new_blocks)]


def test_free_blocks_go_before_cached_ones() -> None:
    allocator = BlockAllocator(4, 1)
    keys = chain([1, 2], 1)
    blocks = hold(allocator, keys)
    allocator.release(blocks)
    assert not set(allocator.allocate(2) or []) & set(blocks)
    assert allocator.lookup(keys) == blocks


def test_a_reused_block_is_not_found_under_its_old_key() -> None:
    allocator = BlockAllocator(2, 1)
    first = chain([1, 2], 1)
    allocator.release(hold(allocator, first))
    taken = allocator.allocate(1)  # evicts the end of the chain
    assert taken is not None
    found = allocator.lookup(first)
    assert len(found) == 1
    assert found != taken
    allocator.check_integrity([taken, found])


def test_a_key_stays_with_the_block_that_had_it_first() -> None:
    allocator = BlockAllocator(3, 1)
    (key,) = chain([5], 1)
    (one,), (two,) = allocator.allocate(1) or [], allocator.allocate(1) or []
    allocator.register(one, key)
    allocator.register(two, key)
    assert allocator.lookup([key]) == [one]
    allocator.check_integrity([[one], [two], [one]])
    allocator.release([two])  # was never findable, so it is free, not cached
    allocator.release([one])
    allocator.release([one])
    allocator.check_integrity([])
    assert allocator.lookup([key]) == [one]
    assert sorted(allocator.allocate(2) or []) == sorted({0, 1, 2} - {one})


def test_a_block_keeps_its_first_key() -> None:
    allocator = BlockAllocator(1, 1)
    one, two = chain([5], 1)[0], chain([6], 1)[0]
    blocks = allocator.allocate(1) or []
    allocator.register(blocks[0], one)
    allocator.register(blocks[0], two)
    assert allocator.lookup([two]) == []
    assert allocator.lookup([one]) == blocks
    allocator.check_integrity([blocks, blocks])


def test_lookup_stops_at_the_first_gap() -> None:
    allocator = BlockAllocator(3, 1)
    keys = chain([1, 2, 3], 1)
    blocks = hold(allocator, [keys[0], keys[2]])
    assert allocator.lookup(keys) == blocks[:1]


def test_a_key_depends_on_the_whole_prefix() -> None:
    prefixes = [chain([a, b, c, d], 2)[1] for a in range(3) for b in range(3) for c in range(3) for d in range(3)]
    assert len(set(prefixes)) == 81
    assert chain([1, 2, 3, 4], 2) == chain([1, 2, 3, 4, 5], 2)


def test_more_than_there_is_takes_nothing() -> None:
    allocator = BlockAllocator(3, 4)
    assert allocator.allocate(4) is None
    assert allocator.num_free == 3
    assert allocator.allocate(0) == []
    assert len(allocator.allocate(3) or []) == 3
    assert allocator.allocate(1) is None


def test_check_integrity_sees_a_lost_and_a_foreign_reference() -> None:
    allocator = BlockAllocator(3, 1)
    blocks = allocator.allocate(2) or []
    for wrong in ([], [blocks, blocks], [[*blocks, 2]]):
        with pytest.raises(AssertionError):
            allocator.check_integrity(wrong)
