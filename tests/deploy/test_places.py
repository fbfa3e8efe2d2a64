"""Directories of a server on machines where the usual ones cannot be used."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from moe_ray.deploy import places
from moe_ray.deploy.places import can_write, fits_sockets, own_directory, ray_directory, usable_cache
from moe_ray.errors import ConfigError

NOWHERE = "/dev/null/nowhere"
"""Below a file: not even root can create it."""


def test_what_can_be_written(tmp_path: Path) -> None:
    assert can_write(tmp_path)
    assert can_write(tmp_path / "a" / "b")
    assert not can_write(Path(NOWHERE))
    assert not can_write(Path("/proc/moe-ray"))
    (tmp_path / "file").touch()
    assert not can_write(tmp_path / "file")


def test_ray_is_put_where_its_sockets_fit(tmp_path: Path) -> None:
    long = tmp_path / ("d" * 60)
    long.mkdir()
    assert not fits_sockets(long)
    assert ray_directory({"TMPDIR": str(long)}) == Path("/tmp")
    assert ray_directory({"TMPDIR": NOWHERE}) == Path("/tmp")
    assert ray_directory({}) == Path("/tmp")
    assert ray_directory({"TMPDIR": "/var/tmp"}) == Path("/var/tmp")
    assert ray_directory({"RAY_TMPDIR": "/var/tmp", "TMPDIR": "/tmp"}) == Path("/var/tmp")


def test_ray_has_room_up_to_the_last_byte() -> None:
    room = places.SOCKET_PATH_BYTES - len(places.LONGEST_SOCKET) - 1
    assert fits_sockets(Path("/" + "d" * (room - 1)))
    assert not fits_sockets(Path("/" + "d" * room))


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        (
            {"RAY_TMPDIR": NOWHERE},
            r"RAY_TMPDIR=/dev/null/nowhere: cannot be written; set RAY_TMPDIR to .* at most \d+ byt",
        ),
        ({"RAY_TMPDIR": "/tmp/" + "d" * 80}, r"its path is too long for Unix sockets; set RAY_TMPDIR"),
        ({"RAY_TMPDIR": "relative"}, r"not an absolute path; set RAY_TMPDIR"),
        (
            {"TMPDIR": NOWHERE},
            r"no directory for its session \(/dev/null/nowhere: cannot be written; /proc/x: .*set RAY_T",
        ),
        ({}, r"no directory for its session \(/proc/x: cannot be written\): set RAY_TMPDIR"),
    ],
)
def test_what_to_set_is_said(environ: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ray_directory(environ, fallback=Path("/proc/x"))


def test_a_directory_of_this_user_alone(tmp_path: Path) -> None:
    path = own_directory(tmp_path)
    assert path == own_directory(tmp_path) == tmp_path / f"moe-ray-{os.getuid()}"
    assert path.stat().st_mode & 0o777 == 0o700
    path.chmod(0o777)
    with pytest.raises(ConfigError, match="mode 700"):
        own_directory(tmp_path)
    path.rmdir()
    path.symlink_to("/tmp")
    with pytest.raises(ConfigError, match="mode 700"):
        own_directory(tmp_path)
    with pytest.raises(ConfigError, match="cannot be created"):
        own_directory(Path(NOWHERE))


def test_the_cache_falls_back_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert usable_cache(tmp_path / "cache") == tmp_path / "cache"
    assert usable_cache(Path(NOWHERE)) == own_directory(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", NOWHERE)
    with pytest.raises(
        ConfigError, match=r"cache directory /dev/null/nowhere cannot be written; set MOE_RAY_CACHE_DIR"
    ):
        usable_cache(Path(NOWHERE))
