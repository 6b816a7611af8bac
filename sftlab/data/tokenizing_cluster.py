"""The Dask cluster that tokenizes: workers on this machine, or jobs of Slurm.

Dask's scheduler runs what its clients send it. It therefore talks TLS alone, and a client or worker
needs the certificate of this very cluster, which only its owner can read. The dashboards have no
login and listen on localhost.
"""

import argparse
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dask.distributed import Client, LocalCluster
    from dask_jobqueue import SLURMCluster
    from distributed.security import Security

LOGS = "slurm-logs"
# seconds between two looks for a working worker, and without one before the script gives up
LOOK_S, SILENT_S = 5, 60
# one worker has one core
THREADS = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
DASHBOARD = "127.0.0.1:0"
# a certificate lives longer than any tokenizing
CERTIFICATE_DAYS = 90


def add_cluster_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where the workers run."""
    site = os.environ.get
    parser.add_argument("--cluster", choices=("local", "slurm"), default="local")
    parser.add_argument("--partition", help="of the workers' jobs (else SBATCH_PARTITION)")
    parser.add_argument("--account", help="of the workers' jobs (else SBATCH_ACCOUNT)")
    parser.add_argument(
        "--time",
        default=site("SFTLAB_TIME", "01:00:00"),
        help="time limit of a worker's job (else SFTLAB_TIME)",
    )
    parser.add_argument(
        "--memory",
        default=site("SFTLAB_MEMORY", "2GB"),
        help="memory of a worker's job (else SFTLAB_MEMORY)",
    )
    parser.add_argument(
        "--interface",
        default=site("SFTLAB_INTERFACE"),
        help="network interface that the nodes share, such as ib0 (else SFTLAB_INTERFACE)",
    )


def check_cluster_options(arguments: argparse.Namespace) -> None:
    """Raise ValueError where a command that the cluster needs is missing."""
    if arguments.cluster == "slurm" and not shutil.which("sbatch"):
        raise ValueError(
            "--cluster slurm needs Slurm's sbatch, which is not here: leave --cluster out to use "
            "this machine"
        )
    if not shutil.which("openssl"):
        raise ValueError(
            "Dask's connections need a certificate, and the openssl command is not here: install "
            "openssl"
        )


@contextmanager
def cluster_of(
    arguments: argparse.Namespace, workers: int
) -> Iterator["LocalCluster | SLURMCluster"]:
    """Start workers of one core each. Under Slurm each is a job, and a lost one is replaced."""
    if arguments.cluster == "slurm":
        with _slurm_cluster(arguments, workers) as cluster:
            yield cluster
        return
    from dask.distributed import LocalCluster

    with (
        certificate() as security,
        LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            processes=True,
            env=THREADS,
            security=security,
            dashboard_address=DASHBOARD,
        ) as cluster,
    ):
        yield cluster


@contextmanager
def _slurm_cluster(arguments: argparse.Namespace, workers: int) -> Iterator["SLURMCluster"]:
    import dask
    from dask_jobqueue import SLURMCluster

    # Dask would wait 15 s for a lost worker before it asks for another job
    dask.config.set({"distributed.deploy.lost-worker-timeout": "5s"})
    logs = arguments.out / LOGS
    logs.mkdir(exist_ok=True)
    with (
        certificate(logs.resolve()) as security,
        SLURMCluster(
            queue=arguments.partition,
            account=arguments.account,
            walltime=arguments.time,
            memory=arguments.memory,
            cores=1,
            processes=1,
            interface=arguments.interface,
            job_name="tokenize-worker",
            log_directory=str(logs),
            job_script_prologue=[f"export {name}={value}" for name, value in THREADS.items()],
            security=security,
            scheduler_options={"dashboard_address": DASHBOARD},
            worker_extra_args=["--dashboard-address", DASHBOARD],
        ) as cluster,
    ):
        script = logs / "job.sh"
        script.write_text(cluster.job_script())
        checked = subprocess.run(
            ["sbatch", "--test-only", str(script)], capture_output=True, text=True
        )
        if checked.returncode:
            raise ValueError(f"Slurm refuses the workers' job: {' '.join(checked.stderr.split())}")
        # scale(n) would not replace a lost worker's job
        cluster.adapt(minimum_jobs=workers, maximum_jobs=workers)
        yield cluster
    shutil.rmtree(logs)


@contextmanager
def certificate(place: Path | None = None) -> Iterator["Security"]:
    """Make a key and a certificate for one cluster, in a folder that only its owner can read.

    The folder is made in `place`, by default this machine's folder for temporary files, and removed
    at the end. Scheduler, workers and client show the certificate and accept no other.
    """
    from distributed.security import Security

    folder = Path(tempfile.mkdtemp(prefix=".tls-", dir=place))
    key, shown = str(folder / "key.pem"), str(folder / "certificate.pem")
    # the curve takes a hundredth of RSA's time
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
    command += f" -days {CERTIFICATE_DAYS} -subj /CN=sftlab"
    try:
        made = subprocess.run(
            [*command.split(), "-keyout", key, "-out", shown], capture_output=True, text=True
        )
        if made.returncode:
            raise ValueError(f"openssl makes no certificate: {' '.join(made.stderr.split())}")
        roles = ("scheduler", "worker", "client")
        pairs = {f"tls_{role}_key": key for role in roles}
        pairs |= {f"tls_{role}_cert": shown for role in roles}
        yield Security(require_encryption=True, tls_ca_file=shown, **pairs)
    finally:
        shutil.rmtree(folder)


def refuse_silence(
    looked: list[tuple[float, bool]],
    client: "Client",
    cluster: "LocalCluster | SLURMCluster",
    logs: Path,
) -> None:
    """Raise ValueError where no worker has been there for a minute.

    `looked` keeps the time and the result of each look.
    """
    now = time.monotonic()
    if looked and now - looked[-1][0] < LOOK_S:
        return
    looked.append((now, nobody_works(client, cluster)))
    while len(looked) > 1 and looked[1][0] <= now - SILENT_S:
        looked.pop(0)
    if looked[0][0] <= now - SILENT_S and all(nobody for _, nobody in looked):
        raise ValueError(f"the workers' jobs have ended and none of them reported: see {logs}")


def nobody_works(client: "Client", cluster: "LocalCluster | SLURMCluster") -> bool:
    """Whether no worker is there and Slurm has no job of theirs.

    Dask does not replace a job that ends before its worker reports.
    """
    from dask.distributed import LocalCluster

    if isinstance(cluster, LocalCluster) or client.scheduler_info()["workers"]:
        return False
    jobs = {job.job_id for job in cluster.workers.values()}
    listed = subprocess.run(["squeue", "-h", "-o", "%i"], capture_output=True, text=True)
    return listed.returncode == 0 and not jobs & set(listed.stdout.split())


def how_to_see(link: str) -> str:
    """Returns a line on the dashboard, which listens on this machine alone."""
    port = link.rpartition(":")[2].partition("/")[0]
    there = os.uname().nodename
    return f"dashboard: {link} (from elsewhere: ssh -L {port}:localhost:{port} {there})"
