"""A network between processes of this machine that loses, delays, reorders and cuts.

Each host is a network namespace with a TUN device, but host 0, which is this process; a thread here
carries the packets X, `ip` and /dev/net/tun: `why_unavailable` says what is missing.
"""

import fcntl
import heapq
import os
import random
import select
import shutil
import struct
import subprocess
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
_MAX_PACKET = 65536


@dataclass(frozen=True, slots=True)
class Weather:
    """What happens to a packet on its way from one host to another."""

    loss: float = 0.0  # of packets
    delay_s: float = 0.0
    jitter_s: float = 0.0  # more than `delay_s`, uniformly: packets overtake one another
    is_cut: bool = False  # nothing arrives; a cut in one direction alone is a half-open link


FINE = Weather()


def why_unavailable() -> str | None:
    """What this machine lacks for a `Network`; None if nothing."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "there is no `ip` (iproute2)"
    if not Path("/dev/net/tun").exists():
        return "there is no /dev/net/tun"
    made = subprocess.run(["ip", "netns", "add", f"probe-{os.getpid()}"], capture_output=True)
    if made.returncode:
        return f"ip netns add: {made.stderr.decode().strip()}"
    subprocess.run(["ip", "netns", "delete", f"probe-{os.getpid()}"], check=True)
    return None


class Network:
    """Some hosts, each reachable from the others. A context manager: leaving it removes them."""

    def __init__(self, num_hosts: int, seed: int = 0) -> None:
        self._names = ["", *(f"duetto-{os.getpid()}-{i}" for i in range(1, num_hosts))]
        self._random = random.Random(seed)
        self._weather: dict[tuple[int, int], Weather] = {}
        self._devices: list[int] = []
        self._is_over = False
        self._due: list[tuple[float, int, int, bytes]] = []  # when, number, to whom, a packet
        self._num_packets = 0
        self._thread = threading.Thread(target=self._carry, name="network", daemon=True)

    def address(self, host: int) -> str:
        return f"10.{100 + os.getpid() % 100}.0.{host + 1}"

    def command(self, host: int, argv: Sequence[str]) -> list[str]:
        """To run `argv` on a host."""
        if not host:
            return list(argv)
        return ["ip", "netns", "exec", self._names[host], *argv]

    def set(self, weather: Weather, source: int, target: int) -> None:
        """Of one direction; `FINE` ends it."""
        self._weather[source, target] = weather

    def clear(self) -> None:
        self._weather.clear()

    def __enter__(self) -> "Network":
        try:
            for host, name in enumerate(self._names):
                self._add(host, name)
        except BaseException:
            self.__exit__()
            raise
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over = True
        if self._thread.is_alive():
            self._thread.join()
        for device in self._devices:
            os.close(device)
        for name in self._names[1:]:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)

    def _add(self, host: int, name: str) -> None:
        if host:
            _ip("netns", "add", name)
        device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        self._devices.append(device)
        label = f"dt{os.getpid() % 100000}-{host}"
        wish = struct.pack("16sH22x", label.encode(), _IFF_TUN | _IFF_NO_PI)
        fcntl.ioctl(device, _TUNSETIFF, wish)
        inside = ("-n", name) if host else ()
        if host:
            _ip("link", "set", label, "netns", name)  # packets still come here
        for words in (
            ("link", "set", "lo", "up"),
            ("address", "add", f"{self.address(host)}/24", "dev", label),
            ("link", "set", label, "mtu", "9000", "up"),
        ):
            _ip(*inside, *words)

    def _carry(self) -> None:
        while not self._is_over:
            wait = 0.05
            if self._due:
                wait = min(wait, max(0.0, self._due[0][0] - time.monotonic()))
            ready, _, _ = select.select(self._devices, [], [], wait)
            for device in ready:
                self._take(self._devices.index(device))
            while self._due and self._due[0][0] <= time.monotonic():
                _, _, target, packet = heapq.heappop(self._due)
                _put(self._devices[target], packet)

    def _take(self, source: int) -> None:
        for _ in range(64):
            try:
                packet = os.read(self._devices[source], _MAX_PACKET)
            except OSError:
                return
            if len(packet) < 20 or packet[0] >> 4 != 4:
                continue
            target = packet[19] - 1
            if not 0 <= target < len(self._devices) or target == source:
                continue
            weather = self._weather.get((source, target), FINE)
            if weather.is_cut or self._random.random() < weather.loss:
                continue
            delay = weather.delay_s + weather.jitter_s * self._random.random()
            if not delay:
                _put(self._devices[target], packet)
                continue
            self._num_packets += 1
            heapq.heappush(self._due, (time.monotonic() + delay, self._num_packets, target, packet))


def _put(device: int, packet: bytes) -> None:
    with suppress(OSError):  # its queue is full, or it is down: lost, as on any network
        os.write(device, packet)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
