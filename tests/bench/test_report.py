"""What the benches hand over: the table, the JSON object, the plot."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from moe_ray.bench.report import Plot, Report, Row, as_json, check_plot, draw, machine_facts, print_table, publish
from moe_ray.errors import ConfigError

AXES = Plot("concurrency", "output_tokens_per_s", None)


@pytest.fixture
def report() -> Report:
    rows: list[Row] = [
        {"concurrency": count, "output_tokens_per_s": 31.4159 * count, "ttft_p50_milliseconds": None, "errors": 0}
        for count in (1, 8, 32)
    ]
    return Report("serve", rows, {"model": "bench-m1", "repeats": 3, "error_samples": ["HTTP 400"]})


def table(report: Report, width: int) -> list[str]:
    out = io.StringIO()
    print_table(report, Console(file=out, width=width))
    return out.getvalue().splitlines()


def test_json_is_one_object_with_rows(report: Report, capsys: pytest.CaptureFixture[str]) -> None:
    publish(report, json_output=True, plot=None, axes=AXES, console=Console(stderr=True))
    read = json.loads(capsys.readouterr().out)
    assert read == {
        "bench": "serve",
        "model": "bench-m1",
        "repeats": 3,
        "error_samples": ["HTTP 400"],
        "rows": report.rows,
    }


def test_json_refuses_what_is_no_number() -> None:
    with pytest.raises(ValueError, match="JSON"):
        as_json(Report("serve", [{"rate": float("nan")}], {}))


def test_a_table_has_a_line_per_row_or_where_it_is_too_wide_a_column(report: Report) -> None:
    wide = table(report, 120)
    assert wide[0].split() == list(report.rows[0])
    assert wide[3].split() == ["32", "1,005", "-", "0"]
    narrow = table(report, 60)
    assert narrow[0].split() == ["concurrency", "1", "8", "32"]
    assert narrow[1].split() == ["output_tokens_per_s", "31.42", "251.3", "1,005"]
    assert max(map(len, narrow)) <= 60
    for lines in (wide, narrow):
        assert lines[-1].rstrip() == "model bench-m1; repeats 3; error_samples HTTP 400"


def test_a_table_that_fits_neither_way_is_not_cut(report: Report) -> None:
    many = Report("serve", report.rows * 20, {})
    assert "output_tokens_per_s" in table(many, 40)[0]
    assert table(Report("serve", [], {"model": "bench-m1"}), 40)[-1] == "model bench-m1"


@pytest.mark.parametrize("axes", [AXES, Plot("concurrency", "output_tokens_per_s", "errors", log_x=True, log_y=True)])
def test_a_plot_is_a_png(report: Report, tmp_path: Path, axes: Plot) -> None:
    file = tmp_path / "sweep.png"
    check_plot(file)
    publish(report, json_output=False, plot=file, axes=axes, console=Console(stderr=True))
    assert file.read_bytes().startswith(b"\x89PNG")


def test_plots_that_cannot_be(report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = tmp_path / "none" / "sweep.png"
    with pytest.raises(ConfigError, match="none is not a directory"):
        check_plot(nowhere)
    with pytest.raises(ConfigError, match=r"sweep\.png: cannot be written"):
        draw(report, nowhere, AXES)
    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [])  # as where it is not installed
    sys.path_importer_cache.clear()
    with pytest.raises(ConfigError, match=r"pip install 'moe-ray\[bench\]'"):
        check_plot(tmp_path / "sweep.png")
    with pytest.raises(ConfigError, match=r"pip install 'moe-ray\[bench\]'"):
        draw(report, tmp_path / "sweep.png", AXES)


def test_facts_of_the_machine() -> None:
    facts = machine_facts()
    assert {"date", "cpu", "cores", "memory_gib", "python", "torch", "moe_ray"} == set(facts)
    json.dumps(facts)
