"""A private Slurm cluster: munged, slurmctld and a slurmd for each node, all of them on this host.

They write to one temporary folder and use nothing of /etc/slurm or /etc/munge, so any user may
start them. More than one node requires root, because each needs a host name and shared memory of
its own: otherwise MPI would take them for one node.
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
# Runs a command with the host name $0, the file $1 as /etc/hosts, and its own /dev/shm.
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
# Components of PMIx that old and new clients have in common.
_PMIX = {"PMIX_MCA_gds": "hash", "PMIX_MCA_psec": "native"}


class Slurm:
    """A cluster of one node with this host's name, or of several nodes n1, n2 and so on."""

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
        """Start all daemons. If one fails, skip the test with the last lines of its log."""
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
        # /dev/shm, because each node has its own.
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
        # sinfo would show a node as idle before its slurmd has registered.
        self._wait_for(lambda: self._registered() == len(self.nodes), "slurmctld", "slurmd")

    def stop(self) -> None:
        if len(self._daemons) > 1:
            with suppress(subprocess.SubprocessError):
                self.run("scancel", "--user", str(os.getuid()), "--signal=KILL", "--full", limit=5)
        self._started.close()
        jobs.end_all(self.folder)

    def run(self, *command: str, limit: float = 30, **variables: str) -> str:
        """Return what a command of Slurm prints. If it fails, CalledProcessError has the output."""
        return _output([*command], {**self.environment, **variables}, limit)

    def submit(self, *arguments: str, **variables: str) -> int:
        """Submit a batch job, and return its number."""
        return int(self.run("sbatch", "--parsable", *arguments, **variables).split(";")[0])

    def need(self, launcher: str, nodes: int = 1) -> None:
        """Skip the test if srun does not support this launcher, or if there are too few nodes."""
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
        """The number of slurmstepd processes of a job. All must end before it starts again."""
        done = subprocess.run(["pgrep", "-fc", rf"^slurmstepd: \[{job}\."], stdout=subprocess.PIPE, text=True)
        return int(done.stdout)

    def wait(self, job: int | str, limit: float, *states: str) -> dict[str, str]:
        """Wait until a job is over or in one of ``states``; return what ``scontrol`` shows of it.

        After ``limit`` seconds, cancels the job and raises TimeoutError with what was shown last.
        """
        deadline = time.monotonic() + limit
        while (shown := self.show(job))["JobState"] not in (*states, *_OVER):
            if time.monotonic() > deadline:
                self.run("scancel", str(job))
                raise TimeoutError(f"job {job} is not over in {limit:g} s: {shown}")
            time.sleep(0.1)
        return shown

    def _daemon(self, name: str, *arguments: str, host: str | None = None) -> None:
        # The daemons end even if the tests are killed.
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
    """Start a cluster. Skip the test if Slurm is not installed or this user may not start it."""
    if missing := [name for name in (*_DAEMONS, *_CLIENTS) if not _find(name)]:
        pytest.skip(f"no {', '.join(missing)} (Debian, Ubuntu: apt install slurm-wlm munge)")
    # TMPDIR may be too long: the path of a socket has at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        os.chmod(folder, 0o755)  # munged and Slurm demand that others can read it
        cluster = Slurm(Path(folder), nodes)
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


def _find(name: str) -> str:
    """The path of a program, or "", also in folders of daemons, which a user's PATH may lack."""
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
