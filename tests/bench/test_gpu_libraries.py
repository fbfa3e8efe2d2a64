"""Libraries beside our kernels in `bench gpu`: torch's 4-bit products are ours', and what refuses says so."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_ray.bench import gpu_kernels
from moe_ray.bench.gpu_kernels import KernelTable
from moe_ray.bench.gpu_libraries import Gemlite, LibraryLacks, Product, TorchInt4
from moe_ray.bench.gpu_shapes import shape_config, shape_model
from moe_ray.model.formats.grouped import GroupedCodes, Grouping

CPU = torch.device("cpu")
ROWS = (1, 2, 17)


def weight(offsets: bool) -> GroupedCodes:
    random = np.random.default_rng(3)
    codes = random.integers(0, 16, (96, 256), dtype=np.uint8)
    scales = random.uniform(0.01, 0.02, (96, 2)).astype(np.float32)
    added = random.standard_normal((96, 2)).astype(np.float32) * 0.1 if offsets else None
    return GroupedCodes(Grouping(4, 128, offsets=offsets), codes, scales, added)


@pytest.mark.parametrize("offsets", [False, True])
def test_the_product_of_torch(offsets: bool) -> None:
    held = weight(offsets)
    product = TorchInt4().product(held, CPU)
    assert product.nbytes == 96 * 256 // 2 + 2 * 2 * 96 * 2
    for count in ROWS:
        x = torch.randn(count, 256, generator=torch.Generator().manual_seed(count))
        wanted = x @ torch.from_numpy(held.values()).T
        got = product.run(x)
        assert got.dtype == x.dtype
        torch.testing.assert_close(got, wanted, rtol=0, atol=2e-2 * float(wanted.abs().max()))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("cache")
    return shape_model(shape_config("tiny", "int4", 1), "tiny-int4", cache, lambda what, done, total: None)


def test_rows_of_torch_stand_beside_ours(directory: Path) -> None:
    rows, facts = KernelTable("cpu", "triton", ROWS, directory).measured({"int4": directory})
    assert [row["rows"] for row in rows if row["by"] == "triton"] == list(ROWS)
    by_torch = [row for row in rows if row["by"] == f"torch {torch.__version__} _weight_int4pack_mm"]
    assert [row["rows"] for row in by_torch] == list(ROWS)
    assert by_torch[0]["weight_mib"] == pytest.approx(rows[0]["weight_mib"], abs=0.1)
    if find_spec("gemlite") is None:
        assert facts["left_out"] == "gemlite: not installed (pip install gemlite)"


class Doubled(TorchInt4):
    """Gives what it should not."""

    def product(self, held: GroupedCodes, device: torch.device) -> Product:
        made = TorchInt4().product(held, device)
        return Product(lambda x: 2 * made.run(x), made.nbytes)


class Refusing(TorchInt4):
    """As a library that does not know a card."""

    def product(self, held: GroupedCodes, device: torch.device) -> Product:
        raise RuntimeError("no kernel image is available\nfurther lines")


def test_what_differs_or_refuses_is_left_out(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_kernels, "LIBRARIES", (Doubled(), Refusing()))
    rows, facts = KernelTable("cpu", "triton", (1,), directory).measured({"int4": directory})
    assert {row["by"] for row in rows} == {"triton"}
    differs, refuses = str(facts["left_out"]).split("; ")
    assert "its outputs for 1 rows are" in differs
    assert refuses.endswith("no kernel image is available")


def test_no_rows_read_no_weights(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_kernels, "ExpertReader", None)
    rows, facts = KernelTable("cpu", "triton", (), directory).measured({"int4": directory})
    assert rows == []
    assert facts["read_gb_per_s"] > 0


@pytest.mark.skipif(find_spec("gemlite") is not None, reason="gemlite is installed")
def test_a_library_that_is_not_installed() -> None:
    with pytest.raises(LibraryLacks, match=r"gemlite: not installed \(pip install gemlite\)"):
        Gemlite().name  # noqa: B018 - what is asked for raises
