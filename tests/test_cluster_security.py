"""Who can reach the Dask cluster of a tokenization: nobody without its certificate."""

import socket
import stat
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from conftest import arguments, load_script, short_fields
from dask.distributed import Client
from distributed.security import Security
from slurm_cluster import FOUND, SlurmCluster

from sftlab.data import tokenizing_cluster
from sftlab.data.tokenizing_cluster import certificate

LOOPBACK = ("127.0.0.1", "::1")


@pytest.fixture
def script():
    return load_script("slurm/tokenize_dataset.py")


@pytest.fixture
def tokenize(script, base, rows, tmp_path, monkeypatch):
    """Tokenize the rows; `look(client)` is called while the cluster is there."""

    def tokenize(look, *options):
        monkeypatch.setattr(script, "how_to_see", lambda link: look(Client.current()) or link)
        fields = arguments(short_fields(base, rows, tmp_path / "run"))
        script.main(["--out", str(tmp_path / "out"), "--workers", "1", *options, *fields])
        assert (tmp_path / "out" / "shard-00000.json").is_file()

    return tokenize


def listening(processes):
    """The addresses and ports that processes listen on."""
    found = set()
    for process in processes:
        for one in process.net_connections(kind="inet"):
            if one.status == psutil.CONN_LISTEN:
                found.add((one.laddr.ip, one.laddr.port))
    return found


def says(place, request=b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"):
    """What a port answers to whoever comes."""
    with socket.create_connection(place, timeout=2) as connection:
        connection.sendall(request)
        try:
            return connection.recv(100)
        except (TimeoutError, ConnectionResetError):
            return b""


@contextmanager
def refused():
    with pytest.raises((OSError, TimeoutError)):
        yield


def strangers_are_refused(address):
    """Clients without a certificate, or with one of their own, do not get in."""
    host = address.partition("://")[2]
    assert address.startswith("tls://")
    with refused():
        Client(f"tcp://{host}", timeout=1)
    with certificate() as keys, refused():
        Client(f"tls://{host}", timeout=1, security=Security(**keys))


def test_on_one_machine_everything_listens_on_localhost_and_wants_the_certificate(tokenize):
    # processes of earlier tests may still run, and stores of torch's processes listen everywhere
    seen, own = {}, psutil.Process()
    others, earlier = listening([own]), set(own.children())

    def look(client):
        client.wait_for_workers(1)
        started = set(own.children()) - earlier
        below = [one for child in started for one in child.children(recursive=True)]
        seen["places"] = listening([own, *started, *below]) - others
        strangers_are_refused(client.scheduler.address)
        seen["mode"] = modes(client.security.tls_ca_file)

    tokenize(look)
    assert len(seen["places"]) >= 4  # scheduler, worker, nanny and dashboard
    assert {ip for ip, _ in seen["places"]} <= set(LOOPBACK)
    assert seen["mode"] == (0o700, 0o600)


def modes(file):
    """The rights of a key's folder and of the key."""
    key = Path(file).with_name("key.pem")
    return stat.S_IMODE(key.parent.stat().st_mode), stat.S_IMODE(key.stat().st_mode)


def test_the_key_goes_with_the_cluster(tmp_path):
    with certificate(tmp_path) as keys:
        assert keys["require_encryption"]
        assert modes(keys["tls_ca_file"]) == (0o700, 0o600)
    assert not list(tmp_path.iterdir())


def test_without_openssl_nothing_is_started(script, monkeypatch):
    monkeypatch.setattr(tokenizing_cluster.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="install openssl"):
        script.parse_arguments(["--out", "x"])


@pytest.mark.cluster
@pytest.mark.skipif(None in FOUND.values(), reason="slurm-wlm is not installed")
def test_under_slurm_only_the_certificates_owner_reaches_another_address(
    tokenize, tmp_path, monkeypatch
):
    seen = {}

    def look(client):
        client.wait_for_workers(1, timeout=60)
        strangers_are_refused(client.scheduler.address)
        words = "distributed.cli.dask_worker"
        every = psutil.process_iter(["cmdline"])
        workers = [p for p in every if words in " ".join(p.info["cmdline"] or [])]
        assert workers
        own = [p for one in workers for p in (one, *one.children(recursive=True))]
        seen["places"] = listening([psutil.Process(), *own])
        open_to_all = [one for one in seen["places"] if one[0] not in LOOPBACK]
        # TLS answers plain words with an alert or not at all
        seen["said"] = [says((ip.replace("0.0.0.0", "127.0.0.1"), n)) for ip, n in open_to_all]
        seen["mode"] = modes(client.security.tls_ca_file)

    with SlurmCluster(tmp_path / "slurm") as cluster:
        for name in ("PATH", "SLURM_CONF"):
            monkeypatch.setenv(name, cluster.env[name])
        tokenize(look, "--cluster", "slurm", "--memory", "1GB")
    assert seen["said"]
    assert not [said for said in seen["said"] if b"HTTP" in said]
    assert seen["mode"] == (0o700, 0o600)
    assert not (tmp_path / "out" / "slurm-logs").exists()
