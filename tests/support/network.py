"""The programs that simulate several hosts on this machine. support/hosts.py starts them.

    network.py switch FOLDER COUNT    makes the network and the hosts, and obeys its stdin
    network.py host FOLDER NAME       is the first process of a host, and runs commands on request
    network.py console FOLDER NAME COMMAND...    runs a command, in the caller's environment
    network.py ssh FOLDER [-OPTION...] NAME COMMAND...    does so as ssh does, as at a login

A host is a set of namespaces (network, processes, shared memory, host name, mounts) within those of
the switch; nothing is changed outside. The kernel ends all processes of a PID namespace when the
first one ends, and the switch ends when its stdin is closed. So nothing outlives the tests, even if
they are killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections import deque
from pathlib import Path

PYTHON = [sys.executable, "-S", "-B"]
NAMESPACES = [
    "unshare",
    "--net",
    "--uts",
    "--ipc",
    "--mount",
    "--pid",
    "--fork",
    "--kill-child",
    "--mount-proc",
]
NETWORK = "10.77.0."
# linux/if_packet.h, linux/if_ether.h
_SOL_PACKET, _VNET_HDR, _IGNORE_OUTGOING, _ALL_PROTOCOLS = 263, 15, 23, 3
_HEADER = 10  # bytes of a virtio_net_hdr, which tells what checksums and segments are still to be made
# The environment of a login, without TMPDIR, which home() sets: all hosts share /tmp, and names of
# files there may contain process ids, which are not unique among hosts.
LOGIN = {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "USER": "root", "SHELL": "/bin/sh"}


def switch(folder: Path, count: int) -> None:
    names = [f"h{number}" for number in range(1, count + 1)]
    lines = ["127.0.0.1 localhost", *(f"{NETWORK}{number} {name}" for number, name in enumerate(names, 1))]
    (folder / "hosts").write_text("\n".join(lines) + "\n")
    hosts = {}
    try:
        sh("ip link add br0 type bridge && ip link set br0 up")
        for name in names:
            command = [*NAMESPACES, *PYTHON, __file__, "host", str(folder), name]
            hosts[name] = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr)
        for number, (name, host) in enumerate(hosts.items(), 1):
            while not (folder / name).exists():  # its namespaces are there, and it listens
                if host.poll() is not None:
                    raise SystemExit(1)  # it has printed why
                time.sleep(0.005)
            sh(
                f"ip link add {name} type veth peer name eth0 netns {host.pid}"
                f" && ip link set {name} master br0 up"
            )
            up = f"ip link set lo up && ip addr add {NETWORK}{number}/24 dev eth0 && ip link set eth0 up"
            if ask(folder, name, ["sh", "-c", up], dict(os.environ)) != 0:
                raise SystemExit(1)
        print("done", flush=True)
        for line in sys.stdin:
            action, *arguments = line.split()
            if action == "delay":
                slow = SlowSwitch(names, float(arguments[0]))
                threading.Thread(target=slow.forward, daemon=True).start()
            else:
                obey(folder, hosts, action, *arguments)
            print("done", flush=True)
    finally:
        for host in hosts.values():
            host.kill()
            host.wait()
        shutil.rmtree(folder, ignore_errors=True)


def obey(
    folder: Path, hosts: dict[str, subprocess.Popen[bytes]], action: str, name: str, rate: str = ""
) -> None:
    unplugged = folder / f"{name}.unplugged"
    if action == "limit":  # towards the host; it holds both ways, as hosts.py limits all hosts
        sh(f"tc qdisc replace dev {name} root tbf rate {rate} burst 32kb latency 50ms")
    elif action == "heal":
        sh(f"ip link set {name} up")
        unplugged.unlink()
    elif action in ("cut", "crash"):
        unplugged.touch()
        sh(f"ip link set {name} down")
        if action == "crash":
            hosts[name].kill()
            hosts[name].wait()


def sh(command: str) -> None:
    subprocess.run(["sh", "-c", command], check=True, stdin=subprocess.DEVNULL)


def host(folder: Path, name: str) -> None:
    socket.sethostname(name)
    boot = folder / f"{name}.boot_id"
    boot.write_text(f"{uuid.uuid4()}\n")
    sh(
        f"mount -t tmpfs shm /dev/shm && mount --bind {folder}/hosts /etc/hosts"
        f" && mount --bind {boot} /proc/sys/kernel/random/boot_id"
    )
    (folder / f"{name}.tmp").mkdir()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # so that the kernel reaps orphans here
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(f"{folder}/{name}.new")
    listener.listen(50)
    os.rename(f"{folder}/{name}.new", f"{folder}/{name}")
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            order, files, *_ = socket.recv_fds(connection, 1 << 17, 3)
            stdin, stdout, stderr = files
            status = subprocess.call(**json.loads(order), stdin=stdin, stdout=stdout, stderr=stderr)
            connection.sendall(str(status).encode())
            os._exit(0)
        connection.close()


def ask(folder: Path, name: str, command: list[str], variables: dict[str, str], cwd: str = "/") -> int | None:
    """Run a command on a host, and return its status; None if the host dies meanwhile."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(f"{folder}/{name}")
        order = json.dumps({"args": command, "env": variables, "cwd": cwd}).encode()
        socket.send_fds(connection, [order], [0, 1, 2])
        with contextlib.suppress(ConnectionError):
            answer = connection.recv(100)
            return int(answer) if answer else None
    return None


def console(folder: Path, name: str, *command: str) -> int:
    status = ask(folder, name, list(command), {**os.environ, **home(folder, name)}, os.getcwd())
    return 255 if status is None else 128 - status if status < 0 else status


def ssh(folder: Path, *arguments: str) -> int:
    """Run a command on a host as ssh does, and return its status.

    The caller's environment is dropped. While the host is disconnected, the call waits.
    """
    name, *command = [each for number, each in enumerate(arguments) if not _is_option(arguments, number)]
    name = name.replace(NETWORK, "h")
    wait_for_cable(folder, name)
    status = ask(folder, name, ["/bin/sh", "-c", " ".join(command)], {**LOGIN, **home(folder, name)})
    wait_for_cable(folder, name)
    return 255 if status is None else 128 - status if status < 0 else status


def _is_option(arguments: tuple[str, ...], number: int) -> bool:
    return all(each.startswith("-") for each in arguments[: number + 1])


def wait_for_cable(folder: Path, name: str) -> None:
    while (folder / f"{name}.unplugged").exists():
        time.sleep(0.1)


def home(folder: Path, name: str) -> dict[str, str]:
    return {"HOME": os.environ.get("HOME", "/"), "TMPDIR": f"{folder}/{name}.tmp"}


class SlowSwitch:
    """A network switch that delays every frame. Not every kernel has netem, which could do it.

    It takes the place of the bridge br0 between ``ports``, network devices of this namespace.
    """

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
        """Forward frames for ever, in order."""
        ports = list(self._ports.values())
        at: dict[bytes, socket.socket] = {}  # the port at which each address was last seen
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


if __name__ == "__main__":
    role, folder, *rest = sys.argv[1:]
    if role == "switch":
        switch(Path(folder), int(rest[0]))
    else:
        sys.exit({"host": host, "console": console, "ssh": ssh}[role](Path(folder), *rest))
