"""Sets of numbers as people write them: `0,2,4-6`, or `all`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

ALL: Final = "all"
_RUN: Final = re.compile(r"(\d+)(?:-(\d+))?")


def parse_runs(text: str) -> tuple[range, ...] | None:
    """Return the runs of `text`, in its order; None for `all`. Raises `ValueError` that says what is allowed."""
    if text.strip() == ALL:
        return None
    runs = []
    for part in text.split(","):
        found = _RUN.fullmatch(part.strip())
        if found is None:
            raise ValueError(f"must be `{ALL}` or numbers and runs of them, such as 0,2,4-6")
        first, last = int(found[1]), int(found[2] or found[1])
        if first > last:
            raise ValueError(f"{found[0]}: the first number must not be above the last")
        runs.append(range(first, last + 1))
    return tuple(runs)


def format_runs(numbers: Iterable[int]) -> str:
    """Return what `parse_runs` reads: numbers in ascending order, runs of them as first-last."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
