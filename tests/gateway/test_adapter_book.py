"""Books of adapters agree, whoever learns of a change first."""

from __future__ import annotations

import random

from moe_ray.core import AdapterEntry, AdapterRef
from moe_ray.trunk.adapter_book import AdapterBook
from moe_ray.trunk.wire import pack_adapter, unpack_adapter

POET, PIRATE = AdapterRef(7, "/poet"), AdapterRef(8, "/pirate")


def test_the_newest_entry_of_a_name_counts_and_is_told_once() -> None:
    book, other = AdapterBook(), AdapterBook()
    first = book.put("poet", POET)
    assert other.merge([first]) == [first]
    assert other.merge([first]) == []
    second = other.put("poet", PIRATE)
    assert book.merge(other.all()) == [second]
    assert book.merge([first]) == []
    assert [entry.ref for entry in book.served()] == [PIRATE]


def test_what_was_removed_stays_removed_for_those_who_come_later() -> None:
    book, late = AdapterBook(), AdapterBook()
    entry = book.put("poet", POET)
    book.remove(entry)
    assert book.find("poet") is None
    assert book.served() == []
    late.merge([entry])  # as the configuration of a gateway that starts anew says
    late.merge(book.all())
    assert late.find("poet") is None
    late.put("poet", POET)
    book.merge(late.all())
    assert book.find("poet") is not None


def test_what_is_written_last_counts_though_a_clock_is_behind() -> None:
    book = AdapterBook()
    book.merge([AdapterEntry("poet", 7, "/poet", version=2**62)])
    assert book.put("poet", PIRATE).version == 2**62 + 1


def test_books_agree_whatever_the_order_in_which_they_hear() -> None:
    draw = random.Random(3)
    books = [AdapterBook() for _ in range(4)]
    for _ in range(200):
        one, other = draw.sample(books, 2)
        match draw.randrange(3):
            case 0:
                one.put(draw.choice("abc"), AdapterRef(draw.randrange(1, 9), "/x"))
            case 1 if one.served():
                one.remove(draw.choice(one.served()))
            case _:
                other.merge([unpack_adapter(pack_adapter(entry)) for entry in one.all()])
    for one in books:
        for other in books:
            other.merge(one.all())
    assert len({tuple(book.served()) for book in books}) == 1
