"""Several hosts on one machine: network namespaces with a raylet each, joined by a switch that can be slow or cut."""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import httpx

from moe_ray.bench.lab.switch import DEVICE, SwitchProcess, kill_members
from moe_ray.bench.processes import MOE_RAY
from moe_ray.errors import ConfigError, NotReady

NETWORK: Final = "10.77.0.0"
MTU: Final = 65_000
"""Few packets carry much: what is imitated is time, not the work of a network card."""
RAY_PORT, HTTP_PORT = 6379, 8000
OBJECT_STORE_BYTES: Final = 80 * 2**20
HEAD_CPUS: Final = 8
RAY_START_S: Final = 90.0
SERVE_START_S: Final = 180.0
STOP_S: Final = 30.0
WARM_UP: Final = 5
_CLONE_NEWNET: Final = 0x40000000
_TCP_BYTES: Final = "4096 262144 67108864"
"""So that one connection can fill 25 Gbit/s over several milliseconds."""
_RAY: Final = (sys.executable, "-c", "from ray.scripts.scripts import main; main()")
_RAY_SETTINGS: Final = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
}


@dataclass(frozen=True, slots=True)
class NetworkHost:
    """A network namespace: an address, a loopback and ports of its own. Files and processes are the machine's."""

    number: int
    address: str
    netns: str

    @property
    def name(self) -> str:
        """What its label `host` says: h1, h2, …"""
        return f"h{self.number + 1}"

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Meanwhile sockets and processes that this thread makes are the host's; so are threads that it starts."""
        with open("/proc/thread-self/ns/net") as home, open(self.netns) as there:
            _enter(there.fileno())
            try:
                yield
            finally:
                _enter(home.fileno())


@dataclass(frozen=True, slots=True)
class Server:
    """A `moe-ray serve` on the first host that is ready."""

    url: str
    """Only from inside the first host."""
    ready_s: float


@dataclass(slots=True)
class Hosts:
    """Hosts, the switch between them, and (after `start_ray`) a Ray cluster on them."""

    hosts: Sequence[NetworkHost]
    switch: SwitchProcess
    directory: Path
    """Of Ray's sessions."""
    _environment: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, number: int) -> NetworkHost:
        return self.hosts[number]

    @property
    def ray_address(self) -> str:
        return f"{self.hosts[0].address}:{RAY_PORT}"

    def start_ray(self, number: int, labels: Mapping[str, str] | None = None) -> None:
        """Start Ray on one host, on the first one its head; on a host that was killed: again.

        The head alone has CPUs, so that an actor that asks for any is placed there; others are placed by `labels` (and
        `host`: the host's name). One host at a time: together they take longer than Ray waits. Raises `NotReady`.
        """
        host = self.hosts[number]
        said = {"host": host.name, **(labels or {})}
        where = [f"--address={self.ray_address}", "--num-cpus=0"]
        if number == 0:
            where = ["--head", f"--port={RAY_PORT}", f"--num-cpus={HEAD_CPUS}", "--include-dashboard=false"]
            where += ["--dashboard-host=127.0.0.1", f"--temp-dir={self.directory}"]
        command = [*_RAY, "start", *where, f"--node-ip-address={host.address}", "--disable-usage-stats"]
        command += [f"--object-store-memory={OBJECT_STORE_BYTES}"]
        command += ["--labels=" + ",".join(f"{key}={value}" for key, value in said.items())]
        with host.inside(), tempfile.TemporaryFile() as out:
            # Not to a pipe: those that stay would hold it open.
            started = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=self._environment
            )
            try:
                status: int | str = started.wait(RAY_START_S)
            except subprocess.TimeoutExpired:
                started.kill()
                started.wait()
                status = f"after {RAY_START_S:g} s"
            out.seek(0)
            if status != 0:
                raise NotReady(f"Ray did not start on {host.name} ({status}): {_last_words(out.read())}")

    def kill(self, number: int) -> int:
        """kill -9 of every process of a host; how many that were."""
        return kill_members(self.hosts[number].netns)

    @contextmanager
    def serving(self, model: Path, settings: Mapping[str, str]) -> Iterator[Server]:
        """Serve `model` from the first host on the cluster, stopped on leaving; `settings`: environment variables.

        Raises `NotReady` with what the server said where it does not come up.
        """
        started = time.monotonic()
        command = [*MOE_RAY, "serve", "--model", str(model), "--address", self.ray_address, "--port", str(HTTP_PORT)]
        with tempfile.TemporaryFile() as out:
            with self.hosts[0].inside():
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    env={**self._environment, **settings},
                )
            try:
                url = f"http://127.0.0.1:{HTTP_PORT}"
                if not self._ready(process, url):
                    state = process.poll()
                    ended = "is not ready" if state is None else f"ended with status {state}"
                    out.seek(0)
                    raise NotReady(f"the server {ended}: {_last_words(out.read())}")
                yield Server(url, time.monotonic() - started)
            finally:
                process.send_signal(signal.SIGINT)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(STOP_S)
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def _ready(self, process: subprocess.Popen[bytes], url: str) -> bool:
        deadline = time.monotonic() + SERVE_START_S
        while time.monotonic() < deadline and process.poll() is None:
            with suppress(httpx.HTTPError), self.hosts[0].inside():
                if httpx.get(f"{url}/health", timeout=5, trust_env=False).status_code == 200:
                    return True
            time.sleep(0.25)
        return False


@contextmanager
def hosts(count: int, cache_dir: Path) -> Iterator[Hosts]:
    """Hosts 10.77.0.1 to 10.77.0.`count` on a switch that is as fast as this machine, without a Ray yet.

    On leaving, however that comes, all their processes and files are gone. Main thread only: meanwhile SIGTERM is what
    Ctrl-C is. Raises `ConfigError` naming what this machine lacks.
    """
    check_machine()
    with ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():
            before = signal.signal(signal.SIGTERM, signal.default_int_handler)
            stack.callback(signal.signal, signal.SIGTERM, before)
        # A short path: Ray's Unix sockets lie below it, and such a path has at most 107 bytes.
        directory = Path(tempfile.mkdtemp(prefix="moe-"))
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        switch = stack.enter_context(SwitchProcess(cache_dir, count, NETWORK))
        made = [NetworkHost(i, switch.addresses[i], switch.netns[i]) for i in range(count)]
        for host in made:
            _configure(host)
        token = {"RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_TMPDIR": str(directory)}
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        yield Hosts(made, switch, directory, {**environment, **_RAY_SETTINGS, **token})


def check_machine() -> None:
    """Raise `ConfigError` naming what network namespaces need here and is not there."""
    lacking = []
    if sys.platform != "linux":
        lacking.append("Linux")
    elif os.geteuid() != 0:
        lacking.append("root (CAP_NET_ADMIN and CAP_SYS_ADMIN)")
    if shutil.which("ip") is None:
        lacking.append("the command `ip` (package iproute2)")
    if not Path("/dev/net/tun").exists():
        lacking.append("the device /dev/net/tun (modprobe tun)")
    if lacking:
        raise ConfigError(f"hosts on one machine are network namespaces; this machine lacks {', '.join(lacking)}")


def echo(host: NetworkHost) -> int:
    """Send back what connections to a port of `host` send, from threads of this process; the port."""
    with host.inside():
        listener = socket.create_server((host.address, 0))

    def serve(connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with connection, suppress(OSError):
            while data := connection.recv(2**20):
                connection.sendall(data)

    def accept() -> None:
        while True:
            threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, name="echo", daemon=True).start()
    port: int = listener.getsockname()[1]
    return port


def ping_pong(address: tuple[str, int], count: int) -> list[float]:
    """Microseconds of each of `count` round trips of 64 bytes to an echo; connect from where this thread is."""
    times = []
    with socket.create_connection(address) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(count + WARM_UP):
            began = time.perf_counter()
            sock.sendall(bytes(64))
            sock.recv(64, socket.MSG_WAITALL)
            times.append(1e6 * (time.perf_counter() - began))
    return times[WARM_UP:]


def _configure(host: NetworkHost) -> None:
    batch = [
        "link set lo up",
        f"addr add {host.address}/24 dev {DEVICE}",
        f"link set {DEVICE} mtu {MTU} up",
        f"route add default dev {DEVICE}",  # Ray asks which address leads to the world
    ]
    with host.inside():
        done = subprocess.run(
            ["ip", "-batch", "-"], input="\n".join(batch), capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise ConfigError(f"cannot configure {host.name} with `ip`: {done.stderr.strip()}")
        for name in ("tcp_rmem", "tcp_wmem"):
            Path("/proc/sys/net/ipv4", name).write_text(_TCP_BYTES, encoding="ascii")


def _enter(namespace: int) -> None:
    if ctypes.CDLL(None, use_errno=True).setns(namespace, _CLONE_NEWNET):
        error = ctypes.get_errno()
        raise ConfigError(f"cannot enter a network namespace: {os.strerror(error)}")


def _last_words(said: bytes) -> str:
    return " | ".join(said.decode(errors="replace").strip().splitlines()[-5:])
