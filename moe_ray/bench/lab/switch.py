"""A process that joins network namespaces by a switch with the latency and bandwidth one asks for. See switch.cpp.

`SwitchProcess` starts it; `python -m moe_ray.bench.lab.switch` is it: one JSON object a line in, one a line out. The
namespaces are nobody else's and have no names: with the process, and those inside them, they are gone.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from ctypes import c_char_p, c_double, c_int, c_int64, c_uint32, c_uint64, c_void_p
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Self

from moe_ray.errors import ConfigError, KernelsUnavailable
from moe_ray.native.build import Library, declare, shared_library

SWITCH: Final = Library("switch", Path(__file__).parent, ("switch.cpp",))
DEVICE: Final = "net0"
QUEUE_BYTES: Final = 8 * 2**20
"""What may wait at a port before packets are dropped: as in a switch with a few ports."""
MAX_HOSTS: Final = 64
STOP_TIMEOUT_S: Final = 10.0
_SIGNATURES: Final = {
    "switch_new": (c_void_p, (c_uint32, c_uint64)),
    "switch_free": (None, (c_void_p,)),
    "switch_add": (c_int, (c_void_p, c_char_p)),
    "switch_netns": (c_int, (c_void_p, c_int)),
    "switch_run": (None, (c_void_p,)),
    "switch_stop": (None, (c_void_p,)),
    "switch_cut": (None, (c_void_p, c_int, c_int)),
    "switch_shape": (None, (c_void_p, c_int, c_int, c_int64, c_double)),
    "switch_counters": (None, (c_void_p, c_int, c_int, c_void_p)),
}


@dataclass(frozen=True, slots=True)
class LinkShape:
    """What lies between two hosts, in each direction."""

    latency_ms: float = 0.0
    """One way."""
    gbit: float | None = None
    """Bandwidth of the ports at both ends; None: what this machine can."""

    def __post_init__(self) -> None:
        if self.latency_ms < 0 or (self.gbit is not None and self.gbit <= 0):
            raise ConfigError(f"a network needs a latency from 0 ms and a bandwidth above 0 Gbit/s, not {self}")

    @property
    def latency_ns(self) -> int:
        return round(1e6 * self.latency_ms)

    @property
    def ns_per_byte(self) -> float:
        """How long a byte takes to pass a port."""
        return 0.0 if self.gbit is None else 8 / self.gbit


@dataclass(frozen=True, slots=True)
class Traffic:
    """What went from one host to another since the switch was started."""

    packets: int = 0
    bytes: int = 0
    dropped: int = 0
    """Packets for which a queue had no room."""
    cut: int = 0
    """Packets to or from a host that was cut off."""

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.packets + other.packets, self.bytes + other.bytes, self.dropped + other.dropped, self.cut + other.cut
        )

    def __sub__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.packets - other.packets, self.bytes - other.bytes, self.dropped - other.dropped, self.cut - other.cut
        )


class SwitchProcess:
    """The switch and its namespaces, from another process. One thread at a time."""

    def __init__(self, cache_dir: Path, hosts: int, network: str) -> None:
        """Start it with `hosts` hosts; host i has the address `network` + 1 + i (an IPv4 address ending in 0).

        Its devices are made but not configured. Raises `ConfigError` where the machine cannot.
        """
        if not 1 <= hosts <= MAX_HOSTS:
            raise ConfigError(f"a switch joins 1 to {MAX_HOSTS} hosts, not {hosts}")
        base = ipaddress.IPv4Address(network)
        self.addresses = [str(base + 1 + i) for i in range(hosts)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "moe_ray.bench.lab.switch", str(cache_dir), str(hosts), network],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for who started it and takes down in order what needs the switch
        )
        try:
            self.netns: list[str] = self._answer()["netns"]
        except BaseException:
            self.close()
            raise

    def shape(self, shape: LinkShape, between: tuple[int, int] | None = None) -> None:
        """From now on packets take `shape`, in both directions; `between`: those of two hosts, default: all."""
        self._ask(command="shape", latency_ns=shape.latency_ns, ns_per_byte=shape.ns_per_byte, between=between)

    def cut(self, host: int) -> None:
        """Swallow every packet from and to a host, those under way included: nobody is told."""
        self._ask(command="cut", host=host, cut=True)

    def heal(self, host: int) -> None:
        """Undo `cut`."""
        self._ask(command="cut", host=host, cut=False)

    def traffic(self) -> dict[tuple[int, int], Traffic]:
        """By (from, to)."""
        return {(f, t): Traffic(*counters) for f, t, *counters in self._ask(command="traffic")["traffic"]}

    def close(self) -> None:
        """End the process; it kills whoever is left in the namespaces. Idempotent."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _ask(self, **command: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError):
            raise ConfigError("the switch is gone") from None
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ConfigError(f"the switch ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ConfigError(answer["error"])
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def members(netns: str) -> list[int]:
    """The processes that live in a namespace (a path), this one left out."""
    wanted, found = os.stat(netns), []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            with contextlib.suppress(OSError):
                theirs = os.stat(f"/proc/{entry}/ns/net")
                if (theirs.st_dev, theirs.st_ino) == (wanted.st_dev, wanted.st_ino):
                    found.append(int(entry))
    return found


def kill_members(netns: str) -> int:
    """kill -9 of everybody in a namespace, until nobody is left; how many that were."""
    killed: set[int] = set()
    for _ in range(100):  # who was just being forked is in the next list
        pids = members(netns)
        if not pids:
            break
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
        threading.Event().wait(0.02)
    return len(killed)


class _Switch:
    """The library, in the process that is the switch."""

    def __init__(self, cache_dir: Path, hosts: int, network: str) -> None:
        self._library = declare(shared_library(SWITCH, cache_dir), _SIGNATURES)
        self._handle = self._library.switch_new(int(ipaddress.IPv4Address(network)), QUEUE_BYTES)
        self.hosts = hosts
        for _ in range(hosts):
            result = self._library.switch_add(self._handle, DEVICE.encode())
            if result < 0:
                raise ConfigError(_lacking(-result))
        # Through /proc: a thread's or child's own view of a namespace is not needed to enter it.
        fds = (self._library.switch_netns(self._handle, host) for host in range(hosts))
        self.netns = [f"/proc/{os.getpid()}/fd/{fd}" for fd in fds]
        self._thread = threading.Thread(target=self._library.switch_run, args=(self._handle,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._library.switch_stop(self._handle)
        self._thread.join()
        for netns in self.netns:
            kill_members(netns)
        self._library.switch_free(self._handle)

    def answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        match asked["command"]:
            case "shape":
                for one, other in self._pairs(asked["between"]):
                    self._library.switch_shape(self._handle, one, other, asked["latency_ns"], asked["ns_per_byte"])
            case "cut":
                self._library.switch_cut(self._handle, self._host(asked["host"]), asked["cut"])
            case "traffic":
                return {"traffic": [[*pair, *asdict(self._traffic(*pair)).values()] for pair in self._pairs(None)]}
        return {}

    def _pairs(self, between: list[int] | None) -> Iterator[tuple[int, int]]:
        hosts = range(self.hosts) if between is None else sorted(map(self._host, between))
        return ((one, other) for one in hosts for other in hosts if one != other)

    def _host(self, number: int) -> int:
        if not 0 <= number < self.hosts:
            raise ConfigError(f"the switch has hosts 0 to {self.hosts - 1}, not {number}")
        return number

    def _traffic(self, one: int, other: int) -> Traffic:
        counters = (c_uint64 * 4)()
        self._library.switch_counters(self._handle, one, other, counters)
        return Traffic(*counters)


def _lacking(error: int) -> str:
    if error == errno.EPERM:
        return "network namespaces need root (CAP_NET_ADMIN and CAP_SYS_ADMIN)"
    if error in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
        return "no /dev/net/tun on this machine: the switch needs it (modprobe tun)"
    if error in (errno.EACCES,):
        return "/dev/net/tun may not be opened: that needs root"
    return f"cannot make a network namespace with a TUN device: {os.strerror(error)}"


def main(cache_dir: str, hosts: str, network: str) -> None:
    """Be the switch until standard input ends, whose owner may have been killed."""
    try:
        switch = _Switch(Path(cache_dir), int(hosts), network)
    except (ConfigError, KernelsUnavailable) as error:
        print(json.dumps({"error": str(error)}), flush=True)
        return
    try:
        print(json.dumps({"netns": switch.netns}), flush=True)
        for line in sys.stdin:
            try:
                answer = switch.answer(json.loads(line))
            except ConfigError as error:
                answer = {"error": str(error)}
            print(json.dumps(answer), flush=True)
    finally:
        switch.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
