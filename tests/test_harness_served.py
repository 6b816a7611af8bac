"""eval/harness.py with a server, or over several processes: the results of one process here."""

import subprocess

import fork_server
import pytest
from conftest import ROOT, copy_of, load_script
from harness_files import entries, harness_records, named, write_files
from model_server import ModelServer

from sftlab.evaluation import server_client
from sftlab.evaluation.processes import Processes
from sftlab.export import agreement, server_agreement

BOTH = "gsm8k_local,arc_easy_local"
NAMES = ("gsm8k_test", "arc_easy_test")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def harness():
    return load_script("eval/harness.py")


@pytest.fixture
def server(finished, monkeypatch):
    """A server of the finished run, held to it on two rows."""
    monkeypatch.setattr(server_client, "RETRIES", 0)
    monkeypatch.setattr(server_agreement, "HELD_ROWS", 2)
    for module in (agreement, server_agreement):
        monkeypatch.setattr(module, "MAX_NEW_TOKENS", 4)
    with ModelServer(finished[0]) as server:
        yield server


@pytest.fixture
def asked(harness, finished, files, tmp_path):
    """Asks both tasks of a copy of the finished run; returns it, for each call another one."""

    def ask(name, *more, tasks=BOTH, limit="3"):
        run = tmp_path / name
        if not run.exists():
            copy_of(finished[0], run)
        read = [name for name in NAMES if name.removesuffix("_test") in tasks]
        flags = ["--tasks", tasks, *named(files, *read), "--limit", limit, "--num_fewshot", "0"]
        harness.main(["--run", str(run), *flags, *more])
        return run

    return ask


def echoes(server):
    return [one for _, one in server.requests if one.get("echo")]


def answers(run):
    return {task: harness_records(run, entry) for task, entry in entries(run).items()}


@pytest.mark.long
def test_a_server_gives_the_texts_and_transformers_the_log_likelihoods(asked, server, capsys):
    here = asked("here")
    capsys.readouterr()
    there = asked("there", "--server", server.url, "--server_requests", "3")
    assert answers(there) == answers(here)
    found = entries(there)
    assert [one["answered_by"] for one in found.values()] == ["server", "transformers"]
    assert found["gsm8k_local"]["server"] == server.url
    assert len(echoes(server)) == 4, "log-likelihoods are asked for where it is held alone"
    printed = capsys.readouterr().out
    assert "arc_easy_local: log-likelihoods by transformers, not by the server" in printed
    texts = [one for path, one in server.requests if one.get("ignore_eos")]
    assert {one["model"] for one in texts} == {"base", "tuned"} and len(texts) == 6
    assert all(one["stop"] and one["stop_token_ids"] == [257] for one in texts)


@pytest.mark.long
def test_a_server_gives_log_likelihoods_where_it_is_asked_to(asked, server):
    here = asked("here", tasks="arc_easy_local")
    flags = ("--server", server.url, "--server_likelihoods")
    there = asked("there", *flags, tasks="arc_easy_local")
    assert entries(there)["arc_easy_local"]["answered_by"] == "server"
    assert len(echoes(server)) == 4 + 2 * 3 * 4
    one, two = (answers(run)["arc_easy_local"] for run in (here, there))
    for ours, theirs in zip(one, two, strict=True):
        for side in ("base", "tuned"):
            expected = pytest.approx(ours[side]["log_likelihoods"], abs=1e-4)
            assert theirs[side]["log_likelihoods"] == expected
            assert theirs[side]["scores"] == ours[side]["scores"]


@pytest.mark.long
def test_a_server_that_differs_or_dies_loses_nothing(asked, server, harness):
    server.tuned_is = "base"
    with pytest.raises(SystemExit, match=r"tuned on the server .* the weights are not the run's"):
        asked("run", "--server", server.url)
    server.tuned_is = "tuned"
    texts = lambda: [one for _, one in server.requests if one.get("ignore_eos")]  # noqa: E731
    assert not texts()
    server.fault = lambda path, number: (500, "sick") if len(texts()) > 4 else None
    flags = ("--server", server.url, "--server_requests", "1")
    with pytest.raises(SystemExit, match="does not answer, tried 1 times: answers are kept"):
        asked("run", *flags, tasks="gsm8k_local")
    server.fault, before = lambda path, number: None, len(texts())
    run = asked("run", *flags, tasks="gsm8k_local")
    assert len(texts()) - before == 2, "kept answers are not asked for again"
    assert entries(run)["gsm8k_local"]["answers_reused"] == {"base": 3, "tuned": 1}
    assert not list((run / "eval" / "harness").glob(".unfinished-*"))


def test_a_server_that_would_answer_nothing_is_refused(asked, harness, monkeypatch):
    monkeypatch.setattr(harness, "served_models", lambda arguments: None)
    with pytest.raises(SystemExit, match="--server generates texts, and arc_easy_local compares"):
        asked("run", "--server", "http://host/v1", tasks="arc_easy_local")


def test_a_server_is_asked_by_one_process(asked, harness, monkeypatch):
    monkeypatch.setattr(harness.Processes, "joined", lambda: Processes(0, 2))
    with pytest.raises(SystemExit, match="a server is asked by one process"):
        asked("run", "--server", "http://127.0.0.1:1/v1")


@pytest.mark.long
def test_two_processes_give_the_results_of_one_to_the_last_bit(asked, finished, files, tmp_path):
    one = asked("one", "--batch_size", "2", limit="7")
    two = copy_of(finished[0], tmp_path / "two")
    command = [
        *(fork_server.python(), str(ROOT / "eval" / "harness.py")),
        *("--config_file", str(ROOT / "accelerate_configs" / "cpu_ddp.yaml"), "--run", str(two)),
        *("--tasks", BOTH, *named(files, *NAMES), "--limit", "7", "--num_fewshot", "0"),
        *("--batch_size", "2"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("base against tuned, lm-eval") == 1
    assert answers(two) == answers(one)
    found = entries(two)
    for task, entry in entries(one).items():
        assert found[task]["metrics"] == entry["metrics"]
        assert (entry["processes"], found[task]["processes"]) == (1, 2)
    assert not list((two / "eval" / "harness").glob(".unfinished-*"))
