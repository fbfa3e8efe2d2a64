"""The kernels on arm64: cross-compiled, run by an emulator, and compared with what they compute on x86-64."""

from __future__ import annotations

import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from moe_ray.native.build import ARM64, COMMON, HERE, KERNELS, X86_64, cpu_flags

CROSS, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
FOR_ARM64 = [name for name, row in KERNELS.items() if ARM64 in row.architectures]
DRIVER = Path(__file__).with_name("kernels_driver.cpp")
ALLOWED = 2e-2
"""Of the largest value: x86-64 without VNNI multiplies weights of 8 bits by inputs of 16 bits, others by 8."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which(CROSS) and shutil.which(EMULATOR)),
        reason=f"no {CROSS} or no {EMULATOR} (Debian: g++-aarch64-linux-gnu, qemu-user)",
    ),
    pytest.mark.skipif(
        platform.machine() != X86_64 or not KERNELS["avx2"].needs <= cpu_flags(), reason="compares with AVX2"
    ),
]


def built(directory: Path, name: str, compiler: str) -> Path:
    program = directory / name
    flags = [flag for flag in COMMON if flag != "-fPIC"]
    units = [str(HERE / unit) for unit in KERNELS[name].units if unit != "kernels.cpp"]  # the driver includes that one
    command = [compiler, *flags, "-static", *KERNELS[name].flags, f"-I{HERE}", "-o", str(program), str(DRIVER), *units]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, "compiles without a warning"
    return program


def outputs(directory: Path, *command: str | Path) -> np.ndarray:
    """What the driver writes; it fails by itself where a row depends on its company."""
    file = directory / "outputs"
    done = subprocess.run([*command, file], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return np.fromfile(file, np.float32)


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name of kernels → the driver with them. The compilers take most of the time: they run side by side."""
    directory = tmp_path_factory.mktemp("kernels")
    compilers = {"avx2": "g++", **dict.fromkeys(FOR_ARM64, CROSS)}
    with ThreadPoolExecutor() as pool:
        files = pool.map(lambda name: built(directory, name, compilers[name]), compilers)
        return dict(zip(compilers, files, strict=True))


@pytest.fixture(scope="module")
def on_x86(programs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    return outputs(tmp_path_factory.mktemp("x86"), programs["avx2"])


@pytest.mark.timeout(900)  # the compilers of three programs
@pytest.mark.parametrize("name", FOR_ARM64)
def test_arm64_computes_what_x86_does(name: str, programs: dict[str, Path], on_x86: np.ndarray, tmp_path: Path) -> None:
    emulated = outputs(tmp_path, EMULATOR, programs[name])
    assert emulated.shape == on_x86.shape
    assert np.isfinite(emulated).all()
    kinds = [*[13 * 72, 72 * 256] * 10, *[7 * 64] * 4, *[19 * 64] * 3, *[9 * 96] * 53, 256, 256 * 16]
    assert sum(kinds) == len(on_x86)
    start = 0
    for size in kinds:
        one, other = on_x86[start : start + size], emulated[start : start + size]
        assert np.abs(one - other).max() <= ALLOWED * np.abs(one).max(), f"numbers {start} to {start + size}"
        start += size
    # Sums of floats have one order everywhere: on both they are the same bits.
    floats = 3 * (13 * 72 + 72 * 256)
    np.testing.assert_array_equal(emulated[:floats], on_x86[:floats])
    codes = 256 + 256 * 16  # and so are floats of 8 bits
    np.testing.assert_array_equal(emulated[-codes:], on_x86[-codes:])
