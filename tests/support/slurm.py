"""A Slurm of one's own: munged, slurmctld and a slurmd for each node, all of them on this host.

They write to one temporary folder and use nothing of /etc/slurm or /etc/munge, so any user may
start them. More than one node takes root, since each needs a host name and shared memory of its
own, or MPI would take them for one.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from support import jobs

_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
ReturnToService=2
KillWait=5
# Slurm starts a job when it looks at the queue after its StartTime, by default once a minute.
SchedulerParameters=batch_sched_delay=0,sched_min_interval=2,sched_interval=2
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=60 State=UP
"""
# $0, a host, with names for all in file $1.
_HOST = """
hostname "$0"
mount -t tmpfs shm /dev/shm
mount --bind "$1" /etc/hosts
shift
exec "$@"
"""
_DAEMONS = ("munged", "slurmctld", "slurmd")
_CLIENTS = ("sbatch", "scancel", "scontrol", "srun")
_OVER = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT")
# PMIx, with components that old and new clients have in common.
_PMIX = {"PMIX_MCA_gds": "hash", "PMIX_MCA_psec": "native"}


class Slurm:
    """A cluster of one node, by the host's name, or of n1, n2 and so on."""

    def __init__(self, folder: Path, nodes: int) -> None:
        self.folder = folder
        path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"
        own = {"PATH": path, "SLURM_CONF": f"{folder}/slurm.conf", jobs.MARK: str(folder)}
        self.environment = jobs.for_jobs(oversubscribe=False) | own
        self.host = socket.gethostname().split(".")[0]
        self.nodes = [self.host] if nodes == 1 else [f"n{index + 1}" for index in range(nodes)]
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._started = ExitStack()

    def start(self) -> None:
        """Skips the test with the last words of what does not start."""
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        port, *ports = _free_ports(1 + len(self.nodes))
        nodes = [
            f"NodeName={node} NodeAddr=127.0.0.1 Port={port} CPUs=8 State=UNKNOWN"
            for node, port in zip(self.nodes, ports, strict=True)
        ]
        user = _output(["id", "-un"], self.environment)
        values = {"host": self.host, "port": port, "user": user, "nodes": "\n".join(nodes)}
        (self.folder / "slurm.conf").write_text(_CONF.format(folder=self.folder, **values))
        # Each node has one for itself.
        (self.folder / "mpi.conf").write_text("PMIxCliTmpDirBase=/dev/shm\n")
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost {' '.join({self.host, *self.nodes})}\n")

        files = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munged.pid"}
        files |= {"log-file": "munged.log", "seed-file": "munge.seed"}
        options = [f"--{option}={self.folder}/{file}" for option, file in files.items()]
        self._daemon("munged", "--foreground", "--force", "--num-threads=2", *options)
        self._wait_for(lambda: (self.folder / "munge.socket").exists(), "munged")
        self._daemon("slurmctld", "-D")
        for node in self.nodes:
            (self.folder / f"spool.{node}").mkdir()
            self._daemon("slurmd", "-D", "-N", node, host=None if len(self.nodes) == 1 else node)
        # sinfo calls a node idle before its slurmd has spoken.
        self._wait_for(lambda: self._registered() == len(self.nodes), "slurmctld", "slurmd")

    def stop(self) -> None:
        if len(self._daemons) > 1:
            with suppress(subprocess.SubprocessError):
                self.run("scancel", "--user", str(os.getuid()), "--signal=KILL", "--full", limit=5)
        self._started.close()
        jobs.end_all(self.folder)

    def run(self, *command: str, limit: float = 30, **variables: str) -> str:
        """Return what a command of Slurm prints. Raises CalledProcessError, with its output."""
        return _output([*command], {**self.environment, **variables}, limit)

    def submit(self, *arguments: str, **variables: str) -> int:
        """The number of a batch job."""
        return int(self.run("sbatch", "--parsable", *arguments, **variables).split(";")[0])

    def need(self, launcher: str, nodes: int = 1) -> None:
        """Skips the test where srun lacks what this launcher takes, or there are too few nodes."""
        if nodes > len(self.nodes):
            pytest.skip("two nodes on one host take root")
        if launcher.startswith("srun"):
            try:
                self.run(*launcher.split(), "true")
            except subprocess.CalledProcessError as error:
                pytest.skip(f"{launcher}: {' '.join(error.stderr.splitlines()[:1])}")

    def show(self, job: int | str) -> dict[str, str]:
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "-o", "show", "job", str(job))))

    def steps(self, job: int) -> int:
        """How many of a job's still end; if it started again before, it would trip over its own."""
        done = subprocess.run(["pgrep", "-fc", rf"^slurmstepd: \[{job}\."], stdout=subprocess.PIPE, text=True)
        return int(done.stdout)

    def wait(self, job: int | str, limit: float, *states: str) -> dict[str, str]:
        """What ``scontrol`` shows of a job once it is in one of ``states``, or over.

        Raises TimeoutError after ``limit`` seconds, with what was shown last, and ends the job.
        """
        deadline = time.monotonic() + limit
        while (shown := self.show(job))["JobState"] not in (*states, *_OVER):
            if time.monotonic() > deadline:
                self.run("scancel", str(job))
                raise TimeoutError(f"job {job} is not over in {limit:g} s: {shown}")
            time.sleep(0.1)
        return shown

    def _daemon(self, name: str, *arguments: str, host: str | None = None) -> None:
        # Whoever kills the tests, these end.
        before = ["setpriv", "--pdeathsig=KILL"] if shutil.which("setpriv") else []
        if host is not None:
            before += ["unshare", "--uts", "--mount", "sh", "-ec", _HOST, host, f"{self.folder}/hosts"]
        home = self.folder / f"{name}.{host or self.host}"
        home.mkdir()
        command = [*before, _find(name), *arguments]
        start = jobs.started(command, home, {**self.environment, **_PMIX})
        self._daemons.append(self._started.enter_context(start))

    def _registered(self) -> int:
        with suppress(subprocess.SubprocessError):
            return self.run("scontrol", "-o", "show", "nodes", limit=5).count(" Version=")
        return 0

    def _wait_for(self, ready: Callable[[], bool], *names: str, limit: float = 15) -> None:
        deadline = time.monotonic() + limit
        while not ready():
            if time.monotonic() > deadline or any(daemon.poll() is not None for daemon in self._daemons):
                logs = [log for name in names for log in self.folder.glob(f"{name}.*/stderr")]
                logs += [self.folder / "munged.log"]
                said = [line for log in logs if log.exists() for line in log.read_text().splitlines()[-2:]]
                pytest.skip(f"{' and '.join(names)} did not start: {' | '.join(said)}")
            time.sleep(0.05)


@contextmanager
def slurm(nodes: int) -> Iterator[Slurm]:
    """A cluster. Skips the test where Slurm is not installed, or this user may not start it."""
    if missing := [name for name in (*_DAEMONS, *_CLIENTS) if not _find(name)]:
        pytest.skip(f"no {', '.join(missing)} (Debian, Ubuntu: apt install slurm-wlm munge)")
    # Not in TMPDIR: a socket's path is 107 bytes long at most.
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        os.chmod(folder, 0o755)  # munged and Slurm want others to be able to look
        cluster = Slurm(Path(folder), nodes)
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


def _find(name: str) -> str:
    """A user's PATH need not have the folders of daemons."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin") or ""


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _output(command: list[str], environment: Mapping[str, str], limit: float = 30) -> str:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit)
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
    return done.stdout.strip()
