"""Tests of Triton's kernels are skipped where Triton is not installed, and say so."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore_glob = ["test_*.py"] if (spec := find_spec("triton")) is None or spec.origin is None else []
