"""What a kind of link is made of: how its sockets are opened, and what is made of each."""

import socket
from typing import Protocol

from duetto.cluster.links.carriers import Carrier
from duetto.cluster.links.channel import LinkChannel


class Medium(Protocol):
    """TCP, or memory that two processes share. Sockets have a timeout while hands are shaken."""

    @property
    def num_carriers(self) -> int:
        """Of the links that this side calls for."""
        ...

    def listen(self) -> tuple[socket.socket, str]:
        """A socket that listens, and the address by which others call it. Raises ConfigError."""
        ...

    def tidy(self) -> None:
        """What `listen` made in the file system, away."""
        ...

    def connect(self, timeout_s: float) -> socket.socket:
        """Raises LinkLost, or OSError."""
        ...

    def accepted(self, wire: socket.socket) -> socket.socket:
        """Of one that has called: as it is to be used. Raises LinkLost, or OSError."""
        ...

    def channel(self, wire: socket.socket) -> LinkChannel: ...

    def carrier(self, wire: socket.socket, dead_after_s: float) -> Carrier:
        """Raises LinkLost, or OSError."""
        ...
