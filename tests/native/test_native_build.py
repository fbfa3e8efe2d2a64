"""A library is made of units that are compiled by themselves: again only where one of their own files has changed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from served import eventually

from moe_ray.native import build, compilers
from moe_ray.native.build import HOST, KERNELS, LINKS, OBJECTS, Library, shared_library, sources_of

needs_compiler = pytest.mark.skipif(not any(map(shutil.which, compilers.COMPILERS)), reason="no C++ compiler")
FILES = {
    "one.cpp": '#include "shared.h"\nextern "C" int first() { return kShared + other(); }\n',
    "two.cpp": '#include "own.h"\n#include "shared.h"\nint other() { return kOwn; }\n',
    "shared.h": "#pragma once\nint other();\nconstexpr int kShared = 40;\n",
    "own.h": "#pragma once\nconstexpr int kOwn = 2;\n",
}


@pytest.fixture
def library(tmp_path: Path) -> Library:
    directory = tmp_path / "sources"
    directory.mkdir()
    for name, text in FILES.items():
        (directory / name).write_text(text)
    return Library("tried", directory, ("one.cpp", "two.cpp"))


def objects(cache: Path) -> set[str]:
    return {path.name for path in (cache / "native" / OBJECTS).iterdir()}


@needs_compiler
def test_only_what_changed_is_compiled_again(library: Library, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert shared_library(library, cache).first() == 42
    first = objects(cache)
    assert sorted(name.rsplit("-", 1)[0] for name in first) == ["tried-one", "tried-two"]
    (library.directory / "own.h").write_text("#pragma once\nconstexpr int kOwn = 3;\n")
    assert not build.is_built(library, cache), "the key is of all files"
    assert shared_library(library, cache).first() == 43
    (added,) = objects(cache) - first
    assert added.startswith("tried-two-")
    (library.directory / "shared.h").write_text(FILES["shared.h"].replace("40", "50"))
    assert shared_library(library, cache).first() == 53
    assert len(objects(cache)) == 5, "both include it"


@needs_compiler
def test_a_unit_that_fails_is_named_and_leaves_nothing(library: Library, tmp_path: Path) -> None:
    (library.directory / "two.cpp").write_text("int other() { return; }\n")
    with pytest.raises(build.KernelsUnavailable, match=r"two\.cpp:1"):
        shared_library(library, tmp_path)
    assert {name.rsplit("-", 1)[0] for name in objects(tmp_path)} <= {"tried-one"}
    assert not list((tmp_path / "native").glob("*.so"))


ENDING = """
import pathlib, signal, sys, threading, time
from moe_ray.native.build import Library, shared_library
signal.signal(signal.SIGINT, signal.default_int_handler)
sources, cache, pids = map(pathlib.Path, sys.argv[1:4])
arguments = Library("tried", sources, ("one.cpp", "two.cpp")), cache
if sys.argv[4] == "Ctrl-C":
    shared_library(*arguments)
threading.Thread(target=shared_library, args=arguments, daemon=True).start()
while not pids.exists():
    time.sleep(0.02)
"""


@pytest.mark.parametrize("end", ["Ctrl-C", "by itself"])
def test_a_process_that_ends_stops_its_compilers(library: Library, tmp_path: Path, end: str) -> None:
    pids, cache, compiler = tmp_path / "pids", tmp_path / "cache", tmp_path / "slow-compiler"
    compiler.write_text(f"#!/bin/sh\necho $$ >> {pids}\nexec sleep 60\n")
    compiler.chmod(0o755)
    arguments = [sys.executable, "-c", ENDING, str(library.directory), str(cache), str(pids), end]
    process = subprocess.Popen(arguments, env=os.environ | {"CXX": str(compiler)}, stderr=subprocess.PIPE)
    eventually(pids.exists, 60)
    if end == "Ctrl-C":
        process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)  # half as long as a compiler takes
    eventually(lambda: not any(map(runs, pids.read_text().split())))


def runs(pid: str) -> bool:
    try:
        return psutil.Process(int(pid)).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_every_source_is_in_a_key() -> None:
    kernels = next(iter(KERNELS.values()))
    found = {path.name for library in (kernels, HOST, LINKS) for path in sources_of(library)}
    there = {path.name for path in build.HERE.iterdir() if path.suffix in (".h", ".cpp")}
    assert found == there
