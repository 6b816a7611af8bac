"""Where the workers that tokenize run, and who can reach them.

Dask's scheduler runs what its clients send it. It therefore talks TLS alone, and a client or worker
needs the certificate of this very cluster, which only its owner can read. The dashboards have no
login and listen on localhost.
"""

import argparse
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
def certificate(place: Path | None = None) -> Iterator[dict[str, Any]]:
    """Make a key and a certificate for one cluster, in a folder that only its owner can read.

    The folder is made in `place`, by default this machine's folder for temporary files, and removed
    at the end. Scheduler, workers and client show the certificate and accept no other. Yields the
    arguments of Dask's Security.
    """
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
        yield {"require_encryption": True, "tls_ca_file": shown} | pairs
    finally:
        shutil.rmtree(folder)


def how_to_see(link: str) -> str:
    """Returns a line on the dashboard, which listens on this machine alone."""
    port = link.rpartition(":")[2].partition("/")[0]
    there = os.uname().nodename
    return f"dashboard: {link} (from elsewhere: ssh -L {port}:localhost:{port} {there})"
