"""The running app as fixtures of every test: conftest.py names this file as a plugin."""

from pathlib import Path

import pytest
from conftest import ROOT, copy_of, read
from serving import serve

from sftlab.files import write_json


@pytest.fixture(scope="session")
def offered(finished, tmp_path_factory) -> Path:
    """A folder of runs: first, second, broken (its adapter cut short) and one that failed."""
    folder = tmp_path_factory.mktemp("offered")
    for name in ("first", "second", "broken", "failed"):
        (folder / name).mkdir()
        copy_of(finished[0], folder / name)
    weights = folder / "broken" / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    write_json(folder / "failed" / "run.json", read(folder / "failed") | {"status": "failed"})
    (folder / "torn").mkdir()
    (folder / "torn" / "run.json").write_text('{"status": "succee')
    return folder


@pytest.fixture(scope="session")
def server(offered, tmp_path_factory):
    """The app with the tiny model."""
    report = ("--report", str(ROOT / "results" / "demo"))
    folder = tmp_path_factory.mktemp("server")
    with serve(folder, "--run", str(offered / "first"), *report) as running:
        yield running


@pytest.fixture(scope="session")
def slow(finished, tmp_path_factory):
    """The app with the slow model and room for one message to wait.

    Its runs are folder/runs alone.
    """
    folder = tmp_path_factory.mktemp("slow")
    (folder / "runs" / "first").mkdir(parents=True)
    copy_of(finished[0], folder / "runs" / "first")
    with serve(folder, "--runs", str(folder / "runs"), "--queue", "1", slow=True) as running:
        yield running


@pytest.fixture(scope="session")
def client(server):
    """A client of the app with the tiny model."""
    from gradio_client import Client

    return Client(server.url, verbose=False)
