"""A real Slurm on this host for tests: a controller and node daemons of its own, in a folder, on
the loopback alone.

Needs Debian's slurm-wlm (slurmctld, slurmd, the commands); authentication is 'none', so nothing
outside the folder is touched. Two partitions: `batch`, whose jobs are requeued when `urgent` needs
their nodes, after a grace time.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import psutil

DAEMONS = ("slurmctld", "slurmd")
FOUND = {name: shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") for name in DAEMONS}
GRACE_S = 30
# seconds until the controller counts a node that does not answer as down
SLURMD_TIMEOUT_S = 300
# the variable that tells which node a daemon and its steps belong to; Slurm sets the other
NODE, NODE_OF_TASKS = "TEST_CLUSTER_NODE", "SLURMD_NODENAME"
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/ended.txt
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
SlurmdParameters=config_overrides
KillWait=30
MinJobAge=600
SlurmdTimeout={slurmd_timeout}
MailProg=/bin/true
"""


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


class SlurmCluster:
    """`with SlurmCluster(folder) as cluster:`.

    Commands run with `cluster.env`, or through `run` from the project.
    """

    def __init__(
        self,
        folder: Path,
        nodes: int = 2,
        cpus: int = 2,
        slurmd_timeout: int = SLURMD_TIMEOUT_S,
    ) -> None:
        self.folder, self.nodes = Path(folder), [f"n{number}" for number in range(1, nodes + 1)]
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "state").mkdir()
        host, (port, *node_ports) = socket.gethostname().partition(".")[0], free_ports(1 + nodes)
        facts = {"host": host, "port": port, "folder": self.folder}
        lines = [CONFIG.format(**facts, slurmd_timeout=slurmd_timeout)]
        for name, node_port in zip(self.nodes, node_ports, strict=True):
            (self.folder / f"spool-{name}").mkdir()
            place = f"NodeHostname={host} NodeAddr=127.0.0.1 Port={node_port}"
            lines.append(f"NodeName={name} {place} CPUs={cpus} RealMemory=8000 State=UNKNOWN")
        every = "Nodes=ALL MaxTime=60 State=UP"
        lines.append(
            f"PartitionName=batch {every} Default=YES PriorityTier=1 PreemptMode=REQUEUE "
            f"GraceTime={GRACE_S}"
        )
        lines.append(f"PartitionName=urgent {every} PriorityTier=10 PreemptMode=OFF")
        (self.folder / "slurm.conf").write_text("\n".join(lines) + "\n")
        (self.folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SLURM", "SBATCH"))
        }
        self.env = kept | {"SLURM_CONF": str(self.folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen] = []

    def __enter__(self) -> "SlurmCluster":
        config = str(self.folder / "slurm.conf")
        commands = [[FOUND["slurmctld"], "-D", "-f", config]]
        commands += [[FOUND["slurmd"], "-D", "-N", name, "-f", config] for name in self.nodes]
        for command, node in zip(commands, ["", *self.nodes], strict=True):
            log = (self.folder / "daemons.out").open("ab")
            self._daemons.append(
                subprocess.Popen(
                    command,
                    env=self.env | {NODE: node},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
            )
        try:
            states = ("sinfo", "-h", "-N", "-p", "batch", "-o", "%t")
            self.wait_until(
                lambda: self.run(*states, check=False).split(), ["idle"] * len(self.nodes)
            )
        except BaseException:
            self._stop_daemons()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.run("scancel", "--full", "--signal=KILL", "-u", "root", check=False)
        self.run("scancel", "-u", "root", check=False)
        try:
            # a job's own keeper outlives its node's daemon
            self.wait_until(lambda: self.run("squeue", "-h", "-o", "%i", check=False), "")
        finally:
            self._stop_daemons()

    def _stop_daemons(self) -> None:
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            daemon.wait(20)

    def lose(self, node: str) -> None:
        """End a node as a power failure does: its daemon, its steps, and all they started."""
        found = {process for process in psutil.process_iter() if _runs_on(process, node)}
        # a step's keeper has an environment of its own
        keepers = {one.parent() for one in found} - {None}
        found |= {one for one in keepers if one.name().startswith("slurmstepd")}
        for end in (psutil.Process.suspend, psutil.Process.kill):
            for process in found:
                with contextlib.suppress(psutil.NoSuchProcess):
                    end(process)

    def run(self, *command: str, check: bool = True, cwd: Path | None = None, **env: str) -> str:
        """What a command prints; RuntimeError where it fails."""
        done = subprocess.run(
            command, env=self.env | env, cwd=cwd, capture_output=True, text=True, timeout=120
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout

    def submit(self, *words: str, cwd: Path, **env: str) -> str:
        """The number of a job that sbatch takes."""
        return self.run("sbatch", "--parsable", *words, cwd=cwd, **env).strip().partition(";")[0]

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, FAILED, CANCELLED, ... as the controller says."""
        shown = self.run("scontrol", "-o", "show", "job", job)
        return shown.partition("JobState=")[2].split()[0]

    def wait(self, job: str, *states: str, seconds: float = 120) -> str:
        """Wait until the job is in one of the states, or over; the state."""
        wanted = states or ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
        return self.wait_until(lambda: self.state(job), *wanted, seconds=seconds)

    @staticmethod
    def wait_until(look, *wanted, seconds: float = 60):
        """Wait until `look()` is one of `wanted`; TimeoutError says what it was last."""
        end = time.monotonic() + seconds
        while (seen := look()) not in wanted:
            if time.monotonic() > end:
                raise TimeoutError(f"waited {seconds} s for {wanted}, last seen: {seen}")
            time.sleep(0.2)
        return seen


def _runs_on(process: psutil.Process, node: str) -> bool:
    """Whether a process is a node's daemon, one of its steps, or started by one."""
    try:
        environment = process.environ()
    except psutil.Error:
        return False
    return node in (environment.get(NODE), environment.get(NODE_OF_TASKS))
