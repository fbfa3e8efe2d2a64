"""Starts a Ray on this machine, or joins one that runs: what `ray.init` needs first, and its failures in one line."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import socket
import tempfile
from collections.abc import Iterable, MutableMapping
from pathlib import Path
from typing import Any, Final

import grpc
import psutil

from moe_ray.deploy.places import FALLBACK, can_write, own_directory, ray_directory, serves_python
from moe_ray.deploy.ray_internals import (
    AUTH_MODE,
    AUTH_TOKEN,
    AUTH_TOKEN_PATH,
    DEFAULT_TOKEN_FILE,
    LATE_START,
    LOCAL_SETTINGS,
    TEMP_DIR,
    USE_TLS,
    keep_loopback_addresses,
    local_clusters,
    plasma_directory,
    ray_children,
    show_own_token,
    start_on_loopback,
)
from moe_ray.errors import ConfigError, NotReady

CONNECT_TIMEOUT_S: Final = 5.0
RAY_ADDRESS: Final = "RAY_ADDRESS"
SHARED_MEMORY: Final = Path("/dev/shm")
logger = logging.getLogger(__name__)
_FAULT: Final = re.compile(r"(\w+\.)*\w*(Error|Exception): .")
_CLIENT_SCHEME: Final = "ray://"


def prepare_local_ray(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set what a Ray started by this process is told through `environ`; its processes inherit it.

    It listens on loopback only, and uses directories that can be written. Call it before ray is imported, and only
    where Ray is started here, not joined. What the user has set stays. Raises `ConfigError` where no directory serves.
    """
    for name, value in LOCAL_SETTINGS.items():
        environ.setdefault(name, value)
    directory = ray_directory(environ)
    if str(directory) != environ.get("TMPDIR", str(FALLBACK)):
        environ[TEMP_DIR] = str(directory)
    if environ.get("TMPDIR") and not serves_python(Path(environ["TMPDIR"])):
        environ["TMPDIR"] = str(directory)
    if not _has_token(environ) and not can_write(_home_token().parent):
        path = own_directory() / "ray_auth_token"
        if not path.exists():
            _write_token(path)
        environ[AUTH_TOKEN_PATH] = str(path)


def start(**options: Any) -> Any:
    """Start Ray on this machine and return its context; once more if it was late.

    Raises `NotReady` with Ray's reason in one line.
    """
    if not (SHARED_MEMORY.is_dir() and os.access(SHARED_MEMORY, os.W_OK | os.X_OK)):
        options.update(plasma_directory(str(ray_directory(os.environ))))
    try:
        try:
            return _start(options)
        except Exception as error:
            if LATE_START not in str(error):
                raise
            logger.warning("Ray was not up in time: this machine is busy. It is started once more")
            return _start(options)
    except Exception as error:
        raise NotReady(f"Ray does not start: {reason(error)}") from error


def _start(options: dict[str, Any]) -> Any:
    """Start Ray; where it fails, what it had started is ended, which Ray itself leaves until this process ends."""
    earlier = ray_children()
    try:
        return start_on_loopback(**options)
    except Exception:
        _end(ray_children() - earlier)
        raise


def _end(processes: Iterable[psutil.Process]) -> None:
    """Kill processes that Ray gave up, with their own children."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            for each in (*process.children(recursive=True), process):
                each.kill()
            process.wait(timeout=5)


def join(address: str, **options: Any) -> Any:
    """Connect this process to the Ray cluster at `address` and return its context.

    `auto` is $RAY_ADDRESS, else the Ray of this machine. For a Ray on this machine two defaults of Ray are undone:
    that it replaces a loopback address by the machine's own, and that it shows the user's token only to clusters it
    found by itself. Raises `NotReady` in one line where nothing listens (`ray.init` would try for minutes), or it
    cannot be joined.
    """
    import ray

    meant = _named(address)
    named = f"{meant!r}" + ("" if meant == address else f" (${RAY_ADDRESS})")
    address = meant
    fault = unreachable(address)
    if fault is not None:
        raise NotReady(f"no Ray cluster at {named}: {fault}")
    here = address in local_clusters()
    keep_loopback_addresses(here and address.startswith("127."))
    if here or address == "auto":
        _find_own_token(os.environ)
    if here:
        show_own_token()
    try:
        return ray.init(address=address, log_to_driver=options.pop("log_to_driver", False), **options)
    except Exception as error:
        raise NotReady(f"cannot join the Ray cluster at {named}: {reason(error)}") from error


def unreachable(address: str, timeout_s: float = CONNECT_TIMEOUT_S) -> str | None:
    """Why no Ray cluster can be at `address`; None where a gRPC server listens there, or `address` is `auto`."""
    host_port = address.removeprefix(_CLIENT_SCHEME)
    if "://" in host_port:
        return "expected host:port, ray://host:port or `auto`"
    host, colon, port = host_port.rpartition(":")
    if not colon:
        return None if address == "auto" else "expected host:port, ray://host:port or `auto`"
    if not port.isdigit():
        return f"{port!r} is no port"
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s).close()
    except (OSError, OverflowError) as error:
        return f"nothing listens there ({error})"
    if os.environ.get(USE_TLS) == "1" or _speaks_grpc(host_port, timeout_s):
        return None
    return "something else than Ray listens there"


def _speaks_grpc(host_port: str, timeout_s: float) -> bool:
    with grpc.insecure_channel(host_port, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=timeout_s)
        except grpc.FutureTimeoutError:
            return False
        return True


def reason(error: BaseException) -> str:
    """The line that says it, of what Ray says: its messages are pages long, with a traceback in them, or empty."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    faults = [line for line in lines[1:] if _FAULT.match(line)]  # of a traceback, or a log, that Ray quotes
    said = (faults or lines or [""])[-1 if faults else 0]
    if said.endswith(":") and not faults:  # of two versions that differ: which they are stands in the lines below
        said = f"{said} {', '.join(lines[1:])}"
    name = type(error).__name__
    return (
        said if said and isinstance(error, (RuntimeError, ValueError, ConfigError)) else f"{name}: {said}".rstrip(": ")
    )


def _named(address: str) -> str:
    return os.environ.get(RAY_ADDRESS) or address if address == "auto" else address


def _home_token() -> Path:
    try:
        return Path(DEFAULT_TOKEN_FILE).expanduser()
    except RuntimeError:  # no home at all
        return Path("/nonexistent/ray/auth_token")


def _has_token(environ: MutableMapping[str, str]) -> bool:
    """Whether Ray finds a token, or needs none."""
    mode = environ.get(AUTH_MODE, "token").lower()
    return (
        mode != "token" or any(environ.get(name) for name in (AUTH_TOKEN, AUTH_TOKEN_PATH)) or _home_token().is_file()
    )


def _find_own_token(environ: MutableMapping[str, str]) -> None:
    """Let Ray find the token that `prepare_local_ray` of this user wrote where the home could not be written."""
    if _has_token(environ):
        return
    try:
        path = own_directory() / "ray_auth_token"
    except ConfigError as error:
        logger.debug("no token of this user: %s", error)
        return
    if path.exists():
        environ[AUTH_TOKEN_PATH] = str(path)


def _write_token(path: Path) -> None:
    """Write a new token, all of it at once; the one that another process wrote meanwhile stays."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, encoding="ascii") as file:  # mode 600
        file.write(secrets.token_hex(32))
        file.flush()
        with contextlib.suppress(FileExistsError):
            os.link(file.name, path)
