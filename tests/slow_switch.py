"""A network switch that holds every frame back for a while: the kernel's netem is not everywhere."""

from __future__ import annotations

import contextlib
import select
import socket
import subprocess
import time
from collections import deque

# linux/if_packet.h, linux/if_ether.h
_SOL_PACKET, _VNET_HDR, _IGNORE_OUTGOING, _ALL_PROTOCOLS = 263, 15, 23, 3
_HEADER = 10  # bytes of a virtio_net_hdr: frames keep the checksums and segments that are still to be made


class SlowSwitch:
    """Takes the place of the bridge br0 between ``ports``, network devices of this namespace."""

    def __init__(self, ports: list[str], delay: float) -> None:
        self._delay = delay  # seconds, one way
        self._ports: dict[str, socket.socket] = {}
        for port in ports:
            command = ["ip", "link", "set", port, "nomaster", "promisc", "on"]
            subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
            ear = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ALL_PROTOCOLS))
            ear.setsockopt(_SOL_PACKET, _IGNORE_OUTGOING, 1)
            ear.setsockopt(_SOL_PACKET, _VNET_HDR, 1)
            ear.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
            ear.bind((port, 0))
            ear.setblocking(False)
            self._ports[port] = ear

    def forward(self) -> None:
        """For ever; frames stay in order."""
        ports = list(self._ports.values())
        at: dict[bytes, socket.socket] = {}  # where an address was last seen
        queue: deque[tuple[float, bytes, socket.socket]] = deque()
        while True:
            wait = max(0.0, queue[0][0] - time.monotonic()) if queue else None
            for port in select.select(ports, [], [], wait)[0]:
                with contextlib.suppress(OSError):  # no more frames, or the cable is out
                    while True:
                        frame = port.recv(1 << 17)
                        at[frame[_HEADER + 6 : _HEADER + 12]] = port
                        queue.append((time.monotonic() + self._delay, frame, port))
            while queue and queue[0][0] <= time.monotonic():
                _, frame, port = queue.popleft()
                target = frame[_HEADER : _HEADER + 6]
                for other in [at[target]] if target in at else [each for each in ports if each is not port]:
                    with contextlib.suppress(OSError):
                        other.send(frame)
