"""Simulate several hosts on this machine, for MPI jobs over TCP. network.py has their programs."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType

from open_mpi import OVERSUBSCRIBED, SETTINGS
from support.jobs import unlaunched
from support.libraries import Library
from support.network import NAMESPACES, PYTHON

_NETWORK = str(Path(__file__).parent / "network.py")
_USER = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
_AGENT = """\
#!/bin/sh
# In place of ssh.
exec {python} {network} ssh {folder} "$@"
"""
# Variables that make an MPI library use TCP, because these hosts have no other network.
_TCP = {
    "openmpi": {},
    "mpich": {"FI_PROVIDER": "tcp"},
    "impi": {"I_MPI_FABRICS": "shm:ofi", "FI_PROVIDER": "tcp"},
}


def why_not() -> str:
    """Return why this machine cannot simulate hosts, or "" if it can."""
    missing = [name for name in ("unshare", "mount", "ip", "tc") if shutil.which(name, path=_path()) is None]
    if missing:
        return f"no {' and no '.join(missing)} (Debian, Ubuntu: apt install util-linux iproute2)"
    try:
        with Hosts(1):
            return ""
    except RuntimeError as error:
        return str(error)


class Hosts:
    """Hosts h1, h2, ... with a network of their own. They share nothing but files."""

    def __init__(self, count: int) -> None:
        self.names = [f"h{number}" for number in range(1, count + 1)]

    def __enter__(self) -> Hosts:
        self.folder = Path(tempfile.mkdtemp(prefix="mpisyncbn-hosts-"))
        python = " ".join(PYTHON)
        self.agent = self.folder / "agent"
        self.agent.write_text(_AGENT.format(python=python, network=_NETWORK, folder=self.folder))
        self.agent.chmod(0o755)
        self._log = (self.folder / "log").open("w+")
        self._switch = subprocess.Popen(
            [
                NAMESPACES[0],
                *_USER,
                *NAMESPACES[1:],
                *PYTHON,
                _NETWORK,
                "switch",
                self.folder,
                str(len(self.names)),
            ],
            env={**os.environ, "PATH": _path()},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,  # Ctrl-C reaches the tests alone, which close its stdin
        )
        try:
            self._wait("no hosts can be made")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End all processes of the hosts, and remove the folder."""
        self._switch.stdin.close()
        try:
            self._switch.wait(10)
        except subprocess.TimeoutExpired:
            self._switch.kill()
            self._switch.wait()
        self._switch.stdout.close()
        self._log.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def cut(self, name: str) -> None:
        """Disconnect a host from the network."""
        self._order("cut", name)

    def heal(self, name: str) -> None:
        """Connect a host again that ``cut`` has disconnected."""
        self._order("heal", name)

    def crash(self, name: str) -> None:
        """Power a host off: disconnect it, and kill all its processes."""
        self._order("crash", name)

    def limit(self, rate: str) -> None:
        """Limit the rate of the network, for example to "100mbit"."""
        for name in self.names:
            self._order("limit", name, rate)

    def delay(self, seconds: float) -> None:
        """Delay all data on the network, one way. A host that was cut before stays disconnected."""
        self._order("delay", str(seconds))

    def command(self, name: str, *command: str | Path) -> list[str]:
        """The command line that runs a command on a host, in this environment and folder."""
        return [*PYTHON, _NETWORK, "console", str(self.folder), name, *map(str, command)]

    def run(self, name: str, *command: str | Path) -> str:
        return subprocess.run(
            self.command(name, *command),
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            timeout=30,
        ).stdout

    def count(self, name: str, *command: str | Path) -> int:
        """The number of processes on a host whose command line begins with this command."""
        show = "for each in /proc/[0-9]*/cmdline; do tr '\\0' ' ' <$each; echo; done 2>/dev/null"
        wanted = " ".join(map(str, command))
        return sum(line.startswith(wanted) for line in self.run(name, "sh", "-c", show).splitlines())

    def received(self, name: str) -> int:
        """The number of bytes that a host has received from the network."""
        lines = self.run(name, "cat", "/proc/net/dev").splitlines()
        (line,) = (line for line in lines if line.split()[0] == "eth0:")
        return int(line.split()[1])

    def mpiexec(
        self, library: Library, ranks: int, *command: str | Path, **variables: str
    ) -> tuple[list[str], dict[str, str]]:
        """The command that starts ``ranks`` ranks, as many on each host, and its environment."""
        each, rest = divmod(ranks, len(self.names))
        if rest:
            raise ValueError(f"expected a multiple of {len(self.names)} ranks, got {ranks}")
        variables = SETTINGS | OVERSUBSCRIBED | library.variables | _TCP[library.name] | variables
        if library.name == "openmpi":
            major = int(library.title.split()[-1].split(".")[0])
            agent = ["--prtemca", "plm_ssh_agent"] if major >= 5 else ["--mca", "plm_rsh_agent"]
            where = ["--host", ",".join(f"{name}:{each}" for name in self.names), "--bind-to", "none"]
            for key in variables:  # other libraries give every host the whole environment
                where += ["-x", key]
        else:
            agent = ["-launcher", "ssh", "-launcher-exec"]
            where = ["-hosts", ",".join(self.names), "-ppn", str(each)]
        start = [library.mpiexec, *agent, str(self.agent), *where, "-n", str(ranks)]
        return self.command(self.names[0], *start, *command), unlaunched() | variables

    def _order(self, *words: str) -> None:
        self._switch.stdin.write(" ".join(words) + "\n")
        self._switch.stdin.flush()
        self._wait(f"cannot {' '.join(words)}")

    def _wait(self, problem: str) -> None:
        if self._switch.stdout.readline() != "done\n":
            self._log.seek(0)
            lines = self._log.read().strip().splitlines() or ["no word about it"]
            raise RuntimeError(f"{problem}: {lines[0]}")


def _path() -> str:
    """PATH, with the folders of programs for administrators added."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
