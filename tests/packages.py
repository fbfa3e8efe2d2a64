"""Single files of packages that are references in tests, and that do not import whole beside today's transformers."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from types import ModuleType

import pytest


@functools.cache
def file_of(package: str, path: str) -> ModuleType:
    """The module in a file of an installed package, by itself; the test is skipped where there is no such package."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{package}, the reference, is not installed (pip install --no-deps {package})")
    (found,) = [file.locate() for file in files if str(file) == path]
    spec = importlib.util.spec_from_file_location(path.replace("/", "_").removesuffix(".py"), str(found))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
